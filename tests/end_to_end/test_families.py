"""Families beyond LLaMA through `train.py`: windows, sinks, caps, a RoPE for each kind of layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import losses, weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

WINDOW = 24
KINDS = ["sliding_attention", "full_attention"]
FAMILIES = {  # model_type -> its settings besides the sizes
    "mistral": {"sliding_window": 4096},
    "gpt_oss": {
        "sliding_window": WINDOW,
        "layer_types": KINDS,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": KINDS, "query_pre_attn_scalar": 8},
    "olmo3": {"sliding_window": WINDOW, "layer_types": KINDS},
    "gemma2": {
        "sliding_window": WINDOW,
        "layer_types": KINDS,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
}
STEPS = ("--max-train-steps", "5")
ON_FLEX = ("--attn_engine", "flex", "--anchor_placement", "per_document")
RING = ("--parallel_mode", "ring_attn", "--gradient-accumulate-every", "1")


@pytest.fixture(scope="module")
def model_of(tiny, tmp_path_factory):
    """model_of(model_type) -> the flags that name a tiny random model of that family."""

    def make(model_type: str) -> tuple[str, str]:
        folder: Path = tmp_path_factory.mktemp("families") / model_type
        tokenizer = AutoTokenizer.from_pretrained(tiny.model)
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            model_type,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
            initializer_range=0.1,
            pad_token_id=tokenizer.eos_token_id,
            **ends,
            **FAMILIES[model_type],
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return "--model_name_or_path", str(folder)

    return make


def some(name: str):
    """The families that run by default, and those that --slow adds."""
    return pytest.param(name, marks=[] if name == "gpt_oss" else pytest.mark.slow)


@pytest.mark.parametrize("family", [some(name) for name in FAMILIES if name != "gemma2"])
def test_flash_flex_and_a_ring_train_the_same(family, launch, model_of, tmp_path):
    model = model_of(family)
    launch(1, tmp_path / "flash", *STEPS, *model)
    launch(1, tmp_path / "flex", *STEPS, *model, *ON_FLEX)
    launch(2, tmp_path / "ring", *STEPS, *model, *RING)
    expected = losses(tmp_path / "flash")
    assert len(expected) == 5 and max(expected) - min(expected) > 0.01
    for engine in ("flex", "ring"):
        assert losses(tmp_path / engine) == pytest.approx(expected, rel=1e-5), engine


@pytest.mark.slow
def test_sinks_are_trained_the_same_on_ranks_that_share_heads_or_tokens(launch, model_of, tmp_path):
    """Each rank has a part of the sinks' gradient: of its heads, or of its tokens."""
    model, found = model_of("gpt_oss"), {}
    start = AutoModelForCausalLM.from_pretrained(model[1]).state_dict()
    for way in ("data_parallel", "ulysses_attn", "ring_attn"):
        ranks = 1 if way == "data_parallel" else 2
        flags = ("--parallel_mode", way, "--learning-rate", "1e-2")
        launch(ranks, tmp_path / way, *STEPS, *model, *flags)
        trained = weights(tmp_path / way / "step-5")
        found[way] = {name: x for name, x in trained.items() if name.endswith("sinks")}
    one = found["data_parallel"]
    assert len(one) == 2 and all((x - start[name]).abs().min() > 1e-3 for name, x in one.items())
    for way, sinks in found.items():
        for name, x in sinks.items():
            torch.testing.assert_close(x, one[name], rtol=1e-4, atol=1e-6, msg=way)


@pytest.mark.slow
def test_capped_scores_train_on_flex_alone_here(launch, model_of, tmp_path):
    """One rank, and two that share the heads; no kernel of the CPU has a cap."""
    model = model_of("gemma2")
    refused = launch(1, tmp_path / "flash", *STEPS, *model, expect=1)
    assert "torch_cpu: does not cap scores" in refused.stdout
    assert "--attn_engine flex" in refused.stdout and not (tmp_path / "flash").exists()
    launch(1, tmp_path / "1", *STEPS, *model, "--attn_engine", "flex")
    ulysses = ("--attn_engine", "flex", "--parallel_mode", "ulysses_attn")
    launch(2, tmp_path / "2", *STEPS, *model, *ulysses)
    one = losses(tmp_path / "1")
    assert len(one) == 5 and losses(tmp_path / "2") == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_flags_change_the_rope_of_full_layers_and_the_run_says_so(launch, model_of, tmp_path):
    flags = ("--rope-theta", "7e5", "--rope_precision", "float32", "--max-train-steps", "2")
    finished = launch(1, tmp_path / "run", *model_of("gemma3_text"), *flags)
    said = "rope     full_attention as the flags say; sliding_attention as the model has it"
    assert said in finished.stdout
    saved = json.loads((tmp_path / "run/step-2/config.json").read_text())
    assert saved["rope_parameters"]["full_attention"]["rope_theta"] == saved["rope_theta"] == 7e5
    assert saved["rope_parameters"]["sliding_attention"]["rope_theta"] == 1e4
    assert saved["rope_local_base_freq"] == 1e4
