"""Interleaved chunks (an ablation of arXiv 2411.13476): short documents, split and shuffled by row.

Guarantees: the tokens of the row are the same; each document's chunks keep their order, so causality
holds; a document that goes on in another row keeps its place at the row's end.
Costs: one gather per row.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from anchor_context.data.rows import Row

SHORTEST, LONGEST = 64, 2048
"""Documents of so many tokens, both ends included, are split into two or three chunks."""


def interleave(row: Row, rng: np.random.Generator, *, goes_on: bool, shared: bool) -> Row:
    """The same documents in shuffled chunks.

    Documents of other lengths stay whole, and move as one chunk.

    Args:
        row: its pieces are whole documents, or parts cut by a row's end.
        goes_on: whether the last document goes on in another row.
        shared: whether the row begins with a shared anchor, which stays where it is.
    """
    stops = row.ends
    fixed_head = int(shared)
    fixed_tail = int(goes_on or row.pad_count > 0)
    moving = range(fixed_head, len(row.starts) - fixed_tail)

    chunks = []  # per document: (start, stop) of its chunks, in order
    for piece in moving:
        start, stop = int(row.starts[piece]), int(stops[piece])
        cuts: list[int] = []
        if SHORTEST <= stop - start <= LONGEST:
            cuts = sorted(rng.choice(np.arange(start + 1, stop), rng.integers(1, 3), replace=False))
        edges = [start, *map(int, cuts), stop]
        chunks.append(list(pairwise(edges)))
    slots = np.repeat(np.arange(len(chunks)), [len(of_piece) for of_piece in chunks])
    rng.shuffle(slots)

    head = [(piece, int(row.starts[piece]), int(stops[piece])) for piece in range(fixed_head)]
    tail = [
        (piece, int(row.starts[piece]), int(stops[piece]))
        for piece in range(len(row.starts) - fixed_tail, len(row.starts))
    ]
    queues = [iter(of_piece) for of_piece in chunks]
    middle = [(fixed_head + slot, *next(queues[slot])) for slot in slots.tolist()]

    pieces, starts, ends = (np.array(column) for column in zip(*head, *middle, *tail, strict=True))
    tokens = np.concatenate(
        [row.tokens[a:b] for a, b in zip(starts, ends, strict=True)] + [row.tokens[row.length :]]
    )
    # A chunk's share of its document's leading positions without a target.
    left = row.untargeted[pieces] - (starts - row.starts[pieces])
    return Row(
        tokens=tokens,
        starts=np.concatenate([[0], np.cumsum(ends - starts)[:-1]]).astype(np.int32),
        untargeted=np.clip(left, 0, ends - starts).astype(np.int32),
        documents=_by_first_appearance(pieces),
        pad_count=row.pad_count,
    )


def _by_first_appearance(numbers: np.ndarray) -> np.ndarray:
    """Renumber 0, 1, ... in the order in which the numbers first appear, (pieces,) int32."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int32)
