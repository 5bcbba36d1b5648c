"""Sliding windows in the flash engine: the kernel's, and hidden anchors merged in as one more key. And what a
window counts in interleaved rows.

(A ring's are in `test_ring_in_threads.py`; real models' windows in `test_trainers_coverage.py`.)
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from anchor_context.attention import flash, flex, reference
from anchor_context.attention.kernels import KERNELS, pytorch
from anchor_context.attention.patterns import PATTERNS, make_layout, mask_predicate
from anchor_context.layout import DocumentLayout

WINDOWS = (1, 7, 128, 300, 700)
ROWS = {  # documents of one token, of exactly a window and one more, longer and shorter than all windows
    "one": [[620]],
    "many": [[1, 7, 8, 128, 129, 1, 346]],
    "two rows": [[1, 299, 320], [128, 492]],
}
attend = partial(flash.attend, scale=0.3, kernel=KERNELS["torch_cpu"])


def layout_of(rows: list[list[int]], *, pattern: str = "anchor") -> DocumentLayout:
    lengths = [length for row in rows for length in row]
    return make_layout(
        np.cumsum([0, *lengths[:-1]]),
        batch_size=len(rows),
        row_length=sum(rows[0]),
        pattern=pattern,
        anchor_placement=PATTERNS[pattern].placement("per_document"),
    )


def tensors(layout: DocumentLayout, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and the output's gradient: 4 heads over 2."""
    generator = torch.Generator().manual_seed(0)
    shape = (layout.batch_size, layout.row_length, 16)
    return [
        torch.randn(shape[0], heads, *shape[1:], generator=generator).to(dtype)
        for heads in (4, 2, 2, 4)
    ]


def results(attend, layout: DocumentLayout, dtype: torch.dtype, *, window: int) -> list[Tensor]:
    """out, dq, dk, dv."""
    *inputs, grad = tensors(layout, dtype)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attend(*leaves, layout, sliding_window=window)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("pattern", ["anchor", "intra_doc", "full"])
def test_outputs_and_gradients_equal_the_reference(pattern, rows, window):
    layout = layout_of(rows, pattern=pattern)
    expected = results(partial(reference.attend, scale=0.3), layout, torch.float64, window=window)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        found = results(attend, layout, dtype, window=window)
        check(found, expected, bound=bound)
        # A document's first token by itself: where it is an anchor, all of its tokens add to its gradient.
        first = layout.cu_seqlens[:-1].long()
        of_first = [
            [x.transpose(1, 2).flatten(0, 1)[first] for x in all] for all in (found, expected)
        ]
        check(*of_first, bound=bound)


@pytest.mark.parametrize("window", [7, 300])
def test_bfloat16_rounds_no_more_than_without_a_window(window):
    layout = layout_of(ROWS["one"])
    expected = results(partial(reference.attend, scale=0.3), layout, torch.float64, window=window)
    check(results(attend, layout, torch.bfloat16, window=window), expected, bound=2e-2)


def check(found: list[Tensor], expected: list[Tensor], *, bound: float) -> None:
    for name, ours, true in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert ours.dtype == found[0].dtype
        size = true.norm() or expected[-1].norm()  # a query that sees itself alone has a dq of 0
        assert (ours - true).norm() / size < bound, name


@pytest.mark.parametrize("window", WINDOWS)
def test_both_placements_of_the_anchor_compute_the_same(window):
    """Each document's own anchor, by flash, and one shared anchor with the same key and value, by flex."""
    lengths = np.array([40, 1, 400, 128, 9])  # without their anchors
    shared = make_layout(
        np.cumsum([0, 1, *lengths[:-1]]),
        batch_size=1,
        row_length=1 + lengths.sum(),
        pattern="anchor",
        anchor_placement="shared",
    )
    q, k, v, _ = tensors(shared)
    one = flex.make_attend()(q, k, v, shared, scale=0.3, sliding_window=window)

    own = layout_of([(lengths + 1).tolist()])
    starts = own.cu_seqlens[:-1].tolist()
    token = torch.zeros(own.row_length, dtype=torch.long)  # of the row with a shared anchor
    is_text = torch.ones(own.row_length, dtype=torch.bool)
    is_text[starts] = False
    token[is_text] = torch.arange(1, shared.row_length)
    out = attend(*(x[:, :, token] for x in (q, k, v)), own, sliding_window=window)
    torch.testing.assert_close(out[:, :, is_text], one[:, :, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [1, 7, 128])
@pytest.mark.parametrize("pattern", ["anchor", "intra_doc", "full"])
def test_a_token_that_is_not_seen_changes_nothing(pattern, window):
    """Neither a later one, nor one that the window hides: not a bit."""
    layout = layout_of(ROWS["many"], pattern=pattern)
    q, k, v, _ = tensors(layout)
    before = attend(q, k, v, layout, sliding_window=window)
    index, zero = torch.arange(layout.row_length), torch.tensor(0)
    for token in (0, 1, 3, 16, 200, 274, 275, 500, 619):
        k_other, v_other = k.clone(), v.clone()
        k_other[:, :, token] += 1
        v_other[:, :, token] -= 1
        after = attend(q, k_other, v_other, layout, sliding_window=window)
        seen_by = mask_predicate(layout, sliding_window=window)(zero, zero, index, zero + token)
        changed = (after != before).any(dim=(0, 1, 3))
        assert torch.equal(changed, seen_by)


def test_a_window_that_hides_nothing_is_none():
    layout = layout_of(ROWS["many"])
    found, plain = (results(attend, layout, torch.float32, window=w) for w in (346, None))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_layers_of_one_model_may_differ():
    """One layout for all of them, as a model hands it on."""
    layout = layout_of(ROWS["many"])
    outs = []
    for engine in (attend, partial(reference.attend, scale=0.3)):
        x, k, v, _ = (t.double() for t in tensors(layout))
        for window in (7, None, 128, 7):
            x = engine(x, k, v, layout, sliding_window=window)
        outs.append(x)
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 7, 128, 300])
@pytest.mark.parametrize(
    ("pattern", "placement"),
    [("anchor", "per_document"), ("anchor", "shared"), ("intra_doc", "none"), ("full", "none")],
)
def test_a_window_counts_the_tokens_of_the_document_alone(pattern, placement, window):
    """Interleaved chunks compute what their documents compute in one piece, as micro-batches take them."""
    lengths = np.array([1, 150, 40, 200, 9, 300, 100])
    documents = np.array([0, 1, 2, 1, 1, 3, 2])
    settings = {"batch_size": 1, "row_length": lengths.sum(), "anchor_placement": placement}
    chunks, whole = (
        make_layout(np.cumsum([0, *n[:-1]]), pattern=pattern, documents=d, **settings)
        for n, d in (
            (lengths, documents),
            (np.bincount(documents, weights=lengths).astype(int), None),
        )
    )
    order = torch.arange(whole.row_length)
    if pattern != "full":  # its unit is the row, as it stands
        order = chunks.document_ids[0].argsort(stable=True)
    q, k, v, _ = tensors(chunks)
    together = [x[:, :, order] for x in (q, k, v)]
    expected = reference.attend(*together, whole, scale=0.3, sliding_window=window)
    for attend in (reference.attend, flex.make_attend()):
        out = attend(q, k, v, chunks, scale=0.3, sliding_window=window)[:, :, order]
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    blocks = flex.block_mask(chunks, sliding_window=window)
    out = flex_attention(q, k, v, block_mask=blocks, scale=0.3, enable_gqa=True)[:, :, order]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_the_cpus_cost_is_that_of_the_window(monkeypatch):
    """The pairs that its operator is called with: a band's, not the document's."""
    pairs = []
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def counted(q, k, *arguments, **settings):
        pairs.append(q.shape[2] * k.shape[2])
        return operator(q, k, *arguments, **settings)

    monkeypatch.setattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", counted, raising=False
    )
    tokens, window = 8192, 64
    layout = layout_of([[tokens]], pattern="intra_doc")
    q = torch.zeros(1, 1, tokens, 8)
    attend(q, q, q, layout, sliding_window=window)
    assert tokens * window < sum(pairs) <= tokens * (window + pytorch.BAND)
