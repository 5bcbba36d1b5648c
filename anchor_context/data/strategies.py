"""Which piece of which document goes into which row.

A document is laid as its *body*, cut where rows end; in the placement `per_document` an anchor stands
before every piece. Rows come out as lists of pieces; nothing here touches a token.

Guarantees: both strategies lay every body token exactly once, and pieces of one document in its order; a
piece that goes on elsewhere ends exactly at its row's end.
Costs: a few microseconds per piece.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

STRATEGIES = ("concat", "best_fit")

WINDOW_TOKENS = 1 << 24
"""Tokens that `best_fit` looks at together; at least `WINDOW_ROWS` rows."""
WINDOW_ROWS = 64


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
    """Best-fit decreasing inside a window: cuts only documents longer than a row. Arguments as `concat`.

    A document longer than a row fills whole rows; its rest is packed like a short document.
    """
    per_row = room - anchor
    for window in _windows(bodies, max(WINDOW_TOKENS, WINDOW_ROWS * room)):
        pieces = []
        for body in window:
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


def _windows(bodies: Iterable[Body], tokens: int) -> Iterator[list[Body]]:
    window, size = [], 0
    for body in bodies:
        window.append(body)
        size += len(body.tokens)
        if size >= tokens:
            yield window
            window, size = [], 0
    if window:
        yield window
