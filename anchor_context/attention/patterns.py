"""The attention patterns: who sees whom, and which rotary position each token has.

Each pattern stands here once, as one entry of `PATTERNS`; every list of patterns elsewhere is derived from
it. `mask_predicate` says in one place what an entry means: the reference evaluates it, flex compiles it,
flash and the ring take the patterns that are plain causal attention inside units. One row with the
documents A (3 tokens) and B (2 tokens), whose first tokens are anchors where `^` stands, `x` where a query
(line) sees a key (column):

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

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from anchor_context.layout import DocumentLayout

MaskPredicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`mask(batch, head, query, key) -> bool`, on index tensors that broadcast: FlexAttention's form."""

ANCHOR_PLACEMENTS = ("per_document", "shared")

Windows = Sequence[int | None]
"""Tokens that a query of each layer sees, itself included; None where it sees all of its unit."""
EVERYTHING: Windows = (None,)


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One attention pattern. All patterns are causal.

    A new one is one more entry of `PATTERNS`. Given `sees`, it trains with flex and the reference, which
    read the predicate; flash and the ring, which read boundaries, refuse it by name.
    """

    name: str
    unit: Literal["document", "row"]
    """The smallest thing that attention does not cross (the anchor apart)."""
    positions: Callable
    """(row index, start) -> rotary position, elementwise on integers. `start` is where the token's document
    starts in the row; behind a shared anchor the place in front, where an anchor of its own would be."""
    anchored: bool = False
    """Whether every token sees an anchor: its document's first token, or one that all documents share."""
    sees: Callable | None = None
    """(document of the query, document of the key) -> whether the one sees the other, elementwise on
    integers. A row's documents are numbered in order; compare the two numbers with each other only, for
    behind a shared anchor they may start at 1. None: a token sees all of its unit up to itself."""
    colour: str = "C4"
    """In every picture, as matplotlib names colours; grey is for what has no pattern."""

    @property
    def placements(self) -> tuple[str, ...]:
        """Where its anchors can be placed."""
        return ANCHOR_PLACEMENTS if self.anchored else ("none",)

    def placement(self, wanted: str) -> str:
        """`wanted`, one of the two placements of anchors, or "none" if the pattern has no anchor."""
        return wanted if self.anchored else "none"


PATTERNS = {
    pattern.name: pattern
    for pattern in (
        Pattern(name="full", unit="row", positions=lambda index, start: index, colour="C3"),
        Pattern(
            name="intra_doc", unit="document", positions=lambda index, start: index, colour="C1"
        ),
        Pattern(
            name="intra_doc_reset",
            unit="document",
            positions=lambda index, start: index - start,
            colour="C2",
        ),
        Pattern(
            name="anchor",
            unit="document",
            positions=lambda index, start: index * (index != start),  # 0 at the anchor
            anchored=True,
            colour="C0",
        ),
    )
}


def anchor_ids(named_by) -> list[int]:
    """The tokens that can be the anchor: BOS, then EOS (Qwen has no BOS). The first is the one placed.

    Args:
        named_by: a tokenizer, or a transformers configuration, which may name several of a kind.
    """
    kinds = (getattr(named_by, "bos_token_id", None), getattr(named_by, "eos_token_id", None))
    return [
        i for ids in kinds if ids is not None for i in (ids if isinstance(ids, list) else [ids])
    ]


def find_anchor_id(tokenizer) -> int:
    """The anchor token. Raises `ValueError` for a tokenizer that has nothing to serve as one."""
    found = anchor_ids(tokenizer)
    if not found:
        raise ValueError(
            "the tokenizer has neither BOS nor EOS to serve as the anchor; set its eos_token"
        )
    return found[0]


# --- layouts ---------------------------------------------------------------------------------------


def make_layout(
    document_starts: np.ndarray,
    *,
    batch_size: int,
    row_length: int,
    pattern: str,
    anchor_placement: str,
    documents: np.ndarray | None = None,
) -> DocumentLayout:
    """The layout of a micro-batch of whole rows.

    Args:
        document_starts: (pieces,) increasing integers: where documents, or the chunks of interleaved
            ones, start in the B·S flattened tokens. Every row start is among them.
        pattern: a key of `PATTERNS`.
        anchor_placement: how the packer placed anchors; "none" exactly when the pattern has none.
        documents: (pieces,) integers: the document of each piece, for rows of interleaved chunks.
            Without it every piece is a document.

    Raises:
        ValueError: an unknown pattern, or an anchor placement that does not go with it.
    """
    check_pattern(pattern, anchor_placement)
    total = batch_size * row_length
    lengths = np.diff(document_starts, append=total)
    row_starts = np.arange(0, total, row_length)
    assert np.isin(row_starts, document_starts).all(), "a document crosses a row's end"

    index = np.arange(total, dtype=np.int64) % row_length
    start = np.asarray(document_starts, dtype=np.int64)[_first_pieces(lengths, documents)]
    start = np.repeat(start % row_length, lengths)
    if anchor_placement == "shared":
        start = np.maximum(start - 1, 0)
    return _layout(
        lengths,
        PATTERNS[pattern].positions(index, start),
        shape=(batch_size, row_length),
        pattern=pattern,
        anchor_placement=anchor_placement,
        documents=documents,
        rows=document_starts // row_length,
    )


def layout_of_units(
    lengths: np.ndarray,
    position_ids: np.ndarray,
    *,
    pattern: str,
    anchor_placement: str,
    rows: np.ndarray | None = None,
    documents: np.ndarray | None = None,
) -> DocumentLayout:
    """The layout of a micro-batch (1, T) of whole units laid end to end, out of any rows.

    A unit's outputs depend on nothing outside it, so they are those that it has in its row.

    Args:
        lengths: (pieces,) integers: the tokens of each document, or of each chunk of an interleaved one, as
            they lie in the line. A shared anchor is the first, of one token; padding is the last.
        position_ids: (T,) integers: each token's position as its own row gave it.
        rows: (pieces,) integers that do not decrease: the row of each piece, padding as one of its own.
            Needed where the pattern's unit is the row, and not read where it is the document.
        documents: as in `make_layout`.

    Raises:
        ValueError: an unknown pattern, or an anchor placement that does not go with it.
    """
    check_pattern(pattern, anchor_placement)
    return _layout(
        np.asarray(lengths),
        np.asarray(position_ids, dtype=np.int64),
        shape=(1, len(position_ids)),
        pattern=pattern,
        anchor_placement=anchor_placement,
        documents=documents,
        rows=rows,
    )


def _layout(
    lengths: np.ndarray,
    position_ids: np.ndarray,
    *,
    shape: tuple[int, int],
    pattern: str,
    anchor_placement: str,
    documents: np.ndarray | None,
    rows: np.ndarray | None,
) -> DocumentLayout:
    """Both constructors' layout, from pieces of `lengths` in their order. position_ids: (B·S,) int64."""
    assert lengths.min(initial=1) > 0, "documents overlap or are empty"
    assert lengths.sum() == len(position_ids), "lengths and positions are of other tokens"
    boundaries = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    unit_boundaries = boundaries
    if PATTERNS[pattern].unit == "row":
        assert (np.diff(rows) >= 0).all(), "the documents of a row do not lie together"
        ends = np.flatnonzero(np.diff(rows, append=rows[-1] + 1)) + 1
        unit_boundaries = boundaries[np.concatenate(([0], ends))]
    first_pieces = _first_pieces(lengths, documents)
    return DocumentLayout(
        cu_seqlens=torch.from_numpy(boundaries),
        unit_boundaries=torch.from_numpy(unit_boundaries),
        document_ids=torch.from_numpy(np.repeat(first_pieces, lengths)).view(shape),
        position_ids=torch.from_numpy(position_ids).view(shape),
        max_seqlen=int(lengths.max()),
        longest_unit=int(np.diff(unit_boundaries).max()),
        pattern=pattern,
        anchor_placement=anchor_placement,
        interleaved=bool((first_pieces != np.arange(len(lengths))).any()),
    )


def _first_pieces(lengths: np.ndarray, documents: np.ndarray | None) -> np.ndarray:
    """(pieces,) int32: the first piece of each piece's document."""
    if documents is None:
        return np.arange(len(lengths), dtype=np.int32)
    _, first, inverse = np.unique(documents, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int32)


def pattern_named(name: str) -> Pattern:
    """The entry of `PATTERNS`. Raises `ValueError` where there is none."""
    if name not in PATTERNS:
        raise ValueError(f"attention pattern {name!r} is unknown; choose from {list(PATTERNS)}")
    return PATTERNS[name]


def check_pattern(pattern: str, anchor_placement: str) -> None:
    """Raise `ValueError` unless the pattern exists and goes with the anchor placement."""
    found = pattern_named(pattern)
    if anchor_placement not in found.placements:
        remedy = f"; choose from {list(ANCHOR_PLACEMENTS)}"
        if not found.anchored:
            remedy = (
                ", which has no anchor: leave --anchor_placement out, or train the pattern 'anchor'"
            )
        raise ValueError(
            f"anchor placement {anchor_placement!r} does not go with the pattern {pattern!r}{remedy}"
        )


# --- what a pattern attends to ---------------------------------------------------------------------


def mask_predicate(layout: DocumentLayout, *, sliding_window: int | None = None) -> MaskPredicate:
    """The pattern as a predicate on (batch, head, query index, key index): what all engines compute.

    `sliding_window` (tokens, the query included, as transformers counts) narrows what a token sees of
    its unit, counted in the unit's own tokens; the anchor stays visible at any distance.
    """
    sees = PATTERNS[layout.pattern].sees
    units = unit_ids(layout)
    numbers = None if sees is None else _document_numbers(layout, units)
    shared_anchor = layout.anchor_placement == "shared"
    own_anchor = layout.anchor_placement == "per_document" and sliding_window is not None
    apart = in_pieces(layout.pattern, interleaved=layout.interleaved)
    places = _places(units) if apart and sliding_window is not None else None
    if own_anchor:
        starts = layout.cu_seqlens[:-1].long()[layout.document_ids.long()] % layout.row_length

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = query >= key
        visible = causal & (units[batch, query] == units[batch, key])
        if sees is not None:
            visible = visible & sees(numbers[batch, query], numbers[batch, key])
        if places is not None:
            visible = visible & (places[batch, query] - places[batch, key] < sliding_window)
        elif sliding_window is not None:  # a token's index says as much
            visible = visible & (query - key < sliding_window)
        if shared_anchor:
            visible = visible | (causal & (key == 0))
        if own_anchor:
            visible = visible | (causal & (key == starts[batch, query]))
        return visible

    return mask


def in_pieces(pattern: str, *, interleaved: bool) -> bool:
    """Whether a unit lies in several pieces, others' between them."""
    return interleaved and PATTERNS[pattern].unit == "document"


def effective_window(layout: DocumentLayout, sliding_window: int | None) -> int | None:
    """`sliding_window`, or None where no unit is longer, so that it hides nothing."""
    if sliding_window is None or sliding_window >= layout.longest_unit:
        return None
    return sliding_window


def unit_ids(layout: DocumentLayout) -> Tensor:
    """(B, S) int32: the unit of each token, counted over the whole micro-batch."""
    if PATTERNS[layout.pattern].unit == "document":
        return layout.document_ids
    index = torch.arange(layout.document_ids.numel(), device=layout.unit_boundaries.device)
    ids = torch.bucketize(index, layout.unit_boundaries[1:], right=True, out_int32=True)
    return ids.view_as(layout.document_ids)


def _places(units: Tensor) -> Tensor:
    """(B, S) int64: where each token would lie if every unit's tokens lay together, in their order."""
    return units.flatten().argsort(stable=True).argsort().view_as(units)


def _document_numbers(layout: DocumentLayout, units: Tensor) -> Tensor:
    """(B, S) int64: the number of each token's document in its unit, in the order of their first tokens."""
    ids = layout.document_ids.long()
    is_first_piece = torch.zeros(len(layout.cu_seqlens) - 1, dtype=torch.long, device=ids.device)
    number = is_first_piece.index_fill(0, ids.flatten(), 1).cumsum(0)[ids]
    first_of_unit = number.flatten()[layout.unit_boundaries[:-1].long()]
    return number - first_of_unit[units.long()]


def attended_boundaries(layout: DocumentLayout) -> tuple[Tensor, int]:
    """The pattern as variable-length causal attention: (cu_seqlens int32, longest segment).

    Raises:
        ValueError: no set of segments says what the pattern attends to here (`check_segments`).
    """
    check_segments(
        layout.pattern,
        anchor_placement=layout.anchor_placement,
        interleaved=layout.interleaved,
    )
    return layout.unit_boundaries, layout.longest_unit


def check_segments(pattern: str, *, anchor_placement: str, interleaved: bool) -> None:
    """Raise `ValueError` where a pattern is more than causal attention inside consecutive segments."""
    if PATTERNS[pattern].sees is not None:
        raise ValueError(
            f"--attention_pattern {pattern} has a rule of its own for which documents see each other, and "
            "needs --attn_engine flex; the flash engine and the ring compute causal attention inside "
            "documents or rows"
        )
    if in_pieces(pattern, interleaved=interleaved):
        raise ValueError(
            "--interleave_chunks (given, or the rows were prepared with it) needs --attn_engine flex, which "
            "goes by document ids, or --micro_batch_tokens N, which puts the chunks back in order; the flash "
            "engine and the ring take documents that lie in one piece"
        )
    if anchor_placement == "shared":
        raise ValueError(
            "--anchor_placement shared, one anchor for all documents of a row, needs --attn_engine flex; "
            "the flash engine and the ring take rows packed with --anchor_placement per_document"
        )


def attended_length(pattern: str, *, longest_document: int, row_length: int) -> int:
    """Tokens of the longest piece that the pattern attends to as one."""
    return row_length if PATTERNS[pattern].unit == "row" else longest_document


# --- how many pairs that is ------------------------------------------------------------------------


def window_shares(windows: Windows) -> dict[int | None, float]:
    """Of every window, the share of the layers that have it."""
    return {window: n / len(windows) for window, n in Counter(windows).items()}


def causal_pairs(
    tokens: np.ndarray | int, *, windows: Windows = EVERYTHING, anchored: bool = False
) -> np.ndarray:
    """The (query, key) pairs of causal attention inside units, the mean over the layers.

    Args:
        tokens: (…) of each unit.
        windows: of the layers; only their shares count.
        anchored: whether a unit's first token is its anchor, which a window does not hide.

    Returns:
        (…) float64; a longer unit has no fewer.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    pairs = np.zeros_like(tokens)
    for window, share in window_shares(windows).items():
        of_layer = tokens * (tokens + 1) / 2
        if window is not None:
            # The first query behind the window misses one key, the next one two, …: the anchor among them.
            behind = np.maximum(tokens - window, 0)
            of_layer -= behind * (behind - 1 if anchored else behind + 1) / 2
        pairs += share * of_layer
    return pairs


def attended_pairs(
    lengths: np.ndarray,
    *,
    pattern: str,
    anchor_placement: str,
    documents: np.ndarray | None = None,
    windows: Windows = EVERYTHING,
) -> float:
    """The (query, key) pairs that one row of these documents attends to: the pattern's own work.

    Args:
        lengths: (pieces,) tokens of the row's documents, or of the chunks of interleaved ones, in order,
            padding included.
        documents: (pieces,) integers: the document of each chunk, 0, 1, …
        windows: of the model's layers; only their shares count.

    Returns:
        The mean over the layers.
    """
    check_pattern(pattern, anchor_placement)
    entry = PATTERNS[pattern]
    lengths = np.asarray(lengths, dtype=np.int64)
    documents = np.arange(len(lengths)) if documents is None else np.asarray(documents)
    if entry.sees is not None:
        row = (lengths, documents, entry.sees, anchor_placement)
        return sum(
            share * _pairs_by_rule(*row, window=window)
            for window, share in window_shares(windows).items()
        )
    row_length = lengths.sum()
    if entry.unit == "row":
        return float(causal_pairs(row_length, windows=windows))
    own_anchors = anchor_placement == "per_document"
    of_documents = np.bincount(documents, weights=lengths)
    pairs = causal_pairs(of_documents, windows=windows, anchored=own_anchors).sum()
    # Every token but the anchor itself (a document of its own) sees the shared anchor besides.
    return float(pairs + (row_length - 1) * (anchor_placement == "shared"))


def _pairs_by_rule(
    lengths: np.ndarray,
    documents: np.ndarray,
    sees: Callable,
    anchor_placement: str,
    *,
    window: int | None,
) -> int:
    """The same in one layer, of a pattern with a rule of its own: counted, piece by piece.

    Costs: pieces × pieces integers, several times.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths

    def apart(distance: int) -> np.ndarray:
        """(pieces, pieces): of a query in the one and a key in the other, those at least so far apart."""

        def outermost(before: np.ndarray, behind: np.ndarray) -> np.ndarray:
            """The same of all queries in front of `before` and all keys from `behind` on."""
            n = np.maximum(before[:, None] - behind - distance, 0)
            return n * (n + 1) // 2

        rest = outermost(starts, starts) + outermost(ends, ends) - outermost(starts, ends)
        return outermost(ends, starts) - rest

    near = apart(0) if window is None else apart(0) - apart(window)
    pairs = near * sees(documents[:, None], documents)
    if anchor_placement == "shared":
        pairs[1:, 0] = lengths[1:]  # the anchor is the first piece
    hidden_anchors = 0
    if anchor_placement == "per_document" and window is not None:
        _, first, document = np.unique(documents, return_index=True, return_inverse=True)
        hidden_anchors = np.clip(ends - starts[first][document] - window, 0, lengths).sum()
    return int(pairs.sum() + hidden_anchors)
