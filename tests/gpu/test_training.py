"""Training on one GPU: Liger's loss and kernels, checkpointing, offload and tiles against the plain model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Glm4Config, LlamaConfig, LlamaForCausalLM

from anchor_context import loss as loss_module
from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.integrations.models import set_attention
from anchor_context.layout import IGNORE_INDEX
from anchor_context.loss import CausalLMWithLoss, liger_available, liger_loss, tiled_loss
from anchor_context.memory import treatments
from anchor_context.memory.liger import apply_liger
from anchor_context.memory.treatments import TreatedModel, Treatment
from anchor_context.parallel.groups import make_grid
from anchor_context.parallel.shard import shard_batch
from anchor_context.run.device import peak_flops, peak_memory_bytes

CUDA = torch.device("cuda")
ROW, VOCABULARY = 512, 1000
NOTHING = Treatment()
needs_liger = pytest.mark.skipif(
    not liger_available(CUDA),
    reason="liger-kernel is not installed (pip install liger-kernel==0.8.5)",
)


def model_and_batch(treatment: Treatment, *, dtype: torch.dtype, liger: bool = False):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    model = LlamaForCausalLM(config).to(CUDA, dtype).train()
    # float32 needs the engine that computes in it.
    engine = make_engine(
        "flash" if dtype == torch.bfloat16 else "reference", device=CUDA, dtype=dtype
    )
    set_attention(model, engine.attend)
    treat(model, treatment, tokens=2 * ROW, liger=liger)
    layout = make_layout(
        np.array([0, 100, ROW, ROW + 77, ROW + 400]),
        batch_size=2,
        row_length=ROW,
        pattern="anchor",
        anchor_placement="per_document",
    ).to(CUDA)
    tokens = torch.randint(VOCABULARY, (2, ROW), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(CUDA)
    labels = tokens.roll(-1, 1)
    labels[:, ::7] = IGNORE_INDEX
    batch = {
        "input_ids": tokens,
        "labels": labels,
        "position_ids": layout.position_ids,
        "layout": layout,
    }
    return CausalLMWithLoss(model, liger_loss if liger else tiled_loss), batch


def treat(model, treatment: Treatment, *, tokens: int, liger: bool = False) -> None:
    if liger:
        apply_liger(model)
    offload_tokens = tokens if treatment.offload else 0
    treated = TreatedModel(model, tiles=treatment.tiled_mlp, offload_tokens=offload_tokens)
    treated(treatment, tokens)


def loss_and_gradients(treatment: Treatment, *, dtype: torch.dtype, liger: bool = False):
    model, batch = model_and_batch(treatment, dtype=dtype, liger=liger)
    loss_sum, count = model(**batch)
    (loss_sum * 0.3 / count).backward()
    return (loss_sum / count).item(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("liger", [False, pytest.param(True, marks=needs_liger)])
@pytest.mark.parametrize(
    "treatment",
    [
        Treatment(),
        Treatment(1),
        Treatment(2),
        Treatment(1, offload=True),
        Treatment(tiled_mlp=True),
        Treatment(1, offload=True, tiled_mlp=True),
    ],
    ids=str,
)
def test_a_treatment_changes_no_loss_and_no_gradient(treatment, liger, monkeypatch):
    monkeypatch.setattr(treatments, "TILE_TOKENS", 300)
    loss, gradients = loss_and_gradients(NOTHING, dtype=torch.float32)
    planned_loss, planned = loss_and_gradients(treatment, dtype=torch.float32, liger=liger)
    assert planned_loss == pytest.approx(loss, rel=1e-5)
    # Triton may multiply float32 as TF32 in Liger's kernels.
    bound = 5e-3 if liger else 1e-5
    for name, want in gradients.items():
        assert ((planned[name] - want).norm() / want.norm()).item() < bound, name


@needs_liger
@pytest.mark.parametrize("family", [LlamaConfig, Glm4Config])
def test_liger_rotates_as_the_family_does(family):
    """GLM-4 turns neighbouring entries together, LLaMA the two halves."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = family(**sizes, **heads, vocab_size=VOCABULARY, pad_token_id=0)
    tokens = torch.randint(VOCABULARY, (1, ROW), device=CUDA)
    logits = []
    for liger in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(CUDA)
        treat(model, NOTHING, tokens=ROW, liger=liger)
        with torch.no_grad():
            logits.append(model(tokens, use_cache=False).logits)
    assert ((logits[1] - logits[0]).norm() / logits[0].norm()).item() < 5e-3


@needs_liger
@pytest.mark.parametrize("targets", [True, False])
def test_liger_s_loss_is_the_tiled_loss(targets, monkeypatch):
    monkeypatch.setattr(loss_module, "TILE_ENTRIES", 7 * VOCABULARY)
    torch.manual_seed(0)
    head = torch.nn.Linear(64, VOCABULARY, bias=False).to(CUDA)
    labels = torch.randint(VOCABULARY, (100,), device=CUDA)
    labels[::3] = IGNORE_INDEX
    if not targets:
        labels[:] = IGNORE_INDEX
    found = []
    for compute in (tiled_loss, liger_loss):
        head.zero_grad()
        hidden = torch.randn(
            100, 64, device=CUDA, generator=torch.Generator(CUDA).manual_seed(2)
        ).requires_grad_()
        loss = compute(hidden, head, labels)
        (loss * 0.037).backward()
        found.append((loss.detach(), hidden.grad, head.weight.grad.clone()))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * ours.norm() + 1e-12


def test_a_short_bf16_run_learns():
    model, batch = model_and_batch(Treatment(1), dtype=torch.bfloat16, liger=liger_available(CUDA))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        loss_sum, count = model(**batch)
        loss = loss_sum / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(VOCABULARY), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("treatment", [NOTHING, Treatment(1)], ids=str)
def test_forward_and_backward_never_wait_for_the_device(treatment):
    """With the flash engine and the tiled loss; Liger's waits, as `loss.py` says."""
    model, batch = model_and_batch(treatment, dtype=torch.bfloat16)
    on_host = {key: value.to("cpu").pin_memory() for key, value in batch.items()}

    def step() -> None:
        here = {key: value.to(CUDA, non_blocking=True) for key, value in on_host.items()}
        loss_sum, count = model(**here)
        (loss_sum * (0.3 / count)).backward()

    step()  # libraries start up at their first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            batch["labels"].sum().item()  # the mode sees a wait
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("ring_degree", [1, 2])
def test_the_loader_s_batches_are_pinned_with_their_layouts(ring_degree):
    _, batch = model_and_batch(NOTHING, dtype=torch.bfloat16)
    batch = {key: value.to("cpu") for key, value in batch.items()}
    grid = make_grid(rank=0, world_size=ring_degree, ring_degree=ring_degree, ulysses_degree=1)
    batches = [shard_batch(batch, grid=grid)]
    (pinned,) = DataLoader(batches, batch_size=None, pin_memory=True)
    layout = pinned.pop("layout")
    assert all(tensor.is_pinned() for tensor in pinned.values())
    assert layout.cu_seqlens.is_pinned() and layout.document_ids.is_pinned()
    if ring_degree > 1:
        schedule = layout.schedule_of(None)
        assert schedule.causal.cu_seqlens_q.is_pinned()
        # An empty tensor has no memory to pin: in the first exchange a rank sends itself nothing.
        sends = [e.send for e in schedule.exchanges if e.send.numel()]
        assert sends and all(send.is_pinned() for send in sends)


def test_bf16_follows_float32():
    exact, _ = loss_and_gradients(NOTHING, dtype=torch.float32)
    rounded, _ = loss_and_gradients(NOTHING, dtype=torch.bfloat16)
    assert rounded == pytest.approx(exact, rel=1e-2)


def test_offloaded_checkpoints_leave_the_gpu():
    """A long row: what a step holds on the GPU, over the weights."""

    def peak(treatment: Treatment) -> int:
        torch.cuda.empty_cache()
        model, batch = model_and_batch(treatment, dtype=torch.bfloat16)
        long = {
            "input_ids": batch["input_ids"][:1].repeat(1, 64),
            "labels": batch["labels"][:1].repeat(1, 64),
        }
        row = long["input_ids"].shape[1]
        layout = make_layout(
            np.arange(0, row, 1024),
            batch_size=1,
            row_length=row,
            pattern="anchor",
            anchor_placement="per_document",
        ).to(CUDA)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_sum, _ = model(**long, position_ids=layout.position_ids, layout=layout)
        loss_sum.backward()
        return peak_memory_bytes(CUDA) - before

    none, full, offload = peak(NOTHING), peak(Treatment(1)), peak(Treatment(1, offload=True))
    assert offload < full < none


def test_the_meters_know_this_device():
    assert peak_memory_bytes(CUDA) > 0
    assert peak_flops(CUDA) is None or peak_flops(CUDA) > 1e13
