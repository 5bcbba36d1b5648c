"""The tiled loss: exact sums, gradients that scale, tied embeddings, ranks without targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM

from anchor_context import loss as loss_module
from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.layout import IGNORE_INDEX
from anchor_context.loss import CausalLMWithLoss, check_head
from anchor_context.models import set_attention

TOKENS = 48


def model_and_batch(*, tied: bool, targets: bool = True):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    engine = make_engine("flash", device=torch.device("cpu"), dtype=torch.float32)
    set_attention(model, engine.attend)
    layout = make_layout(
        np.array([0, 17, 48]),
        batch_size=2,
        row_length=TOKENS,
        pattern="intra_doc",
        anchor_placement="none",
    )
    labels = torch.randint(40, (2, TOKENS))
    labels[:, ::5] = IGNORE_INDEX
    if not targets:
        labels[:] = IGNORE_INDEX
    batch = {
        "input_ids": torch.randint(40, (2, TOKENS)),
        "labels": labels,
        "position_ids": layout.position_ids,
        "layout": layout,
    }
    return model, batch


def gradients(model, loss) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("scale", [1.0, 0.037])
@pytest.mark.parametrize("tied", [False, True])
def test_tiles_equal_the_plain_loss(tied, scale, monkeypatch):
    monkeypatch.setattr(
        loss_module, "TILE_ENTRIES", 40 * 7
    )  # 7 tokens: 14 tiles, the last one short
    model, batch = model_and_batch(tied=tied)
    loss_sum, count = CausalLMWithLoss(model, fused=False)(**batch)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "layout")}
    logits = model(**inputs, use_cache=False).logits
    expected = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    assert count == (batch["labels"] != IGNORE_INDEX).sum() > 0
    assert torch.allclose(loss_sum, expected, rtol=1e-6, atol=0)
    for got, want in zip(
        gradients(model, loss_sum * scale), gradients(model, expected * scale), strict=True
    ):
        assert ((got - want).norm() / want.norm()).item() < 1e-5


def test_a_rank_without_targets_gives_zero_and_zero_gradients():
    model, batch = model_and_batch(tied=False, targets=False)
    loss_sum, count = CausalLMWithLoss(model, fused=False)(**batch)
    assert loss_sum == 0 and count == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(model, loss_sum))


def test_no_logits_of_the_whole_row_exist(monkeypatch):
    monkeypatch.setattr(loss_module, "TILE_ENTRIES", 40 * 7)
    model, batch = model_and_batch(tied=False)
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    loss_sum, _ = CausalLMWithLoss(model, fused=False)(**batch)
    loss_sum.backward()
    assert max(rows) == 7 and sum(rows) == 2 * 2 * TOKENS  # forward, and once more in backward


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (Gemma2Config(), "final_logit_softcapping"),
        (GraniteConfig(logits_scaling=8.0), "logits_scaling"),
    ],
)
def test_a_head_that_does_more_is_refused(config, setting):
    with pytest.raises(ValueError, match=setting):
        check_head(config)
