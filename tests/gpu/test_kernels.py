"""The CUDA kernels against the dense float64 reference: outputs, gradients, grouped heads, windows."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from anchor_context.attention import flash, flex, reference
from anchor_context.attention.kernels import KERNELS
from anchor_context.attention.patterns import make_layout
from tests.ring_in_threads import LAYOUTS, errors_of_ring, layout_of

CUDA = torch.device("cuda")
ROW, HEAD_DIM = 384, 64
BF16_ERROR = 1e-2  # bfloat16 keeps 8 bits; a wrong mask is off by more than a tenth
PLACED_PATTERNS = [
    ("anchor", "per_document"),
    ("anchor", "shared"),
    ("intra_doc", "none"),
    ("intra_doc_reset", "none"),
    ("full", "none"),
]
LENGTHS = [[384], [1, 130, 53, 200], [2] * 192]
"""Documents of each row: one, four across block edges, many."""


def make(*, rows: list[list[int]], pattern: str, placement: str):
    starts = []
    for row, lengths in enumerate(rows):
        edges = np.cumsum([0, *lengths[:-1]])
        if placement == "shared":
            edges = np.union1d(edges, [1])
        starts += list(edges + row * ROW)
    return make_layout(
        np.array(starts),
        batch_size=len(rows),
        row_length=ROW,
        pattern=pattern,
        anchor_placement=placement,
    )


def qkv(batch_size: int, *, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q of 4 heads over k and v of 2, as a model's projections give them, and the output's gradient."""
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int) -> torch.Tensor:
        x = torch.randn(batch_size, ROW, heads, HEAD_DIM, generator=generator)
        return x.to(CUDA, dtype).transpose(1, 2)

    return [tensor(4), tensor(2), tensor(2)], tensor(4)


def run(attend, inputs, grad, layout, dtype, **settings) -> list[torch.Tensor]:
    """[out, dq, dk, dv]."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out = attend(*leaves, layout, scale=HEAD_DIM**-0.5, **settings)
    out.backward(grad.to(dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check(attend, *, layout, dtype: torch.dtype, bound: float, window: int | None = None) -> None:
    inputs, grad = qkv(layout.batch_size, dtype=dtype)
    layout = layout.to(CUDA)
    expected = run(reference.attend, inputs, grad, layout, torch.float64, sliding_window=window)
    got = run(attend, inputs, grad, layout, dtype, sliding_window=window)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert ours.dtype == dtype
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert error < bound, (name, error)


@pytest.fixture(autouse=True)
def compile_anew():
    """PyTorch compiles one function for 8 kinds of masks and shapes, and no more."""
    torch._dynamo.reset()


@pytest.fixture(params=["flash_attn", "torch_varlen"])
def kernel(request):
    chosen = KERNELS[request.param]
    if reason := chosen.unavailable(CUDA, torch.bfloat16):
        pytest.skip(reason)
    return chosen


@pytest.mark.parametrize("rows", [LENGTHS[:1], LENGTHS[1:2], LENGTHS], ids=["one", "four", "batch"])
@pytest.mark.parametrize(("pattern", "placement"), [p for p in PLACED_PATTERNS if p[1] != "shared"])
def test_flash_kernels_agree_with_the_reference(kernel, pattern, placement, rows):
    layout = make(rows=rows, pattern=pattern, placement=placement)
    check(
        partial(flash.attend, kernel=kernel), layout=layout, dtype=torch.bfloat16, bound=BF16_ERROR
    )


@pytest.mark.parametrize("window", [7, 100])
@pytest.mark.parametrize("pattern", ["full", "intra_doc"])
def test_flash_kernels_honour_a_window(kernel, pattern, window):
    layout = make(rows=LENGTHS[:2], pattern=pattern, placement="none")
    check(
        partial(flash.attend, kernel=kernel),
        layout=layout,
        dtype=torch.bfloat16,
        bound=BF16_ERROR,
        window=window,
    )


@pytest.mark.parametrize("documents", LAYOUTS)
@pytest.mark.parametrize("pattern", ["anchor", "full"])
def test_a_ring_of_four_ranks_agrees_with_the_reference(kernel, pattern, documents):
    """Rectangles, some of a single query, merged by log-sum-exp; every rank a thread on this GPU."""
    errors = errors_of_ring(
        layout_of(documents, pattern=pattern), kernel, ranks=4, device=CUDA, dtype=torch.bfloat16
    )
    assert max(errors.values()) < BF16_ERROR, errors


def test_flash_attn_and_pytorch_s_kernel_agree():
    if reason := KERNELS["flash_attn"].unavailable(CUDA, torch.bfloat16):
        pytest.skip(reason)
    layout = make(rows=LENGTHS, pattern="anchor", placement="per_document").to(CUDA)
    inputs, grad = qkv(3, dtype=torch.bfloat16)
    ours, theirs = (
        run(partial(flash.attend, kernel=KERNELS[name]), inputs, grad, layout, torch.bfloat16)
        for name in ("flash_attn", "torch_varlen")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 5e-3


BF16, FLOAT32 = (torch.bfloat16, BF16_ERROR), (torch.float32, 1e-3)  # Triton may multiply in TF32


@pytest.mark.parametrize(
    ("pattern", "placement", "window", "precision"),
    [(*placed, None, BF16) for placed in PLACED_PATTERNS]
    + [("anchor", "shared", 100, BF16), ("full", "none", 100, BF16)]
    + [("anchor", "shared", None, FLOAT32)],
)
def test_compiled_flex_agrees_with_the_reference(pattern, placement, window, precision):
    """Each case compiles a forward and a backward, which takes longer than all else here."""
    dtype, bound = precision
    layout = make(rows=LENGTHS, pattern=pattern, placement=placement)
    check(flex.make_attend(), layout=layout, dtype=dtype, bound=bound, window=window)
