"""Tensors of more than 2³¹ elements, against the same computed in parts: attention, and what surrounds it.

    python -m pytest tests/gpu -m large

One after the other, on a GPU of 80 GB: each holds tens of gigabytes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from anchor_context.attention.kernels import KERNELS, Spans, large
from anchor_context.layout import IGNORE_INDEX
from anchor_context.loss import liger_available, liger_loss, tiled_loss

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
ELEMENTS = 2**31
needs_liger = pytest.mark.skipif(
    not liger_available(CUDA),
    reason="liger-kernel is not installed (pip install liger-kernel==0.8.5)",
)
pytestmark = pytest.mark.large
CUDA_KERNELS = [name for name, k in KERNELS.items() if k.unavailable(torch.device("cpu"), BF16)]


@pytest.fixture(autouse=True)
def whole_gpu():
    free = torch.cuda.get_device_properties(CUDA).total_memory / 2**30
    if free < 75:
        pytest.skip(f"needs 75 GiB, and the GPU has {free:.0f}")
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(params=CUDA_KERNELS)
def kernel(request):
    chosen = KERNELS[request.param]
    if reason := chosen.unavailable(CUDA, BF16, 128):
        pytest.skip(reason)
    return chosen


def random(*shape: int) -> Tensor:
    """Made a part at a time: a random generator's own kernels are not what is tested."""
    x = torch.empty(shape, dtype=BF16, device=CUDA)
    for part in x.split(2**16):
        part.normal_()
    return x


def differs(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


# --------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (32, 4, 64)])
def test_documents(kernel, heads, kv_heads, head_dim):
    """Documents of up to 2,100 tokens, split between documents; each of some is computed alone again."""
    rng, lengths = np.random.default_rng(0), []
    while sum(lengths) * heads * head_dim <= ELEMENTS:
        lengths.append(int(rng.integers(1, 2100)))
    edges = np.cumsum([0, *lengths])
    tokens = int(edges[-1])
    q, dout = random(tokens, heads, head_dim), random(tokens, heads, head_dim)
    k, v = random(tokens, kv_heads, head_dim), random(tokens, kv_heads, head_dim)
    assert q.numel() > ELEMENTS
    spans = as_spans(edges, edges)
    settings = {"causal": True, "scale": head_dim**-0.5, "window": None}
    out, lse = kernel.forward(q, k, v, spans, **settings)
    gradients = kernel.backward(dout, q, k, v, out, lse, spans, **settings)
    for document in {0, 1, len(lengths) // 2, len(lengths) - 2, len(lengths) - 1}:
        here = slice(int(edges[document]), int(edges[document + 1]))
        alone = as_spans(*[np.array([0, lengths[document]])] * 2)
        own = [x[here].contiguous() for x in (dout, q, k, v)]
        expected, expected_lse = kernel.forward(*own[1:], alone, **settings)
        assert differs(out[here], expected) < 1e-3
        assert (lse[:, here] - expected_lse).abs().max().item() < 1e-4
        parts = kernel.backward(*own, expected, expected_lse, alone, **settings)
        for ours, theirs in zip(gradients, parts, strict=True):
            assert differs(ours[here], theirs) < 3e-3


@pytest.mark.parametrize("kv_heads", [8, 1])
def test_a_single_span(kernel, kv_heads):
    """One rectangle, too large with all of its heads: split between heads, and within a group of them."""
    heads, head_dim, keys = 32, 64, 100
    tokens = ELEMENTS // (heads * head_dim) + 1000
    q, dout = random(tokens, heads, head_dim), random(tokens, heads, head_dim)
    k, v = random(keys, kv_heads, head_dim), random(keys, kv_heads, head_dim)
    spans = as_spans(np.array([0, tokens]), np.array([0, keys]))
    settings = {"causal": False, "scale": head_dim**-0.5, "window": None}
    out, lse = kernel.forward(q, k, v, spans, **settings)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, spans, **settings)

    sums = [torch.zeros(keys, kv_heads, head_dim, device=CUDA) for _ in range(2)]
    for start in range(0, tokens, 2**17):  # the same in parts of the queries
        here = slice(start, min(start + 2**17, tokens))
        part = as_spans(np.array([0, here.stop - start]), np.array([0, keys]))
        own = [x[here].contiguous() for x in (dout, q)]
        expected, expected_lse = kernel.forward(own[1], k, v, part, **settings)
        assert differs(out[here], expected) < 1e-3
        assert (lse[:, here] - expected_lse).abs().max().item() < 1e-4
        parts = kernel.backward(*own, k, v, expected, expected_lse, part, **settings)
        assert differs(dq[here], parts[0]) < 3e-3
        for total, found in zip(sums, parts[1:], strict=True):
            total += found
    assert differs(dk, sums[0]) < 1e-2 and differs(dv, sums[1]) < 1e-2


def as_spans(edges_q: np.ndarray, edges_k: np.ndarray) -> Spans:
    edges = (torch.from_numpy(e).to(CUDA, torch.int32) for e in (edges_q, edges_k))
    return Spans(*edges, int(np.diff(edges_q).max()), int(np.diff(edges_k).max()))


def test_the_limit_is_not_met_by_accident():
    tokens, spans = ELEMENTS // (32 * 64), 500
    assert large.elements(tokens=tokens, spans=spans, heads=32, head_dim=64) > large.LIMIT


# --------------------------------------------------------------------------------------------------
# What a token goes through beside attention: PyTorch's operations and Liger's kernels, forward and backward.
# None looks at another token, so the last rows alone must come out the same.

LAST = 5000
"""Tokens at the end that are computed again alone: beyond 2³¹ elements, all of them."""


def check_last_rows(
    compute: Callable[[Tensor], Tensor], *, width: int, weights: tuple[Tensor, ...] = ()
) -> None:
    """`compute`, (tokens, width) -> (tokens, …), on all rows and on the last alone. Only these have a
    gradient, so that the weights' gradients are the same as well."""
    tokens = ELEMENTS // width + 2 * LAST
    x = random(tokens, width).requires_grad_()
    out = compute(x)
    assert x.numel() > ELEMENTS
    gradient = torch.zeros_like(out)
    last_gradient = random(LAST, *out.shape[1:])
    gradient[-LAST:] = last_gradient
    out.backward(gradient)  # which Liger may overwrite
    dx, found = x.grad[-LAST:].clone(), [w.grad.clone() for w in weights]
    rest = x.grad[:-LAST]
    assert all(part.eq(0).all() for part in rest.split(2**17))
    last_out = out.detach()[-LAST:].clone()
    last = x.detach()[-LAST:].clone().requires_grad_()
    del x, out, gradient, rest
    for weight in weights:
        weight.grad = None
    alone = compute(last)
    alone.backward(last_gradient)
    assert differs(last_out, alone.detach()) < 1e-3
    assert differs(dx, last.grad) < 1e-3
    for ours, weight in zip(found, weights, strict=True):
        assert differs(ours, weight.grad) < 1e-2


def liger(name: str) -> type:
    import liger_kernel.transformers as library

    return getattr(library, name)


@pytest.mark.parametrize(
    ("library", "width"),
    [("torch", 2048), *[pytest.param("liger", w, marks=needs_liger) for w in (2048, 128)]],
)
def test_norms(library, width):
    """128 is the width of the norms of queries and keys, a row for each token and head."""
    make = LlamaRMSNorm if library == "torch" else liger("LigerRMSNorm")
    norm = make(width).to(CUDA, BF16)
    check_last_rows(norm, width=width, weights=tuple(norm.parameters()))


@pytest.mark.parametrize("library", ["torch", pytest.param("liger", marks=needs_liger)])
def test_gates(library):
    """SiLU(gate) × up, the widest tensors of a step: 262,144 tokens × 8,192."""
    if library == "torch":
        compute = lambda x: nn.functional.silu(x) * x.flip(-1)  # noqa: E731
    else:
        from liger_kernel.ops import LigerSiLUMulFunction

        # It writes its gradients over its inputs.
        compute = lambda x: LigerSiLUMulFunction.apply(x.clone(), x.flip(-1))  # noqa: E731
    check_last_rows(compute, width=8192)


@pytest.mark.parametrize("library", ["torch", pytest.param("liger", marks=needs_liger)])
def test_rotations(library):
    """Queries of 32 heads of 64, over keys of 8."""
    rotate = apply_rotary_pos_emb if library == "torch" else liger("liger_rotary_pos_emb")
    config = LlamaConfig(hidden_size=2048, num_attention_heads=32, num_key_value_heads=8)
    rotary = LlamaRotaryEmbedding(config).to(CUDA)

    def compute(x: Tensor) -> Tensor:
        # The last tokens have the same positions, whole or alone.
        positions = (torch.arange(len(x), device=CUDA) - len(x) + 2 * LAST).clamp(min=0)
        cos, sin = rotary(x[:1, :1], positions[None])
        q = x.unflatten(1, (32, 64)).clone()[None].transpose(1, 2)
        k = q[:, :8].clone(memory_format=torch.contiguous_format)
        q, _ = rotate(q, k, cos, sin)
        return q.transpose(1, 2)[0].flatten(1)

    check_last_rows(compute, width=2048)


def test_projections():
    """cuBLAS, into an MLP and out of it; a narrow one, so that its input and output alone are large."""
    mlp = LlamaMLP(LlamaConfig(hidden_size=2048, intermediate_size=256, hidden_act="silu"))
    mlp = mlp.to(CUDA, BF16)
    check_last_rows(mlp, width=2048, weights=tuple(mlp.parameters()))


@pytest.mark.parametrize("library", ["tiled", pytest.param("liger", marks=needs_liger)])
def test_losses(library):
    """Hidden states of more than 2³¹ elements, with targets among the last tokens alone."""
    compute = {"tiled": tiled_loss, "liger": liger_loss}[library]
    head = nn.Linear(2048, 512, bias=False).to(CUDA, BF16)
    tokens = ELEMENTS // 2048 + 2 * LAST
    hidden = random(tokens, 2048)
    labels = torch.full((tokens,), IGNORE_INDEX, device=CUDA)
    labels[-LAST:] = torch.randint(512, (LAST,), device=CUDA)
    found = []
    for cut in (slice(None), slice(-LAST, None)):
        head.zero_grad()
        leaf = hidden[cut].clone().requires_grad_()
        loss = compute(leaf, head, labels[cut])
        loss.backward()
        found.append([loss.detach(), leaf.grad[-LAST:].clone(), head.weight.grad.clone()])
        del leaf
    for whole, alone in zip(*found, strict=True):
        assert differs(whole, alone) < 1e-2
