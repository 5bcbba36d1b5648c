"""Frequencies that depend on a length: the same in every call, and those of a call of the row length."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    PhimoeConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from anchor_context.rope.length import fix_frequencies
from anchor_context.rope.scaling import apply_rope_settings

LENGTH = 64  # the models' own
ROW = 4 * LENGTH
HEAD_DIM = 16
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.01 * i for i in range(HEAD_DIM // 2)],
    "long_factor": [1.5 + 0.5 * i for i in range(HEAD_DIM // 2)],
    "original_max_position_embeddings": LENGTH,
}
FAMILIES = {  # name -> (configuration, rotary module, settings, the model's own maximum)
    "llama": (LlamaConfig, LlamaRotaryEmbedding, DYNAMIC, LENGTH),
    "mistral": (MistralConfig, MistralRotaryEmbedding, DYNAMIC, LENGTH),
    "qwen2": (Qwen2Config, Qwen2RotaryEmbedding, DYNAMIC, LENGTH),
    "qwen3": (Qwen3Config, Qwen3RotaryEmbedding, DYNAMIC, LENGTH),
    # Of Phi-3's form: the maximum is that of the long factors, the ratio gives the attention factor.
    "phi3": (Phi3Config, Phi3RotaryEmbedding, LONGROPE, 2 * LENGTH),
    "phimoe": (
        PhimoeConfig,
        PhimoeRotaryEmbedding,
        LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3},
        2 * LENGTH,
    ),
}
CALLS = {  # what a rank or a micro-batch may hold of a row, in this order: none may change the next
    "a whole row": torch.arange(ROW),
    "the first half": torch.arange(ROW // 2),
    "the second half": torch.arange(ROW // 2, ROW),
    "a short document": torch.arange(9),
    "restarting": torch.cat([torch.arange(40), torch.arange(50)]),
    "one token": torch.tensor([5]),
}


def make_config(family: str, **rope):
    kind, _, settings, maximum = FAMILIES[family]
    return kind(
        vocab_size=64,
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=64,
        max_position_embeddings=maximum,
        pad_token_id=0,
        eos_token_id=2,
        original_max_position_embeddings=LENGTH,  # Phi-3 keeps it here
        rope_parameters=copy.deepcopy(settings | rope),
    )


def rotary(config, family: str) -> torch.nn.Module:
    return FAMILIES[family][1](config)


def cos_and_sin(table: torch.nn.Module, positions: Tensor) -> Tensor:
    """(2, positions, HEAD_DIM)."""
    return torch.cat(table(torch.zeros(1, 1, HEAD_DIM), positions[None]))


def for_the_row_length(family: str) -> Tensor:
    """What transformers computes for the source's configuration in one call of a whole row."""
    config = make_config(family)
    if family == "phimoe":  # transformers 5 takes its frequencies by the short factors always
        config.rope_parameters["short_factor"] = config.rope_parameters["long_factor"]
    return cos_and_sin(rotary(config, family), torch.arange(ROW))


def trained_config(family: str, row_length: int = ROW, **flags):
    config = make_config(family)
    apply_rope_settings(config, row_length=row_length, **flags)
    changes = fix_frequencies(config, row_length=row_length)
    return config, changes


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def test_every_call_rotates_as_a_call_of_the_row_length(family, tmp_path):
    expected = for_the_row_length(family)
    unfixed = rotary(make_config(family), family)
    short = CALLS["a short document"]
    difference = (cos_and_sin(unfixed, short) - expected[:, short]).abs().max()
    assert difference > 1e-2, "the case is vacuous"

    config, changes = trained_config(family)
    assert len(changes) == 1
    config.validate()
    config.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    whole = cos_and_sin(rotary(config, family), torch.arange(ROW))
    # In a call, transformers computes dynamic's base in float32, here it is a float64.
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)
    for table in (rotary(config, family), rotary(saved, family)):
        for name, positions in CALLS.items():
            assert cos_and_sin(table, positions).equal(whole[:, positions]), name
    assert saved.max_position_embeddings == ROW


def test_rows_within_the_models_own_length_leave_it_what_it_knows_of_longer_ones(family):
    config, changes = trained_config(family, row_length=LENGTH)
    assert changes == []
    before, after = make_config(family).rope_parameters, dict(config.rope_parameters)
    after.pop("attention_factor", None)
    assert after == before
    table = rotary(config, family)
    expected = cos_and_sin(rotary(make_config(family), family), torch.arange(LENGTH))
    for name, positions in CALLS.items():
        positions = positions % LENGTH
        assert cos_and_sin(table, positions).equal(expected[:, positions]), name


def test_a_models_own_length_given_by_flag_is_where_dynamic_begins():
    config, changes = trained_config("llama", model_max_position_embeddings=ROW)
    assert changes == [] and config.rope_parameters == DYNAMIC
    config, _ = trained_config("llama", rope_scaling_factor=4.0)
    expected = cos_and_sin(rotary(make_config("llama", factor=4.0), "llama"), torch.arange(ROW))
    short = cos_and_sin(rotary(config, "llama"), torch.arange(9))
    torch.testing.assert_close(short, expected[:, :9], rtol=0, atol=1e-5)


def test_a_raised_maximum_leaves_the_attention_factor():
    source = rotary(make_config("phi3"), "phi3").attention_scaling
    assert source > 1
    config, _ = trained_config("phi3", row_length=8 * LENGTH)
    assert config.max_position_embeddings == 8 * LENGTH
    assert rotary(config, "phi3").attention_scaling == source
    config, _ = trained_config("phi3", model_max_position_embeddings=100 * ROW)
    assert rotary(config, "phi3").attention_scaling == source
    asked, _ = trained_config("phi3", rope_scaling_factor=32.0)
    assert rotary(asked, "phi3").attention_scaling > source


def test_a_yarn_without_a_factor_keeps_that_of_its_own_lengths():
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": LENGTH}
    config = make_config("llama")
    config.max_position_embeddings = 4 * LENGTH
    config.rope_parameters = yarn | {"factor": None}
    source = rotary(config, "llama")
    apply_rope_settings(config, row_length=4 * ROW)
    assert config.max_position_embeddings == 4 * ROW
    assert config.rope_parameters == yarn | {"factor": 4.0}
    assert rotary(config, "llama").inv_freq.equal(source.inv_freq)


def test_settings_per_kind_of_layer_stay():
    config = Gemma3TextConfig(max_position_embeddings=LENGTH)
    before = copy.deepcopy(config.rope_parameters)
    apply_rope_settings(config, row_length=ROW)
    assert fix_frequencies(config, row_length=ROW) == []
    assert config.rope_parameters == before and config.max_position_embeddings == ROW


@pytest.mark.parametrize("family", [Gemma3TextConfig, Olmo3Config])
def test_flags_change_the_layers_that_see_everything_and_say_so(family):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 2}
    kinds = ["sliding_attention", "full_attention"]
    config = family(**sizes, max_position_embeddings=LENGTH, layer_types=kinds)
    before, same = copy.deepcopy(config.rope_parameters), copy.deepcopy(config)
    flags = {"rope_scaling_type": "dynamic", "rope_scaling_factor": 2.0}
    said = apply_rope_settings(config, row_length=ROW, rope_theta=7e5, **flags)
    assert said == ["full_attention as the flags say; sliding_attention as the model has it"]
    assert config.rope_parameters["sliding_attention"] == before["sliding_attention"]
    changed = before["full_attention"] | {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 7e5}
    assert config.rope_parameters["full_attention"] == changed
    (said,) = fix_frequencies(config, row_length=ROW)
    assert said.startswith("dynamic, theta 700,000 -> ")
    table = {Gemma3TextConfig: Gemma3RotaryEmbedding, Olmo3Config: Olmo3RotaryEmbedding}[family]
    ours, theirs = table(config), table(same)
    assert ours.sliding_attention_inv_freq.equal(theirs.sliding_attention_inv_freq)
    theta = config.rope_parameters["full_attention"]["rope_theta"]
    expected = theta ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(ours.full_attention_inv_freq, expected)


def test_a_model_without_rope_trains_within_its_positions():
    config = GPT2Config(n_positions=LENGTH)
    apply_rope_settings(config, row_length=LENGTH)
    assert fix_frequencies(config, row_length=LENGTH) == [] and config.n_positions == LENGTH
    with pytest.raises(
        ValueError, match="gpt2 has no RoPE, its positions end at 64: a --seq-length"
    ):
        apply_rope_settings(config, row_length=ROW)
    with pytest.raises(ValueError, match="gpt2 has no RoPE, which --rope-theta.*leave them out"):
        apply_rope_settings(config, row_length=LENGTH, rope_theta=1e6)
