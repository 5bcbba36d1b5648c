"""A micro-batch (1, T) of whole units, out of any rows, computes what the rows do: outputs and gradients."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from anchor_context.attention import flash, flex, reference
from anchor_context.attention.kernels import KERNELS
from anchor_context.attention.patterns import (
    PATTERNS,
    attended_boundaries,
    attended_pairs,
    layout_of_units,
    make_layout,
    mask_predicate,
)
from anchor_context.layout import DocumentLayout
from tests.ring_in_threads import errors_of_ring

PLACED_PATTERNS = [
    (name, placement) for name, pattern in PATTERNS.items() for placement in pattern.placements
]
ROW = 160
ROWS = [[100, 1, 59], [40, 40, 70, 10]]
"""Documents of each row. A shared anchor is the first token of each."""
PADDING = 7
"""Behind the units of the micro-batch, so that its tokens divide over ranks, for instance."""


def layout_of_rows(pattern: str, placement: str) -> DocumentLayout:
    starts = [np.cumsum([0, *lengths[:-1]]) for lengths in ROWS]
    if placement == "shared":
        starts = [np.union1d(of_row, [1]) for of_row in starts]
    return make_layout(
        np.concatenate([of_row + number * ROW for number, of_row in enumerate(starts)]),
        batch_size=len(ROWS),
        row_length=ROW,
        pattern=pattern,
        anchor_placement=placement,
    )


def micro_batch(rows: DocumentLayout) -> tuple[DocumentLayout, np.ndarray]:
    """All units of the rows in another order, behind one anchor if it is shared, padding at the end.

    Returns the layout, and the place of each of its tokens in the flattened rows: (T - PADDING,) int64.
    """
    pattern, shared = rows.pattern, rows.anchor_placement == "shared"
    boundaries = rows.cu_seqlens.tolist()
    documents = [np.arange(a, b) for a, b in pairwise(boundaries)]  # tokens of each
    if shared:
        documents = [tokens for tokens in documents if len(tokens) > 1 or tokens[0] % ROW]
    of_row = [tokens[0] // ROW for tokens in documents]
    if PATTERNS[pattern].unit == "row":
        order = sorted(range(len(documents)), key=lambda d: (-of_row[d], d))  # the last row first
    else:
        order = np.random.default_rng(0).permutation(len(documents)).tolist()
    laid = [documents[d] for d in order]
    if shared:
        laid = [np.array([0]), *laid]
    places = np.concatenate(laid)
    positions = rows.position_ids.flatten().numpy()[places]
    layout = layout_of_units(
        np.array([*map(len, laid), PADDING]),
        np.append(positions, np.arange(PADDING)),
        pattern=pattern,
        anchor_placement=rows.anchor_placement,
        rows=np.array([*(-of_row[d] for d in order), 1]) if not shared else None,
    )
    return layout, places


def tensors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def results(attend, layout: DocumentLayout, qkv, grad, **settings) -> list[torch.Tensor]:
    """[out, dq, dk, dv]."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(*leaves, layout, scale=0.25, **settings)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def as_line(x: torch.Tensor, places: np.ndarray) -> torch.Tensor:
    """(B, H, S, D) of the rows -> (1, H, T, D) of the micro-batch, padding 0.1."""
    flat = x.transpose(1, 2).flatten(0, 1)[places]
    padding = torch.full((PADDING, *flat.shape[1:]), 0.1, dtype=x.dtype)
    return torch.cat([flat, padding])[None].transpose(1, 2)


@pytest.mark.parametrize(
    ("pattern", "placement", "engine"),
    [
        (*placed, engine)
        for placed in PLACED_PATTERNS
        for engine in ("reference", "flash", "flex")
        if engine != "flash" or placed[1] != "shared"  # flash takes anchors per document
    ],
)
def test_a_micro_batch_computes_what_its_rows_do(pattern, placement, engine):
    rows = layout_of_rows(pattern, placement)
    layout, places = micro_batch(rows)
    assert layout.document_ids.shape == (1, len(places) + PADDING)
    q, grad = tensors(2, 4, ROW, 16), tensors(2, 4, ROW, 16).flip(0)
    k, v = tensors(2, 2, ROW, 16), tensors(2, 2, ROW, 16).flip(0)
    if placement == "shared":  # an anchor is the same token in every row
        k[1, :, 0], v[1, :, 0], q[1, :, 0] = k[0, :, 0], v[0, :, 0], q[0, :, 0]
        grad[:, :, 0] = 0
    expected = results(reference.attend, rows, (q, k, v), grad)
    attend = {
        "reference": reference.attend,
        "flash": partial(flash.attend, kernel=KERNELS["torch_cpu"]),
        "flex": flex.make_attend(),
    }[engine]
    line_grad = as_line(grad, places)
    line_grad[:, :, len(places) :] = 0
    found = results(attend, layout, [as_line(x, places) for x in (q, k, v)], line_grad)
    for ours, theirs in zip(found, expected, strict=True):
        ours = ours.transpose(1, 2)[0, : len(places)]
        theirs = theirs.transpose(1, 2).flatten(0, 1)[places]
        if placement == "shared":  # its gradient is the sum over all that see it, here of both rows
            ours, theirs = ours[1:], theirs[1:]
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-12


def test_a_shared_anchors_gradient_is_the_sum_over_the_rows():
    rows = layout_of_rows("anchor", "shared")
    layout, places = micro_batch(rows)
    q, k, v = tensors(2, 4, ROW, 16), tensors(2, 2, ROW, 16), tensors(2, 2, ROW, 16).flip(0)
    k[1, :, 0], v[1, :, 0], q[1, :, 0] = k[0, :, 0], v[0, :, 0], q[0, :, 0]
    grad = tensors(2, 4, ROW, 16).flip(1)
    line_grad = as_line(grad, places)
    line_grad[:, :, 0] = grad[:, :, 0].sum(0)
    line_grad[:, :, len(places) :] = 0
    _, _, dk, dv = results(reference.attend, rows, (q, k, v), grad)
    line = [as_line(x, places) for x in (q, k, v)]
    _, _, line_dk, line_dv = results(reference.attend, layout, line, line_grad)
    torch.testing.assert_close(line_dk[0, :, 0], dk[:, :, 0].sum(0))
    torch.testing.assert_close(line_dv[0, :, 0], dv[:, :, 0].sum(0))


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize(("pattern", "placement"), PLACED_PATTERNS)
def test_flex_attentions_block_mask_honours_units(pattern, placement, window):
    """The real kernel's forward; with a window, which counts a document's own tokens in the line too."""
    rows = layout_of_rows(pattern, placement)
    layout, places = micro_batch(rows)
    q, k, v = tensors(2, 4, ROW, 16), tensors(2, 2, ROW, 16), tensors(2, 2, ROW, 16).flip(0)
    if placement == "shared":
        k[1, :, 0], v[1, :, 0] = k[0, :, 0], v[0, :, 0]
    expected = as_line(reference.attend(q, k, v, rows, scale=0.25, sliding_window=window), places)
    mask = flex.block_mask(layout, sliding_window=window)
    line = [as_line(x, places).float() for x in (q, k, v)]
    out = flex_attention(*line, block_mask=mask, scale=0.25, enable_gqa=True)
    out, expected = out[:, :, 1 : len(places)], expected[:, :, 1 : len(places)]
    assert ((out - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("pattern", [name for name, p in PATTERNS.items() if p.sees is None])
def test_a_ring_honours_units(pattern, ranks):
    lengths, rows = np.array([100, 53, 130, 61, 40]), np.array([0, 0, 1, 1, 2])
    layout = layout_of_units(
        lengths,
        np.arange(lengths.sum()),
        pattern=pattern,
        anchor_placement=PATTERNS[pattern].placement("per_document"),
        rows=rows,
    )
    errors = errors_of_ring(
        layout,
        KERNELS["torch_cpu"],
        ranks=ranks,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    assert max(errors.values()) < 1e-5, errors


def test_two_rows_of_full_in_one_forward_never_see_each_other():
    layout, _ = micro_batch(layout_of_rows("full", "none"))
    assert layout.unit_boundaries.tolist() == [0, ROW, 2 * ROW, 2 * ROW + PADDING]
    assert layout.cu_seqlens.tolist()[:5] == [0, 40, 80, 150, 160], "the last row comes first"
    index, row = torch.arange(2 * ROW + PADDING), torch.tensor(0)
    mask = mask_predicate(layout)(row, row, index[:, None], index)
    assert mask[ROW - 1, 0] and mask[2 * ROW - 1, ROW] and not mask[ROW, ROW - 1]
    assert mask.sum() == 2 * (ROW * (ROW + 1) // 2) + PADDING * (PADDING + 1) // 2
    assert attended_boundaries(layout)[1] == layout.longest_unit == ROW > layout.max_seqlen


@pytest.mark.parametrize(("pattern", "placement"), PLACED_PATTERNS)
def test_positions_are_those_of_the_rows(pattern, placement):
    rows = layout_of_rows(pattern, placement)
    layout, places = micro_batch(rows)
    assert torch.equal(
        layout.position_ids[0, : len(places)], rows.position_ids.flatten()[torch.tensor(places)]
    )
    boundaries = layout.unit_boundaries.tolist()
    assert boundaries[-1] == len(places) + PADDING
    work = sum(
        attended_pairs(np.array([b - a]), pattern=pattern, anchor_placement=placement)
        for a, b in pairwise(boundaries)
    )
    if placement != "shared":
        assert work == flex.dense_mask(layout).sum().item(), "a unit sees something outside itself"
