"""The engines against the dense float64 reference, and the reference against the patterns' definition."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from anchor_context.attention import flash, flex, reference
from anchor_context.attention.kernels import KERNELS
from anchor_context.attention.patterns import (
    PATTERNS,
    attended_pairs,
    make_layout,
    mask_predicate,
)
from anchor_context.layout import DocumentLayout

ROW = 256
PATTERNS_OF_THE_PAPER = ("full", "intra_doc", "intra_doc_reset", "anchor")
PLACED_PATTERNS = [
    (name, placement) for name, pattern in PATTERNS.items() for placement in pattern.placements
]


def random_layout(
    *, documents: int, batch_size: int, pattern: str, placement: str, seed: int = 0
) -> DocumentLayout:
    """Rows with so many documents each, cut at random; with 200 in 256 tokens most have one token."""
    rng = np.random.default_rng(seed)
    starts = []
    for row in range(batch_size):
        cuts = np.sort(rng.choice(np.arange(1, ROW), documents - 1, replace=False))
        if placement == "shared":
            cuts = np.union1d(cuts, [1])
        starts += [row * ROW, *(row * ROW + cuts)]
    return make_layout(
        np.array(starts),
        batch_size=batch_size,
        row_length=ROW,
        pattern=pattern,
        anchor_placement=placement,
    )


def qkv(batch_size: int, *, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Grouped-query q, k, v (4 heads over 2) and an output gradient, in float64."""
    generator = torch.Generator().manual_seed(seed)
    make = partial(torch.randn, dtype=torch.float64, generator=generator)
    q, grad = make(batch_size, 4, ROW, 16), make(batch_size, 4, ROW, 16)
    return [q, make(batch_size, 2, ROW, 16), make(batch_size, 2, ROW, 16)], grad


def run(attend, inputs, grad, layout, dtype, **settings) -> list[torch.Tensor]:
    """[out, dq, dk, dv]."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out = attend(*leaves, layout, scale=0.25, **settings)
    out.backward(grad.to(dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def worst_error(results, expected) -> float:
    """The largest relative error (Frobenius) of any tensor."""
    return max(((r - e).norm() / e.norm()).item() for r, e in zip(results, expected, strict=True))


@pytest.mark.parametrize("documents", [1, 5, 200])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize(("pattern", "placement"), PLACED_PATTERNS)
def test_engines_agree_with_the_reference(pattern, placement, batch_size, documents):
    layout = random_layout(
        documents=documents, batch_size=batch_size, pattern=pattern, placement=placement
    )
    inputs, grad = qkv(batch_size)
    expected = run(reference.attend, inputs, grad, layout, torch.float64)
    engines = {"flex": flex.make_attend()}
    if placement != "shared" and PATTERNS[pattern].sees is None:
        engines["flash"] = partial(flash.attend, kernel=KERNELS["torch_cpu"])
    for name, attend in engines.items():
        error = worst_error(run(attend, inputs, grad, layout, torch.float32), expected)
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("window", [None, 7, 150])
@pytest.mark.parametrize(("pattern", "placement"), PLACED_PATTERNS)
def test_flex_attention_itself_agrees(pattern, placement, window):
    """The real kernel's forward through the block mask, which CUDA trains with."""
    layout = random_layout(documents=6, batch_size=2, pattern=pattern, placement=placement)
    (q, k, v), _ = qkv(2)
    expected = reference.attend(q, k, v, layout, scale=0.25, sliding_window=window)
    mask = flex.block_mask(layout, sliding_window=window)
    out = flex_attention(
        q.float(), k.float(), v.float(), block_mask=mask, scale=0.25, enable_gqa=True
    )
    assert ((out - expected).norm() / expected.norm()).item() < 1e-5


@pytest.fixture
def compiled():
    """A stand-in for the compiler behind `compile_flex`; what it was given, in order."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    yield graphs, partial(flex.compile_flex, backend)
    torch._dynamo.reset()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("pattern", "placement"), PLACED_PATTERNS)
def test_every_step_has_new_documents_and_compiles_nothing(pattern, placement, window, compiled):
    graphs, compile_flex = compiled
    (q, k, v), _ = qkv(2)
    for step in range(torch._dynamo.config.recompile_limit + 1):
        layout = random_layout(
            documents=1 + 7 * step, batch_size=2, pattern=pattern, placement=placement, seed=step
        )
        mask = flex.block_mask(layout, sliding_window=window)
        attend = compile_flex()  # every engine makes its own
        out = attend(q.float(), k.float(), v.float(), block_mask=mask, scale=0.25, enable_gqa=True)
        dense = flex.dense_mask(layout, sliding_window=window)
        expected = scaled_dot_product_attention(q, k, v, dense, scale=0.25, enable_gqa=True)
        assert ((out - expected).norm() / expected.norm()).item() < 1e-5
    assert len(graphs) == 1


def test_rows_of_other_lengths_compile_once_more(compiled):
    graphs, compile_flex = compiled
    attend = compile_flex()
    for row_length in (300, 1024, 511, 640, 129, 700, 256, 1000, 384, 413):
        layout = make_layout(
            np.array([0, 1, 70]),
            batch_size=1,
            row_length=row_length,
            pattern="anchor",
            anchor_placement="shared",
        )
        q, k, v = (torch.randn(1, 2, row_length, 16) for _ in range(3))
        attend(q, k, v, block_mask=flex.block_mask(layout), scale=0.25)
    assert len(graphs) == 2  # the first length alone, then any


def test_masks_too_many_to_compile_are_an_error_not_unfused(compiled):
    _, compile_flex = compiled
    (q, k, v), _ = qkv(1)
    attend = compile_flex()
    for limit, failure in ((3, nullcontext()), (2, pytest.raises(FailOnRecompileLimitHit))):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(recompile_limit=limit), failure:
            # One kind for all that is causal inside units, one with a window besides, one with an anchor.
            for pattern, placement, window in (
                ("full", "none", None),
                ("intra_doc", "none", 100),
                ("anchor", "shared", None),
            ):
                layout = random_layout(
                    documents=3, batch_size=1, pattern=pattern, placement=placement
                )
                mask = flex.block_mask(layout, sliding_window=window)
                attend(q, k, v, block_mask=mask, scale=0.25, enable_gqa=True)


def test_block_mask_skips_blocks_of_other_documents():
    lengths = [300, 500, 224]
    layout = make_layout(
        np.cumsum([0, *lengths[:-1]]),
        batch_size=1,
        row_length=1024,
        pattern="intra_doc",
        anchor_placement="none",
    )
    mask = flex.block_mask(layout)
    dense = flex.dense_mask(layout)[0, 0].unflatten(0, (8, 128)).unflatten(2, (8, 128))
    needed = dense.any(3).any(1)
    assert needed.sum() < 36, "the case is vacuous: all causal blocks are needed"
    assert torch.equal(mask.to_dense()[0, 0].bool(), needed)
    full = mask.full_kv_num_blocks.sum().item()
    assert full == dense.all(3).all(1).sum().item() > 0


@pytest.mark.parametrize("row_length", [100, 128, 129, 300])
def test_block_mask_at_row_lengths_off_the_block(row_length):
    layout = make_layout(
        np.array([0, 37]),
        batch_size=1,
        row_length=row_length,
        pattern="intra_doc",
        anchor_placement="none",
    )
    q, k, v = (torch.randn(1, 2, row_length, 16) for _ in range(3))
    out = flex_attention(q, k, v, block_mask=flex.block_mask(layout), scale=0.25)
    expected = reference.attend(q.double(), k.double(), v.double(), layout, scale=0.25)
    assert ((out - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("pattern", "placement"),
    [placed for placed in PLACED_PATTERNS if placed[0] in PATTERNS_OF_THE_PAPER],
)
def test_predicate_and_work_follow_the_definition(pattern, placement):
    """Against a direct reading of the table of patterns, token by token."""
    starts = [0, 1, 4, 9] if placement == "shared" else [0, 4, 9]
    length = 14
    layout = make_layout(
        np.array(starts),
        batch_size=1,
        row_length=length,
        pattern=pattern,
        anchor_placement=placement,
    )
    document = [sum(s <= i for s in starts) for i in range(length)]
    start_of = [max(s for s in starts if s <= i) for i in range(length)]
    mask = mask_predicate(layout)
    pairs = 0
    for i in range(length):
        for j in range(length):
            expected = j <= i and (
                pattern == "full"
                or document[i] == document[j]
                or (placement == "shared" and j == 0)
            )
            batch, query, key = torch.tensor(0), torch.tensor(i), torch.tensor(j)
            assert bool(mask(batch, batch, query, key)) == expected, (i, j)
            pairs += expected
        position = {
            "full": i,
            "intra_doc": i,
            "intra_doc_reset": i - start_of[i],
            "anchor": 0 if i == (0 if placement == "shared" else start_of[i]) else i,
        }[pattern]
        assert layout.position_ids[0, i] == position
    lengths = np.diff([*starts, length])
    assert attended_pairs(lengths, pattern=pattern, anchor_placement=placement) == pairs


def test_rows_of_a_batch_have_their_own_documents():
    """Upstream read only row 0's boundaries, and corrupted positions in place."""
    layout = make_layout(
        np.array([0, 3, 8, 14]),
        batch_size=2,
        row_length=8,
        pattern="anchor",
        anchor_placement="per_document",
    )
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 0, 7]]
    assert layout.document_ids.tolist() == [[0] * 3 + [1] * 5, [2] * 6 + [3] * 2]


# --- Sliding windows (the flash engine's and the ring's: test_windows.py) --------------------------


def test_flex_honours_a_window_and_keeps_the_anchor_visible():
    layout = random_layout(documents=2, batch_size=1, pattern="anchor", placement="per_document")
    inputs, grad = qkv(1)
    narrow = run(reference.attend, inputs, grad, layout, torch.float64, sliding_window=5)
    wide = run(reference.attend, inputs, grad, layout, torch.float64)
    assert worst_error(narrow, wide) > 0.1, "the window hides nothing here"
    assert (
        worst_error(
            run(flex.make_attend(), inputs, grad, layout, torch.float32, sliding_window=5), narrow
        )
        < 1e-5
    )
    last = torch.tensor(ROW - 1)
    start = layout.cu_seqlens[-2].long()
    visible = mask_predicate(layout, sliding_window=5)
    assert last - start > 5 and visible(torch.tensor(0), torch.tensor(0), last, start)
    assert not visible(torch.tensor(0), torch.tensor(0), last, last - 5)
    assert visible(torch.tensor(0), torch.tensor(0), last, last - 4)


def test_flex_makes_a_mask_once_per_layout(monkeypatch):
    made = []
    dense_mask = flex.dense_mask
    monkeypatch.setattr(flex, "dense_mask", lambda *a, **k: made.append(a) or dense_mask(*a, **k))
    attend = flex.make_attend()
    layouts = [
        random_layout(documents=3, batch_size=1, pattern="anchor", placement="shared")
        for _ in range(2)
    ]
    (q, k, v), _ = qkv(1)
    for layout in layouts:
        for _layer in range(3):
            attend(q, k, v, layout, scale=1.0)
    assert [layout for (layout,) in made] == layouts


def test_flash_refuses_a_shared_anchor():
    layout = random_layout(documents=3, batch_size=1, pattern="anchor", placement="shared")
    (q, k, v), _ = qkv(1)
    with pytest.raises(ValueError, match="--attn_engine flex"):
        flash.attend(q, k, v, layout, scale=1.0, kernel=KERNELS["torch_cpu"])


@pytest.mark.parametrize(
    ("pattern", "placement", "says"),
    [
        ("anchors", "none", "unknown"),
        ("anchor", "none", "does not go with"),
        ("full", "shared", "does not go with"),
    ],
)
def test_unknown_patterns_and_placements_are_refused(pattern, placement, says):
    with pytest.raises(ValueError, match=says):
        make_layout(
            np.array([0]), batch_size=1, row_length=4, pattern=pattern, anchor_placement=placement
        )
