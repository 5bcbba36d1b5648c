"""Splits a micro-batch over the ranks that share its rows.

A rank gets `input_ids`, `labels` and `position_ids` of its own tokens. Labels were shifted before, so
no rank needs a neighbour's first token, and a rank's tokens may come from anywhere in the row: the
ring's planner places them (`plan.py`), and what it decided travels with the batch as a
`ShardedLayout`. Runs in a loader worker: the plan is made ahead, and costs no step time.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from anchor_context.layout import DocumentLayout
from anchor_context.parallel.groups import RankGrid
from anchor_context.parallel.schedule import ShardedLayout, local_tokens, make_schedule, plan_rows

PER_TOKEN = ("input_ids", "labels", "position_ids")
"""The keys of a batch that hold one entry per token, (B, S)."""


def shard_batch(batch: dict, *, grid: RankGrid) -> dict:
    """The part of `batch` that this rank computes: S / (ring × Ulysses) tokens of each row.

    `batch["layout"]` stays the layout of the whole rows; with a ring it carries the schedule besides.

    Raises:
        ValueError: the row length does not divide, or the rows have a shared anchor and a ring.
    """
    check_row_length(batch["input_ids"].shape[1], grid)
    if grid.ring_degree == 1:
        return batch | {key: _ulysses_part(batch[key], grid) for key in PER_TOKEN}

    layout = batch["layout"]
    plans = plan_rows(layout, ranks=grid.ring_degree)
    tokens = torch.from_numpy(local_tokens(plans, rank=grid.ring_rank))
    schedule = make_schedule(plans, rank=grid.ring_rank)
    of_layout = {f.name: getattr(layout, f.name) for f in fields(DocumentLayout)}
    return batch | {
        **{key: _ulysses_part(batch[key].gather(1, tokens), grid) for key in PER_TOKEN},
        "layout": ShardedLayout(**of_layout, schedule=schedule),
    }


def _ulysses_part(x: torch.Tensor, grid: RankGrid) -> torch.Tensor:
    """The contiguous (B, length / U) part of a (B, length) tensor that belongs to the Ulysses rank."""
    return x.chunk(grid.ulysses_degree, dim=1)[grid.ulysses_rank].contiguous()


def check_row_length(row_length: int, grid: RankGrid) -> None:
    """Raise `ValueError` unless every rank gets equally many tokens of a row."""
    if row_length % grid.sequence_degree:
        raise ValueError(
            f"--seq-length {row_length} is not divisible by the {grid.sequence_degree} ranks that "
            f"share a row (ring {grid.ring_degree} × Ulysses {grid.ulysses_degree}); "
            f"use {row_length - row_length % grid.sequence_degree} or change the degrees"
        )
