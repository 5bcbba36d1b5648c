"""Packing: which piece of which document goes into which row, and the rows laid of them.

A document is laid as its *body*, cut where rows end; in the placement `per_document` an anchor stands
before every piece. A strategy deals out pieces, and touches no token; `RowLayer` makes rows of them.

Guarantees: every strategy lays every body token exactly once, and pieces of one document in its order; a
piece that goes on elsewhere ends exactly at its row's end.
Costs: a few microseconds per piece.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from anchor_context.data.interleaving import interleave
from anchor_context.data.rows import NO_TOKEN, Row

POOL_TOKENS = 1 << 24
"""Tokens that `best_fit` looks at together; at least `POOL_ROWS` rows."""
POOL_ROWS = 64


class Body(NamedTuple):
    """A document as it is laid."""

    tokens: np.ndarray
    """(tokens,) int32, without an anchor of its own."""
    tag: int
    """How many of the first tokens are a tag: seen, but never a target."""
    own_anchor: bool
    """Whether the document brought the anchor of its first piece."""


class Piece(NamedTuple):
    """`body.tokens[start:stop]`, behind an anchor if the placement is `per_document`."""

    body: Body
    start: int
    stop: int
    first: bool
    """Whether the document begins here. A piece may be an anchor alone, so `start` does not tell."""

    @property
    def goes_on(self) -> bool:
        return self.stop < len(self.body.tokens)


def concat(bodies: Iterable[Body], *, room: int, anchor: int) -> Iterator[list[Piece]]:
    """Fill rows in order; a document cut by a row's end goes on in the next row.

    Args:
        room: tokens of a row that documents may fill, at least `anchor` + 1.
        anchor: tokens before every piece: 1 in the placement `per_document`, else 0.
    """
    row, free = [], room
    for body in bodies:
        at, length, first = 0, len(body.tokens), True
        while at < length or (first and anchor):
            stop = min(length, at + free - anchor)
            row.append(Piece(body, at, stop, first))
            free -= anchor + stop - at
            at, first = stop, False
            if not free:
                yield row
                row, free = [], room
    if row:
        yield row


def best_fit(bodies: Iterable[Body], *, room: int, anchor: int) -> Iterator[list[Piece]]:
    """Best-fit decreasing in a pool of documents: cuts only those longer than a row. Arguments as `concat`.

    A document longer than a row fills whole rows; its rest is packed like a short document.
    """
    per_row = room - anchor
    for pool in _pools(bodies, max(POOL_TOKENS, POOL_ROWS * room)):
        pieces = []
        for body in pool:
            length = len(body.tokens)
            whole = max(0, -(-length // per_row) - 1)
            for k in range(whole):
                yield [Piece(body, k * per_row, (k + 1) * per_row, k == 0)]
            if length or anchor:
                pieces.append(Piece(body, whole * per_row, length, whole == 0))
        yield from _best_fit_rows(pieces, room=room, anchor=anchor)


def _best_fit_rows(pieces: list[Piece], *, room: int, anchor: int) -> list[list[Piece]]:
    """Longest first, each into the row that it leaves the least room in; then in the data's order."""
    sizes = [anchor + piece.stop - piece.start for piece in pieces]
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in sorted(range(len(pieces)), key=lambda i: -sizes[i]):
        at = bisect_left(open_rows, (sizes[i], -1))
        if at < len(open_rows):
            free, row = open_rows.pop(at)
        else:
            free, row = room, len(rows)
            rows.append([])
        rows[row].append(i)
        if free > sizes[i]:
            insort(open_rows, (free - sizes[i], row))
    return [[pieces[i] for i in sorted(row)] for row in rows]


def _pools(bodies: Iterable[Body], tokens: int) -> Iterator[list[Body]]:
    pool, size = [], 0
    for body in bodies:
        pool.append(body)
        size += len(body.tokens)
        if size >= tokens:
            yield pool
            pool, size = [], 0
    if pool:
        yield pool


STRATEGIES = {"concat": concat, "best_fit": best_fit}


class RowLayer:
    """Turns documents into rows by a strategy, and keeps the account."""

    def __init__(
        self,
        *,
        row_length: int,
        anchor_placement: str,
        anchor_id: int,
        pad_id: int,
        interleave_seed: int | None = None,
    ):
        """With an `interleave_seed`, the chunks of each row's documents are shuffled by it."""
        self.row_length, self.anchor_placement = row_length, anchor_placement
        self.anchor_id, self.pad_id = anchor_id, pad_id
        self.interleave_seed = interleave_seed
        self.document_tokens = 0
        """Tokens of documents in the rows, anchors that they brought and tags included."""
        self.anchors_added = 0
        self.anchors_merged = 0
        """Anchors that documents brought, for which the row's shared one stands."""
        self.documents_cut = 0
        self.tag_tokens = 0
        self._rows = 0

    def rows(
        self,
        documents: Iterable[tuple[np.ndarray, int]],
        *,
        strategy: str,
        tags: list[np.ndarray] | None = None,
    ) -> Iterator[Row]:
        """The rows of the documents, each (tokens, its source's number).

        Args:
            strategy: one of `STRATEGIES`.
            tags: tokens to lay in front of every document, by its source.
        """
        lists_of_pieces = STRATEGIES[strategy](
            self._bodies(documents, tags),
            room=self.row_length - (self.anchor_placement == "shared"),
            anchor=int(self.anchor_placement == "per_document"),
        )
        return map(self._lay, lists_of_pieces)

    def _bodies(
        self, documents: Iterable[tuple[np.ndarray, int]], tags: list[np.ndarray] | None
    ) -> Iterator[Body]:
        for tokens, source in documents:
            brought = self.anchor_placement != "none" and bool(tokens[0] == self.anchor_id)
            self.anchors_merged += brought and self.anchor_placement == "shared"
            body = tokens[brought:]
            if tags is None:
                # A copy: a slice that waits for its row would hold its shard's file open.
                yield Body(body.copy(), 0, brought)
            else:
                tag = tags[source]
                yield Body(np.concatenate([tag, body]), len(tag), brought)

    def _lay(self, pieces: list[Piece]) -> Row:
        """One row of the pieces, padded at its end."""
        length, placement = self.row_length, self.anchor_placement
        tokens = np.full(length + 1, self.pad_id, np.int32)
        starts, untargeted, at = [], [], 0
        if placement == "shared":
            tokens[0] = self.anchor_id
            starts, untargeted, at = [0], [0], 1
            self.anchors_added += 1
        for body, start, stop, first in pieces:
            starts.append(at)
            if placement == "per_document":
                tokens[at] = self.anchor_id
                at += 1
                # The piece before this one predicted its first token already.
                untargeted.append(max(body.tag - start, int(not first)))
                own = int(first and body.own_anchor)
                self.anchors_added += 1 - own
                self.document_tokens += own
            else:
                untargeted.append(max(body.tag - start - 1, 0))
            tokens[at : at + stop - start] = body.tokens[start:stop]
            at += stop - start
            self.document_tokens += stop - start
            self.tag_tokens += max(0, min(stop, body.tag) - start)
        last = pieces[-1]
        self.documents_cut += last.first and last.goes_on
        tokens[length] = last.body.tokens[last.stop] if last.goes_on else NO_TOKEN
        pad_count = length - at
        if pad_count:
            starts.append(at)
            untargeted.append(0)
        row = Row(
            tokens=tokens,
            starts=np.array(starts, np.int32),
            untargeted=np.minimum(untargeted, np.diff([*starts, length])).astype(np.int32),
            documents=np.arange(len(starts), dtype=np.int32),
            pad_count=pad_count,
        )
        self._rows += 1
        if self.interleave_seed is not None:
            rng = np.random.default_rng((self.interleave_seed, self._rows))
            row = interleave(row, rng, goes_on=last.goes_on, shared=placement == "shared")
        return row
