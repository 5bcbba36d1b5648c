"""Rotating in float32 and rounding once, on one model instance, and undone."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from anchor_context.rope.float32 import rotate_in_float32

CONFIGS = (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
BY_KIND = (Gemma3TextConfig, Olmo3Config)
"""With RoPE frequencies for each kind of layer."""
IDS = torch.arange(96)[None] % 50
FAR = 5000 + torch.arange(96)[None]


def make_model(config_class=LlamaConfig, dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, position_ids=FAR).logits


# OLMo 3 rotates so by itself.
@pytest.mark.parametrize("config_class", (*CONFIGS, Gemma3TextConfig))
def test_bfloat16_changes_and_can_be_undone(config_class):
    model, other = make_model(config_class), make_model(config_class)
    before = logits(model)
    undo = rotate_in_float32(model)
    after = logits(model)
    assert after.dtype == torch.bfloat16
    assert not torch.equal(after, before)
    assert torch.equal(logits(other), before), "another instance changed too"
    undo()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("config_class", (*CONFIGS, *BY_KIND))
def test_float32_is_the_same(config_class):
    model = make_model(config_class, torch.float32)
    before = logits(model)
    rotate_in_float32(model)
    assert torch.equal(logits(model), before)


def test_queries_and_keys_are_those_of_float32_rounded_once():
    model = make_model()
    rotate_in_float32(model)
    layer, table = model.model.layers[0].self_attn, model.model.rotary_emb
    hidden = torch.randn(1, 96, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    seen = {}

    def attention(module, query, key, value, mask, **kwargs):
        seen.update(query=query, key=key)
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("recording", attention)
    model.config._attn_implementation = "recording"
    with torch.no_grad():
        layer(hidden, position_embeddings=table(hidden, position_ids=FAR), attention_mask=None)
        query = layer.q_proj(hidden).view(1, 96, 4, 16).transpose(1, 2).float()
        key = layer.k_proj(hidden).view(1, 96, 2, 16).transpose(1, 2).float()
        cos, sin = make_model(dtype=torch.float32).model.rotary_emb(hidden.float(), FAR)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
    assert torch.equal(seen["query"], query.bfloat16())
    assert torch.equal(seen["key"], key.bfloat16())


def test_gradients_and_checkpointing():
    model = make_model()
    rotate_in_float32(model)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, position_ids=FAR, labels=IDS).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_generation_with_a_cache():
    model = make_model()
    rotate_in_float32(model)
    with torch.no_grad():
        whole = model(IDS).logits[:, -1]
        cache = model(IDS[:, :-1], use_cache=True).past_key_values
        step = model(IDS[:, -1:], past_key_values=cache).logits[:, -1]
    assert cache.layers[0].keys.dtype == torch.bfloat16
    # Different shapes take different bfloat16 matrix kernels; an unrotated key would be far off.
    torch.testing.assert_close(step, whole, rtol=0.05, atol=0.05 * whole.abs().max().item())


def test_a_model_without_rope_is_refused():
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="cannot reach the rotation of GPT2LMHeadModel"):
        rotate_in_float32(GPT2LMHeadModel(config))
