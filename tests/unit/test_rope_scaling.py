"""The RoPE flags, checked on the frequencies that transformers' own rotary module builds from them."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from anchor_context.rope.scaling import apply_rope_settings

FAMILIES = {
    "llama": (LlamaConfig, LlamaRotaryEmbedding),
    "mistral": (MistralConfig, MistralRotaryEmbedding),
    "qwen2": (Qwen2Config, Qwen2RotaryEmbedding),
    "qwen3": (Qwen3Config, Qwen3RotaryEmbedding),
}
HEAD_DIM = 16
LENGTH = 1024  # the models' own maximum
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 512,
}


def make_config(family: str, **rope):
    return FAMILIES[family][0](
        vocab_size=64,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5} | rope,
    )


def frequencies(config, family: str) -> torch.Tensor:
    return FAMILIES[family][1](config).inv_freq.double()


def expected(base: float) -> torch.Tensor:
    return base ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def test_flags_left_out_keep_the_models_own_settings(family):
    config = make_config(family, **LLAMA3)
    apply_rope_settings(config, row_length=LENGTH)
    assert config.rope_parameters == LLAMA3
    assert config.max_position_embeddings == LENGTH


def test_the_base_changes_alone(family):
    config = make_config(family, **LLAMA3)
    apply_rope_settings(config, row_length=LENGTH, rope_theta=1e6)
    assert config.rope_parameters == LLAMA3 | {"rope_theta": 1e6}
    plain = make_config(family)
    apply_rope_settings(plain, row_length=LENGTH, rope_theta=1e6)
    torch.testing.assert_close(frequencies(plain, family), expected(1e6), rtol=1e-6, atol=0)


def test_default_ignores_a_factor(family):
    config = make_config(family)
    apply_rope_settings(
        config, row_length=16 * LENGTH, rope_scaling_type="default", rope_scaling_factor=16
    )
    torch.testing.assert_close(frequencies(config, family), expected(5e5), rtol=1e-6, atol=0)
    assert config.max_position_embeddings == 16 * LENGTH
    scaled = make_config(family, **LLAMA3)
    apply_rope_settings(scaled, row_length=LENGTH, rope_scaling_type="default")
    assert scaled.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def test_linear_divides_every_frequency(family):
    config = make_config(family)
    apply_rope_settings(
        config, row_length=4 * LENGTH, rope_scaling_type="linear", rope_scaling_factor=4
    )
    torch.testing.assert_close(frequencies(config, family), expected(5e5) / 4, rtol=1e-6, atol=0)


def test_dynamic_stretches_beyond_the_models_own_length(family):
    config = make_config(family)
    apply_rope_settings(
        config, row_length=4 * LENGTH, rope_scaling_type="dynamic", rope_scaling_factor=2
    )
    rotary = FAMILIES[family][1](config)
    hidden = torch.zeros(1, 1, HEAD_DIM)
    rotary(hidden, torch.arange(LENGTH)[None])
    torch.testing.assert_close(rotary.inv_freq.double(), expected(5e5), rtol=1e-6, atol=0)
    rotary(hidden, torch.arange(4 * LENGTH)[None])
    stretch = (2 * 4 - (2 - 1)) ** (HEAD_DIM / (HEAD_DIM - 2))
    torch.testing.assert_close(rotary.inv_freq.double(), expected(5e5 * stretch), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scaling_type", ["yarn", "llama3"])
def test_bands_come_from_the_models_own_length(family, scaling_type):
    config = make_config(family)
    apply_rope_settings(
        config, row_length=8 * LENGTH, rope_scaling_type=scaling_type, rope_scaling_factor=8
    )
    assert config.rope_parameters["original_max_position_embeddings"] == LENGTH
    assert config.max_position_embeddings == 8 * LENGTH
    # Both keep the fastest frequency and divide one whose wavelength exceeds the original length.
    found, plain = frequencies(config, family), expected(5e5)
    slow = 2 * math.pi / plain > LENGTH
    assert slow.any()
    torch.testing.assert_close(found[0], plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[slow], plain[slow] / 8, rtol=1e-6, atol=0)
    config.validate()


def test_llama3_keeps_its_own_bands_and_takes_a_new_factor():
    config = make_config("llama", **LLAMA3)
    apply_rope_settings(config, row_length=LENGTH, rope_scaling_factor=32)
    assert config.rope_parameters == LLAMA3 | {"factor": 32.0}
    apply_rope_settings(config, row_length=LENGTH, rope_scaling_type="llama3")
    assert config.rope_parameters == LLAMA3 | {"factor": 32.0}


def test_a_partly_rotated_head_stays_so():
    config = make_config("llama", partial_rotary_factor=0.5)
    apply_rope_settings(
        config, row_length=LENGTH, rope_scaling_type="linear", rope_scaling_factor=2
    )
    assert config.rope_parameters["partial_rotary_factor"] == 0.5


def test_a_config_json_in_the_older_form(family, tmp_path):
    config = make_config(family)
    fields = config.to_diff_dict()
    del fields["rope_parameters"]
    fields |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    older = AutoConfig.for_model(**fields)
    apply_rope_settings(older, row_length=LENGTH, rope_scaling_factor=4)
    torch.testing.assert_close(frequencies(older, family), expected(5e5) / 4, rtol=1e-6, atol=0)
    older.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert reloaded.rope_parameters == older.rope_parameters


def test_the_recorded_maximum_follows_the_rows():
    config = make_config("llama")
    apply_rope_settings(config, row_length=LENGTH // 2)
    assert config.max_position_embeddings == LENGTH
    apply_rope_settings(config, row_length=2 * LENGTH)
    assert config.max_position_embeddings == 2 * LENGTH
    apply_rope_settings(config, row_length=LENGTH, model_max_position_embeddings=3 * LENGTH)
    assert config.max_position_embeddings == 3 * LENGTH


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"rope_theta": -1.0}, r"--rope-theta -1.0 must be greater than 1"),
        ({"rope_theta": math.nan}, r"--rope-theta nan"),
        (
            {"rope_scaling_type": "ntk"},
            r"--rope_scaling_type ntk is unknown; choose from \['default'",
        ),
        ({"rope_scaling_type": "yarn"}, r"yarn needs --rope_scaling_factor, for example 4"),
        (
            {"rope_scaling_type": "linear", "rope_scaling_factor": 0.5},
            r"--rope_scaling_factor 0.5 must be at least 1",
        ),
        ({"rope_scaling_factor": 4}, r"--rope_scaling_factor 4 needs --rope_scaling_type"),
        (
            {"model_max_position_embeddings": 512},
            r"--model_max_position_embeddings 512 is less than --seq-length 4096",
        ),
    ],
)
def test_bad_values_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        apply_rope_settings(make_config("llama"), row_length=4 * LENGTH, **flags)
