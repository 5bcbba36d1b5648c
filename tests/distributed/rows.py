"""The rows that sequence parallelism must get right, and batches made of them."""

from __future__ import annotations

import numpy as np
import torch

from anchor_context.attention import patterns
from anchor_context.attention.patterns import layout_of_units, make_layout
from anchor_context.layout import IGNORE_INDEX, DocumentLayout

ROW = 240
"""Tokens per row: 4 ranks of 60, in blocks of 10."""


def document_lengths(kind: str) -> list[int]:
    """The documents of one row."""
    edge = ROW // 4
    if kind == "one":
        return [ROW]
    if kind == "many":  # 200 documents
        return [1] * 180 + [3] * 20
    if kind == "ends_at_edge":
        return [edge, edge - 7, 7, 2 * edge]
    if kind == "one_token_at_edge":
        return [edge - 1, 1, 1, edge - 1, edge - 1, 1, edge]
    if kind == "primes":
        return [13, 101, 3, 31, 61, 7, 5, 19]
    if kind == "units":
        return [50, 31, 2, 77, 53, 27]
    raise AssertionError(kind)


KINDS = ("one", "many", "ends_at_edge", "one_token_at_edge", "primes")
PATTERNS = tuple(
    (name, pattern.placement("per_document")) for name, pattern in patterns.PATTERNS.items()
)


UNITS = ("units",)
"""No row, but a micro-batch of the documents of three rows end to end."""


def layout_of(kinds: tuple[str, ...], *, pattern: str, placement: str) -> DocumentLayout:
    """A layout of one row per kind, or of `UNITS`."""
    lengths = np.concatenate([document_lengths(kind) for kind in kinds])
    assert lengths.sum() == ROW * len(kinds)
    if kinds == UNITS:
        return layout_of_units(
            lengths,
            np.arange(ROW),
            pattern=pattern,
            anchor_placement=placement,
            rows=np.array([0, 0, 0, 1, 1, 2]),
        )
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    return make_layout(
        starts, batch_size=len(kinds), row_length=ROW, pattern=pattern, anchor_placement=placement
    )


def batch_of(
    kinds: tuple[str, ...], *, pattern: str, placement: str, vocabulary: int, padding: int = 0
) -> dict:
    """Random tokens over a layout, with targets inside documents.

    `padding` takes the targets of that many last tokens of the last row.
    """
    layout = layout_of(kinds, pattern=pattern, placement=placement)
    generator = torch.Generator().manual_seed(len(kinds))
    tokens = torch.randint(vocabulary, (len(kinds), ROW), generator=generator)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    same = layout.document_ids[:, 1:] == layout.document_ids[:, :-1]
    labels[:, :-1] = tokens[:, 1:].where(same, IGNORE_INDEX)
    if padding:
        labels[-1, -padding:] = IGNORE_INDEX
    return {
        "input_ids": tokens,
        "labels": labels,
        "position_ids": layout.position_ids,
        "layout": layout,
    }
