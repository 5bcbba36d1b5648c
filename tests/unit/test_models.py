"""Hugging Face models with the engines' attention: four families, both modes, both anchor placements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    masking_utils,
)

from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.integrations.models import attention_heads, check_layers, set_attention
from anchor_context.memory.estimate import ModelSizes
from tests.model_coverage import tiny_model as tiny_model_of

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 128,
}
FAMILIES = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config]
ANCHOR = 1
LENGTHS = [9, 1, 20, 17]  # documents without their anchors


def tiny_model(family, **changes):
    torch.manual_seed(0)
    config = family(**SHAPE | changes)
    return AutoModelForCausalLM.from_config(config).double()


def attend(name: str):
    return make_engine(name, device=torch.device("cpu"), dtype=torch.float64).attend


def placed(placement: str) -> dict:
    """The same documents in both placements, at the same positions; where their tokens lie."""
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(2, 50, (n,), generator=generator) for n in LENGTHS]
    anchor = torch.tensor([ANCHOR])
    if placement == "shared":
        pieces, starts = [anchor, *documents], np.cumsum([0, 1, *LENGTHS[:-1]])
        is_token = torch.arange(1 + sum(LENGTHS)) > 0
    else:
        pieces = [torch.cat([anchor, document]) for document in documents]
        starts = np.cumsum([0, *(n + 1 for n in LENGTHS[:-1])])
        is_token = ~torch.isin(torch.arange(sum(LENGTHS) + len(LENGTHS)), torch.tensor(starts))
    input_ids = torch.cat(pieces)[None]
    layout = make_layout(
        starts,
        batch_size=1,
        row_length=input_ids.shape[1],
        pattern="anchor",
        anchor_placement=placement,
    )
    positions = torch.zeros_like(input_ids)
    positions[:, is_token] = torch.arange(1, 1 + sum(LENGTHS))
    return {
        "input_ids": input_ids,
        "position_ids": positions,
        "layout": layout,
        "is_token": is_token,
    }


def logits(model, batch) -> torch.Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "layout")}
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_anchor_placements_agree_on_document_tokens(family):
    model = (
        tiny_model(family, sliding_window=None) if family is MistralConfig else tiny_model(family)
    )
    results = {}
    for placement, engine in [
        ("per_document", "flash"),
        ("per_document", "flex"),
        ("shared", "flex"),
    ]:
        set_attention(model, attend(engine))
        batch = placed(placement)
        results[placement, engine] = logits(model, batch)[:, batch["is_token"]]
    expected = results.pop(("per_document", "flash"))
    assert expected.std() > 0.01, "the case is vacuous"
    for result in results.values():
        assert torch.allclose(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ["flash", "flex"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_is_the_same_in_every_mode(family, engine):
    """Upstream dropped boundaries in eval() and without gradient checkpointing."""
    model = tiny_model(family)
    set_attention(model, attend("reference"))
    batch = placed("per_document")
    expected = logits(model, batch)
    gradients = {}
    set_attention(model, attend(engine))
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        for training in (False, True):
            model.train(training)
            assert torch.allclose(logits(model, batch), expected, rtol=0, atol=1e-12)
        model.zero_grad()
        logits(model, batch).square().sum().backward()
        gradients[checkpointing] = [p.grad.clone() for p in model.parameters()]
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        assert torch.allclose(plain, recomputed, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_makes_no_mask_and_looks_for_no_packed_rows(family, monkeypatch):
    """Its look at `position_ids` waits for the device, at every forward."""
    model = tiny_model(family)
    seen = []

    def dense(q, k, v, layout, **settings):
        seen.append(settings)
        return attend("reference")(q, k, v, layout, **settings)

    def unwanted(*args, **kwargs):
        raise AssertionError("a mask, or what a mask is made of")

    set_attention(model, dense)
    masks = dict.fromkeys(AttentionMaskInterface._global_mapping, unwanted)
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", masks)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", unwanted)
    logits(model, placed("per_document"))
    assert len(seen) == model.config.num_hidden_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_do_not_leak_and_the_anchor_reaches_all(family):
    model = tiny_model(family)
    set_attention(model, attend("flex"))
    batch = placed("shared")
    before = logits(model, batch)
    second_document = slice(1 + LENGTHS[0], 1 + LENGTHS[0] + LENGTHS[1])
    changed = dict(batch, input_ids=batch["input_ids"].clone())
    changed["input_ids"][:, second_document] = 49 - changed["input_ids"][:, second_document] + 2
    differs = (logits(model, changed) - before).abs().amax(-1)[0] > 1e-12
    assert differs[second_document].all()
    differs[second_document] = False
    assert not differs.any()
    changed = dict(batch, input_ids=batch["input_ids"].clone())
    changed["input_ids"][:, 0] = 7
    assert ((logits(model, changed) - before).abs().amax(-1) > 1e-12).all()


def test_a_call_without_a_layout_is_an_error_not_plain_attention():
    model = tiny_model(LlamaConfig)
    set_attention(model, attend("flash"))
    with pytest.raises(ValueError, match="layout=DocumentLayout"):
        model(input_ids=torch.ones(1, 8, dtype=torch.long))


def test_a_sliding_window_reaches_the_engine():
    batch = placed("per_document")
    model = tiny_model(MistralConfig, sliding_window=4)
    set_attention(model, attend("reference"))
    windowed = logits(model, batch)
    for engine in ("flash", "flex"):
        set_attention(model, attend(engine))
        assert torch.allclose(windowed, logits(model, batch), rtol=0, atol=1e-12)
    model.config.sliding_window = None
    assert not torch.allclose(windowed, logits(model, batch), rtol=0, atol=1e-6)


def test_a_model_of_other_layers_is_refused():
    config = Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"])
    with pytest.raises(ValueError, match="layers of the kind conv"):
        check_layers(config)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (Gemma3TextConfig, {"use_bidirectional_attention": True}),  # EmbeddingGemma
        (BertConfig, {"is_decoder": False}),
    ],
)
def test_a_model_that_looks_ahead_is_refused_not_made_causal(family, changes):
    model, batch = tiny_model(family, **changes), placed("shared")
    set_attention(model, attend("flex"))
    with pytest.raises(ValueError, match="lets tokens see later ones"):
        logits(model, batch)


def test_saved_models_carry_no_trace(tmp_path):
    model = tiny_model(LlamaConfig)
    set_attention(model, attend("flash"))
    model.save_pretrained(tmp_path)
    assert "anchor_context" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.shape == (1, 8, 50)


def test_where_layers_differ_in_their_heads_the_largest_count():
    """Gemma 4, whose configuration transformers refuses to read as if it were that of every layer."""
    for family, found in (
        ("llama", {"heads": 4, "kv_heads": 2, "head_dim": 8}),
        ("gpt_neox", {"heads": 4, "kv_heads": 4, "head_dim": 8}),
        ("deepseek_v3", {"heads": 4, "kv_heads": 4, "head_dim": 16}),
        ("gemma4_text", {"heads": 4, "kv_heads": 2, "head_dim": 16}),
    ):
        model = tiny_model_of(family, window=64)
        assert attention_heads(model.config) == found, family
        sizes = ModelSizes.of(model)
        assert {name: getattr(sizes, name) for name in found} == found, family
