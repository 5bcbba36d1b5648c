"""RoPE's frequencies are float32 again after a library rounded them with the weights."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from anchor_context.rope.frequencies import keep_rotary_frequencies

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES),  # a table for each kind of layer
    "yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
}


def frequencies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """{name inside the language model: buffer}."""
    found = {n.split(".")[-1]: b for n, b in model.named_buffers() if n.endswith("inv_freq")}
    assert found, "the case is vacuous: no frequencies"
    return found


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, and in float32."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == torch.float32 and ours[name].equal(theirs[name]) for name in ours
    )


def round_there(module: torch.nn.Module) -> torch.nn.Module:
    """What DeepSpeed before 0.19.2 did as it wrapped a module."""
    return torch.nn.ModuleDict({"module": module.bfloat16()})


def round_there_and_back(module: torch.nn.Module) -> torch.nn.Module:
    return round_there(module).float()


@pytest.mark.parametrize("library", [round_there, round_there_and_back])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("when", ["as it loads", "as it wraps"])
def test_what_a_library_rounded_is_put_right(config, library, when):
    model = AutoModelForCausalLM.from_config(config)
    exact = {name: buffer.clone() for name, buffer in frequencies(model).items()}
    if when == "as it loads":
        library(model)
        restore = keep_rotary_frequencies(model)
        wrapped = torch.nn.ModuleDict({"module": model})
    else:
        restore = keep_rotary_frequencies(model)
        wrapped = library(model)
    assert not same(frequencies(wrapped), exact)
    assert {name.split(".")[-1] for name in restore()} == set(exact)
    assert same(frequencies(wrapped), exact)
    assert restore() == []


def test_frequencies_that_somebody_chose_stay():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    chosen = torch.linspace(0.1, 1, 8)
    model.model.rotary_emb.inv_freq = chosen.clone()
    restore = keep_rotary_frequencies(model)
    model.bfloat16()
    restore()
    assert model.model.rotary_emb.inv_freq.equal(chosen)


def test_a_table_that_cannot_be_computed_anew_is_refused():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).bfloat16()
    del model.model.rotary_emb.config
    with pytest.raises(ValueError, match="were rounded to torch.bfloat16"):
        keep_rotary_frequencies(model)
