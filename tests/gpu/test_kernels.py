"""Every CUDA kernel that is installed against the dense float64 reference: outputs, gradients, log-sum-exps,
grouped heads, windows, rectangles. What is above 2³¹ elements is in `test_large.py`."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from anchor_context.attention import flash, flex, reference
from anchor_context.attention.kernels import KERNELS, Spans, choose_kernel, flash_attn_4, warm_up
from anchor_context.attention.patterns import PATTERNS, make_layout
from tests.ring_in_threads import LAYOUTS, errors_of_ring, layout_of

CUDA = torch.device("cuda")
ROW, HEADS, KV_HEADS, HEAD_DIM = 384, 8, 1, 64
BF16_ERROR = 1e-2  # bfloat16 keeps 8 bits; a wrong mask is off by more than a tenth
PLACED_PATTERNS = [
    (name, placement) for name, pattern in PATTERNS.items() for placement in pattern.placements
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


def qkv(
    batch_size: int, *, dtype: torch.dtype, row_length: int = ROW
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q of 8 heads over k and v of 1, as a model's projections give them, and the output's gradient."""
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int) -> torch.Tensor:
        x = torch.randn(batch_size, row_length, heads, HEAD_DIM, generator=generator)
        return x.to(CUDA, dtype).transpose(1, 2)

    return [tensor(HEADS), tensor(KV_HEADS), tensor(KV_HEADS)], tensor(HEADS)


def run(attend, inputs, grad, layout, dtype, **settings) -> list[torch.Tensor]:
    """[out, dq, dk, dv], and dsinks where there are some."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    if settings.get("sinks") is not None:
        settings["sinks"] = settings["sinks"].to(CUDA, dtype).requires_grad_()
        leaves.append(settings["sinks"])
    out = attend(*leaves[:3], layout, scale=HEAD_DIM**-0.5, **settings)
    out.backward(grad.to(dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check(
    attend, *, layout, dtype: torch.dtype, bound: float, window: int | None = None, **settings
) -> None:
    inputs, grad = qkv(layout.batch_size, dtype=dtype, row_length=layout.row_length)
    layout = layout.to(CUDA)
    settings["sliding_window"] = window
    expected = run(reference.attend, inputs, grad, layout, torch.float64, **settings)
    got = run(attend, inputs, grad, layout, dtype, **settings)
    names = ("out", "dq", "dk", "dv", "dsinks")[: len(got)]
    for name, ours, theirs in zip(names, got, expected, strict=True):
        assert ours.dtype == dtype
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert error < bound, (name, error)


@pytest.fixture(autouse=True)
def compile_anew():
    """PyTorch compiles one function for 8 kinds of masks and shapes, and no more."""
    torch._dynamo.reset()


CUDA_KERNELS = [
    name for name, k in KERNELS.items() if k.unavailable(torch.device("cpu"), torch.bfloat16)
]


@pytest.fixture(params=CUDA_KERNELS)
def kernel(request):
    chosen = KERNELS[request.param]
    if reason := chosen.unavailable(CUDA, torch.bfloat16, HEAD_DIM):
        pytest.skip(reason)
    return chosen


@pytest.mark.parametrize("rows", [LENGTHS[:1], LENGTHS[1:2], LENGTHS], ids=["one", "four", "batch"])
@pytest.mark.parametrize(("pattern", "placement"), [p for p in PLACED_PATTERNS if p[1] != "shared"])
def test_flash_kernels_agree_with_the_reference(kernel, pattern, placement, rows):
    layout = make(rows=rows, pattern=pattern, placement=placement)
    check(
        partial(flash.attend, kernel=kernel), layout=layout, dtype=torch.bfloat16, bound=BF16_ERROR
    )


@pytest.mark.parametrize("window", [2, 7, 100, 128])
@pytest.mark.parametrize(("pattern", "placement"), [p for p in PLACED_PATTERNS if p[1] != "shared"])
def test_flash_kernels_honour_a_window(kernel, pattern, placement, window):
    """And see the anchors that it hides, which is a second call, of one key for each document."""
    layout = make(rows=LENGTHS, pattern=pattern, placement=placement)
    check(
        partial(flash.attend, kernel=kernel),
        layout=layout,
        dtype=torch.bfloat16,
        bound=BF16_ERROR,
        window=window,
    )


SINKS_AND_CAPS = [
    {"sinks": torch.linspace(-1, 3, HEADS)},
    {"softcap": 1.5},
    {"sinks": torch.linspace(-1, 3, HEADS), "softcap": 1.5},
]


@pytest.mark.parametrize("settings", SINKS_AND_CAPS, ids="+".join)
def test_flash_kernels_take_sinks_and_caps(kernel, settings):
    if "softcap" in settings and (reason := kernel.no_softcap(CUDA, HEAD_DIM)):
        pytest.skip(reason)
    layout = make(rows=LENGTHS, pattern="anchor", placement="per_document")
    attend = partial(flash.attend, kernel=kernel)
    check(attend, layout=layout, dtype=torch.bfloat16, bound=BF16_ERROR, **settings)


@pytest.mark.parametrize("settings", SINKS_AND_CAPS, ids="+".join)
def test_flex_takes_sinks_and_caps(settings):
    layout = make(rows=LENGTHS, pattern="anchor", placement="shared")
    attend = flex.make_attend()
    check(attend, layout=layout, dtype=torch.bfloat16, bound=BF16_ERROR, **settings)


@pytest.mark.parametrize("window", [None, 7, 128])
@pytest.mark.parametrize("documents", LAYOUTS)
@pytest.mark.parametrize("pattern", ["anchor", "full"])
def test_a_ring_of_four_ranks_agrees_with_the_reference(kernel, pattern, documents, window):
    """Rectangles, some of a single query, and what a window leaves of them: rectangles, triangles read
    backwards and single anchors, all merged by log-sum-exp; every rank a thread on this GPU."""
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64}  # of `errors_of_ring`
    # One thread compiles for all.
    windows = {None, window}
    warm_up(kernel, device=CUDA, dtype=torch.bfloat16, **shape, windows=windows, rectangles=True)
    errors = errors_of_ring(
        layout_of(documents, pattern=pattern),
        kernel,
        ranks=4,
        device=CUDA,
        dtype=torch.bfloat16,
        window=window,
    )
    assert max(errors.values()) < BF16_ERROR, errors


def test_the_libraries_and_pytorch_s_kernel_agree(kernel):
    layout = make(rows=LENGTHS, pattern="anchor", placement="per_document").to(CUDA)
    inputs, grad = qkv(3, dtype=torch.bfloat16)
    ours, theirs = (
        run(partial(flash.attend, kernel=k), inputs, grad, layout, torch.bfloat16)
        for k in (kernel, KERNELS["torch_varlen"])
    )
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 5e-3


@pytest.mark.parametrize("window", [None, 2, 100, 128])
def test_documents_about_as_long_as_a_tile(kernel, window):
    layout = make_layout(
        np.cumsum([0, 1, 127, 128]),
        batch_size=1,
        row_length=1 + 127 + 128 + 129,
        pattern="intra_doc",
        anchor_placement="none",
    )
    check(
        partial(flash.attend, kernel=kernel),
        layout=layout,
        dtype=torch.bfloat16,
        bound=BF16_ERROR,
        window=window,
    )


def test_a_hidden_anchor_takes_no_host_s_wait(kernel):
    """Which tokens an anchor is hidden from, the device alone knows."""
    layout = make(rows=LENGTHS, pattern="anchor", placement="per_document").to(CUDA)
    inputs, grad = qkv(3, dtype=torch.bfloat16)
    attend = partial(flash.attend, kernel=kernel)
    run(
        attend, inputs, grad, layout, torch.bfloat16, sliding_window=100
    )  # compiles what it compiles
    leaves = [x.to(CUDA).requires_grad_() for x in inputs]
    grad = grad.to(CUDA)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*leaves, layout, scale=HEAD_DIM**-0.5, sliding_window=100).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_documents_than_a_specialisation_takes(kernel):
    """Some libraries look documents up in another way from some number on (256 in FlashAttention-4)."""
    layout = make(rows=[[1] * 200 + [184], [2] * 192], pattern="intra_doc", placement="none")
    assert len(layout.cu_seqlens) > flash_attn_4.MANY_SPANS
    check(
        partial(flash.attend, kernel=kernel), layout=layout, dtype=torch.bfloat16, bound=BF16_ERROR
    )


def rectangles(queries: list[int], keys: list[int], *, heads: int, kv_heads: int):
    """(q, k, v, dout) in bfloat16 and the spans."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(tokens, number, HEAD_DIM, generator=generator).to(CUDA, torch.bfloat16)
        for number, tokens in ((heads, sum(queries)), *[(kv_heads, sum(keys))] * 2)
    ]
    tensors.append(torch.randn(tensors[0].shape, generator=generator).to(tensors[0]))
    edges = [np.cumsum([0, *lengths]) for lengths in (queries, keys)]
    edges = [torch.tensor(e, dtype=torch.int32, device=CUDA) for e in edges]
    return tensors, Spans(*edges, max(queries), max(keys))


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([130, 0, 1, 257, 0, 5], [7, 40, 300, 128, 0, 1]),
        ([1], [500]),
        ([0, 300], [300, 7]),
    ],
)
def test_rectangles_of_unequal_and_empty_spans(kernel, queries, keys):
    (q, k, v, dout), spans = rectangles(queries, keys, heads=4, kv_heads=2)
    settings = {"causal": False, "scale": HEAD_DIM**-0.5, "window": None}
    out, lse = kernel.forward(q, k, v, spans, **settings)
    gradients = kernel.backward(dout, q, k, v, out, lse, spans, **settings)

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wide = (leaves[0], *(x.repeat_interleave(2, dim=1) for x in leaves[1:]))
    outs, sums = [], []
    for a, b, c in zip(
        *(x.split(n) for x, n in zip(wide, (queries, keys, keys), strict=True)), strict=True
    ):
        if len(a):
            score = torch.einsum("qhd,khd->hqk", a, b) * HEAD_DIM**-0.5
            outs.append(torch.einsum("hqk,khd->qhd", score.softmax(-1), c))
            sums.append(score.logsumexp(-1))
    expected = torch.cat(outs)
    expected.backward(dout.double())
    assert (lse - torch.cat(sums, 1)).abs().max().item() < 1e-3
    for name, ours, theirs in zip(
        ("out", "dq", "dk", "dv"),
        (out, *gradients),
        (expected, *(leaf.grad for leaf in leaves)),
        strict=True,
    ):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert error < BF16_ERROR, (name, error)
    without_queries = [n for n, q_tokens in enumerate(queries) if not q_tokens]
    for gradient in gradients[1:]:
        parts = gradient.split(keys)
        assert all(parts[n].eq(0).all() for n in without_queries)


def test_after_the_warm_up_nothing_compiles(kernel, monkeypatch):
    """Whatever a step's documents are: few or many, of one token or of several tiles."""
    if not kernel.compiles:
        pytest.skip("it does not compile")
    shape = {"heads": 4, "kv_heads": 2, "head_dim": HEAD_DIM}
    told = []
    warm_up(
        kernel,
        device=CUDA,
        dtype=torch.bfloat16,
        **shape,
        windows=(None, 100),
        rectangles=True,
        tell=told.append,
    )
    assert told and told[0].startswith("compiling attention, ")
    from flash_attn.cute import interface

    def compile(*arguments, **settings):
        raise AssertionError("something compiles after the warm-up")

    monkeypatch.setattr(interface.cute, "compile", compile)
    for lengths, causal, window in (
        ([1], True, None),
        ([5000], True, None),
        ([1] * 300, True, None),
        ([3, 2000] * 200, True, 100),
        ([40, 600], True, 1),
        ([1], False, None),
        ([0, 700, 1], False, None),
        ([1] * 300, False, None),
    ):
        (q, k, v, dout), spans = rectangles(lengths, lengths, heads=4, kv_heads=2)
        settings = {"causal": causal, "scale": 1.0, "window": window}
        out, lse = kernel.forward(q, k, v, spans, **settings)
        kernel.backward(dout, q, k, v, out, lse, spans, **settings)


def test_a_deterministic_backward_repeats_its_bits(kernel):
    """Long enough for many blocks to add to the same dq, and 8 heads to the same dk and dv."""
    torch.use_deterministic_algorithms(True)
    try:
        chosen, _ = choose_kernel(
            CUDA, torch.bfloat16, head_dim=HEAD_DIM, name=kernel.name, deterministic=True
        )
        lengths = [3000, 1, 1500, 129]
        (q, k, v, dout), spans = rectangles(lengths, lengths, heads=HEADS, kv_heads=KV_HEADS)
        settings = {"causal": True, "scale": HEAD_DIM**-0.5, "window": None}
        found = []
        for _ in range(5):
            out, lse = chosen.forward(q, k, v, spans, **settings)
            gradients = chosen.backward(dout, q, k, v, out, lse, spans, **settings)
            found.append([out, lse, *gradients])
        for again in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


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
