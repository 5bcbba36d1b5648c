"""The tiled loss: exact sums, gradients that scale, tied embeddings, ranks without targets."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM

from anchor_context import loss as loss_module
from anchor_context.attention import flex
from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.layout import IGNORE_INDEX
from anchor_context.loss import CausalLMWithLoss, check_head, tiled_loss
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
    """Nor is anything as large as one tile's logits kept for the backward."""
    monkeypatch.setattr(loss_module, "TILE_ENTRIES", 300 * 7)
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    hidden = torch.randn(2 * TOKENS, 8, requires_grad=True)
    head = torch.nn.Linear(8, 300, bias=False)  # 300 × 8 entries, 96 × 300 logits in all
    with Sizes():
        tiled_loss(hidden, head, torch.randint(300, (2 * TOKENS,))).backward()
    assert max(made) == 300 * 8


@pytest.mark.parametrize("engine", ["flash", "flex"])
def test_a_step_takes_no_decision_from_a_tensor(engine):
    """On a GPU each would wait until all work before it is done."""
    decisions = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

    class NoDecision(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            by_number = function is torch.ops.aten.index.Tensor and all(
                index is None or index.dtype != torch.bool for index in args[1]
            )
            assert by_number or not decisions & set(function.tags), function
            return function(*args, **(kwargs or {}))

    model, batch = model_and_batch(tied=False)
    set_attention(
        model, make_engine(engine, device=torch.device("cpu"), dtype=torch.float32).attend
    )
    with NoDecision():
        loss_sum, count = CausalLMWithLoss(model, fused=False)(**batch)
        (loss_sum / count).backward()
        flex.block_mask(batch["layout"])  # what stands for the dense mask on CUDA
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            loss_sum.item()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_the_loss_is_the_definition_in_float64(bias, shift, monkeypatch):
    """Also for logits that would overflow without the shift by their largest."""
    monkeypatch.setattr(loss_module, "TILE_ENTRIES", 40 * 7)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 40, bias=bias)
    hidden = torch.randn(TOKENS, 16)
    hidden[:, 0] += shift
    labels = torch.randint(40, (TOKENS,))
    labels[::5] = IGNORE_INDEX

    exact_head, exact_hidden = deepcopy(head).double(), hidden.double().requires_grad_()
    exact = cross_entropy(exact_head(exact_hidden), labels, reduction="sum")
    (exact * 0.037).backward()
    hidden.requires_grad_()
    loss = tiled_loss(hidden, head, labels)
    (loss * 0.037).backward()

    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    pairs = [(hidden, exact_hidden), *zip(head.parameters(), exact_head.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert ((ours.grad - theirs.grad).norm() / theirs.grad.norm()).item() < 1e-5


def test_bfloat16_sums_in_float32(monkeypatch):
    """The loss and the head's gradient of many tiles: rounding each tile's part would lose them."""
    monkeypatch.setattr(loss_module, "TILE_ENTRIES", 40 * 4)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 40, bias=False).bfloat16()
    hidden = torch.randn(4096, 16).bfloat16().requires_grad_()
    labels = torch.randint(40, (4096,))
    exact_head, exact_hidden = deepcopy(head).double(), hidden.detach().double()
    exact = cross_entropy(exact_head(exact_hidden), labels, reduction="sum")
    exact.backward()
    loss = tiled_loss(hidden, head, labels)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    assert head.weight.grad.dtype == hidden.grad.dtype == torch.bfloat16
    error = (head.weight.grad - exact_head.weight.grad).norm() / exact_head.weight.grad.norm()
    assert error < 4e-3  # bfloat16 itself keeps 2e-3


def test_evaluation_makes_no_gradient():
    head = torch.nn.Linear(16, 40, bias=False)
    with torch.no_grad():
        loss = tiled_loss(torch.randn(8, 16), head, torch.randint(40, (8,)))
    assert not loss.requires_grad and loss > 0


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
