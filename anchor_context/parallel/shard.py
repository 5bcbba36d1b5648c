"""Splits a micro-batch over the ranks that share its rows.

A rank gets `input_ids`, `labels` and `position_ids` of its own tokens; the layout stays that of the
whole rows. Labels were shifted before, so no rank needs its neighbour's first token.
"""

from __future__ import annotations

from anchor_context.parallel.groups import RankGrid

PER_TOKEN = ("input_ids", "labels", "position_ids")
"""The keys of a batch that hold one entry per token, (B, S)."""


def shard_batch(batch: dict, *, grid: RankGrid) -> dict:
    """The part of `batch` that this rank computes: contiguous tokens, S / (ring × Ulysses) of each row.

    Raises:
        ValueError: the row length does not divide.
    """
    row_length = batch["input_ids"].shape[1]
    check_row_length(row_length, grid)
    length = row_length // grid.sequence_degree
    start = (grid.ring_rank * grid.ulysses_degree + grid.ulysses_rank) * length
    local = {key: batch[key][:, start : start + length].contiguous() for key in PER_TOKEN}
    return batch | local


def check_row_length(row_length: int, grid: RankGrid) -> None:
    """Raise `ValueError` unless every rank gets equally many tokens of a row."""
    if row_length % grid.sequence_degree:
        raise ValueError(
            f"--seq-length {row_length} is not divisible by the {grid.sequence_degree} ranks that "
            f"share a row (ring {grid.ring_degree} × Ulysses {grid.ulysses_degree}); "
            f"use {row_length - row_length % grid.sequence_degree} or change the degrees"
        )
