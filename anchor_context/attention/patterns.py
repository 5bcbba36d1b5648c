"""The attention patterns: who sees whom, and which rotary position each token has.

Each pattern stands here once, as a predicate over (query, key) pairs and a rule for positions. The
reference evaluates the predicate, flex compiles it, flash turns it into boundaries. One row with the
documents A (3 tokens) and B (2 tokens), `^` the anchor, `x` where a query (line) sees a key (column):

        full            intra_doc        anchor, per document      anchor, shared
        A A A B B       A A A B B        ^ A A ^ B                 ^ A A B B
    A   x           A   x            ^   x                     ^   x
    A   x x         A   x x          A   x x                   A   x x
    A   x x x       A   x x x        A   x x x                 A   x x x
    B   x x x x     B         x      ^         x               B   x     x
    B   x x x x x   B         x x    B         x x             B   x     x x

All anchors of a row hold the same token at position 0 and see only themselves, so at every layer they
have the same keys and values: the last two masks compute the same thing (arXiv 2411.13476, section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anchor_context.layout import DocumentLayout

MaskPredicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`mask(batch, head, query, key) -> bool`, on index tensors that broadcast: FlexAttention's form."""


@dataclass(frozen=True)
class Pattern:
    """One attention pattern. All patterns are causal."""

    name: str
    crosses_documents: bool
    """Whether a token sees the documents before its own."""
    positions: Callable
    """(row index, start of the token's document) -> rotary position, elementwise on integers."""


PATTERNS = {
    pattern.name: pattern
    for pattern in (
        Pattern("full", True, lambda index, start: index),
        Pattern("intra_doc", False, lambda index, start: index),
        Pattern("intra_doc_reset", False, lambda index, start: index - start),
        # A document starts with its anchor. In the shared placement the anchor is the document
        # [0, 1), and every other document's first token is an ordinary one at its own index.
        Pattern("anchor", False, lambda index, start: index * (index != start)),
    )
}

ANCHOR_PLACEMENTS = ("per_document", "shared")


class InterleavedLayout(DocumentLayout):
    """A layout whose documents lie in chunks, other documents' chunks between them.

    `cu_seqlens` bounds the chunks. A token's document id is the number of its document's first chunk, so
    `cu_seqlens[document_id]` is still where its document starts. No set of segments describes it.
    """


def make_layout(
    document_starts: np.ndarray,
    *,
    batch_size: int,
    row_length: int,
    pattern: str,
    anchor_placement: str,
    documents: np.ndarray | None = None,
) -> DocumentLayout:
    """Build the layout of a micro-batch from its document starts.

    Args:
        document_starts: (pieces,) increasing integers: where documents, or the chunks of interleaved
            ones, start in the B·S flattened tokens. Every row start is among them.
        pattern: a key of `PATTERNS`.
        anchor_placement: how the packer placed anchors; "none" exactly when the pattern has none.
        documents: (pieces,) integers: the document of each piece, for rows of interleaved chunks.
            Without it every piece is a document.

    Returns:
        The layout; an `InterleavedLayout` if a document has more than one piece.

    Raises:
        ValueError: an unknown pattern, or an anchor placement that does not go with it.
    """
    check_pattern(pattern, anchor_placement)
    total = batch_size * row_length
    cu_seqlens = np.append(document_starts, total).astype(np.int32)
    lengths = np.diff(cu_seqlens)
    row_starts = np.arange(0, total, row_length)
    assert lengths.min(initial=1) > 0 and cu_seqlens[0] == 0, "documents overlap or are empty"
    assert np.isin(row_starts, document_starts).all(), "a document crosses a row's end"

    first_piece = np.arange(len(lengths), dtype=np.int32)  # of each piece's document
    interleaved = documents is not None and len(np.unique(documents)) < len(lengths)
    if interleaved:
        _, first, inverse = np.unique(documents, return_index=True, return_inverse=True)
        first_piece = first[inverse].astype(np.int32)

    document_ids = np.repeat(first_piece, lengths)
    index = np.arange(total, dtype=np.int64) % row_length
    start = np.repeat(cu_seqlens[first_piece].astype(np.int64) % row_length, lengths)
    if anchor_placement == "shared":
        start = np.zeros_like(start)  # the one anchor is at index 0; only it has position 0
    position_ids = PATTERNS[pattern].positions(index, start)

    shape = (batch_size, row_length)
    kind = InterleavedLayout if interleaved else DocumentLayout
    return kind(
        cu_seqlens=torch.from_numpy(cu_seqlens),
        document_ids=torch.from_numpy(document_ids).view(shape),
        position_ids=torch.from_numpy(position_ids).view(shape),
        max_seqlen=int(lengths.max()),
        pattern=pattern,
        anchor_placement=anchor_placement,
    )


def check_pattern(pattern: str, anchor_placement: str) -> None:
    """Raise `ValueError` unless the pattern exists and goes with the anchor placement."""
    if pattern not in PATTERNS:
        raise ValueError(f"attention pattern {pattern!r} is unknown; choose from {list(PATTERNS)}")
    allowed = ANCHOR_PLACEMENTS if pattern == "anchor" else ("none",)
    if anchor_placement not in allowed:
        raise ValueError(
            f"anchor placement {anchor_placement!r} does not go with the pattern {pattern!r}; "
            f"choose from {list(allowed)}"
        )


def attended_boundaries(layout: DocumentLayout) -> tuple[Tensor, int]:
    """The pattern as variable-length causal attention: (cu_seqlens int32, longest segment).

    Every pattern is plain causal attention inside consecutive segments, except the shared anchor,
    which no set of segments describes.

    Raises:
        ValueError: the layout has a shared anchor, or its documents lie in interleaved chunks.
    """
    if isinstance(layout, InterleavedLayout):
        raise ValueError(
            "rows packed with --interleave_chunks need --attn_engine flex, which goes by document ids; "
            "the flash engine and the ring take documents that lie in one piece"
        )
    if layout.anchor_placement == "shared":
        raise ValueError(
            "rows with one shared anchor need --attn_engine flex; "
            "the flash engine and the ring take rows packed with --anchor_placement per_document"
        )
    if not PATTERNS[layout.pattern].crosses_documents:
        return layout.cu_seqlens, layout.max_seqlen
    total = layout.batch_size * layout.row_length
    rows = torch.arange(
        0, total + 1, layout.row_length, dtype=torch.int32, device=layout.cu_seqlens.device
    )
    return rows, layout.row_length


def mask_predicate(layout: DocumentLayout, *, sliding_window: int | None = None) -> MaskPredicate:
    """The pattern as a predicate on (batch, head, query index, key index).

    `sliding_window` (tokens, the query included, as transformers counts) narrows what a token sees of
    its documents; the anchor stays visible at any distance.
    """
    document_ids = layout.document_ids
    crosses = PATTERNS[layout.pattern].crosses_documents
    shared_anchor = layout.anchor_placement == "shared"
    own_anchor = layout.anchor_placement == "per_document" and sliding_window is not None
    if own_anchor:
        starts = layout.cu_seqlens[:-1].long()[document_ids.long()] % layout.row_length

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = query >= key
        visible = causal
        if not crosses:
            visible = visible & (document_ids[batch, query] == document_ids[batch, key])
        if sliding_window is not None:
            visible = visible & (query - key < sliding_window)
        if shared_anchor:
            visible = visible | (causal & (key == 0))
        if own_anchor:
            visible = visible | (causal & (key == starts[batch, query]))
        return visible

    return mask


def attended_pairs(document_lengths: np.ndarray, *, pattern: str, anchor_placement: str) -> int:
    """How many (query, key) pairs one row of these documents attends to: the pattern's own work.

    `document_lengths` are the row's documents in tokens, padding included as one of them.
    """
    check_pattern(pattern, anchor_placement)
    lengths = np.asarray(document_lengths, dtype=np.int64)
    row_length = int(lengths.sum())
    if PATTERNS[pattern].crosses_documents:
        return row_length * (row_length + 1) // 2
    pairs = int((lengths * (lengths + 1) // 2).sum())
    # Every token but the anchor itself (a document of its own) sees the shared anchor besides.
    return pairs + (row_length - 1) * (anchor_placement == "shared")
