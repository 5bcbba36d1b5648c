"""Random weights to train from scratch: by the seed alone, and in the form of any other model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from anchor_context.demo import train_tokenizer
from anchor_context.integrations.language_model import check_has_weights
from anchor_context.integrations.random_weights import write_random_model
from anchor_context.integrations.rehearsal import rehearse
from anchor_context.run.saved_model import read_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A configuration and a tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["some text"], vocab_size=300).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)
    return folder


def written(folder: Path, into: Path, *, seed: int = 1, dtype=torch.float32) -> dict:
    # A kernel that a configuration names need not be installed.
    config = LlamaConfig.from_pretrained(folder, attn_implementation="flash_attention_2")
    source = read_source(
        str(folder), config=config, tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    model_class = rehearse(str(folder), config, source, trust_remote_code=False)
    write_random_model(into, model_class, config=config, source=source, dtype=dtype, seed=seed)
    return load_file(into / "model.safetensors")


def test_weights_are_a_function_of_the_seed(folder, tmp_path):
    before = torch.get_rng_state()
    first = written(folder, tmp_path / "1")
    assert torch.get_rng_state().equal(before), "the run's own random numbers are not touched"
    torch.rand(7)
    again, other = written(folder, tmp_path / "2"), written(folder, tmp_path / "3", seed=2)
    assert all(first[name].equal(again[name]) for name in first)
    matrices = [name for name in first if first[name].dim() == 2]
    assert len(matrices) == 15 and not any(first[name].equal(other[name]) for name in matrices)


def test_it_is_the_model_that_the_configuration_describes(folder, tmp_path):
    weights = written(folder, tmp_path / "model", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16 and "lm_head.weight" not in weights, "tied ones once"
    assert model.model.embed_tokens.weight.float().std().item() == pytest.approx(0.05, rel=0.05)
    full = written(folder, tmp_path / "full")
    assert all(weights[name].equal(full[name].bfloat16()) for name in full), "rounded once"
    ours = json.loads((tmp_path / "model/config.json").read_text())
    assert ours["initializer_range"] == 0.05
    tokenizer = (folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "model/tokenizer.json").read_bytes() == tokenizer


def test_a_folder_without_weights_is_refused_at_once(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no weights .*: --from_scratch begins with random"):
        check_has_weights(str(folder))
    written(folder, tmp_path / "model")
    check_has_weights(str(tmp_path / "model"))
    check_has_weights("meta-llama/Llama-3.1-8B")  # the hub's are found when they are loaded
