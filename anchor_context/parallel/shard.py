"""Splits a micro-batch over the ranks that share its rows.

A rank gets `input_ids`, `labels` and `position_ids` of its own tokens. Labels were shifted before, so
no rank needs a neighbour's first token, and a rank's tokens may come from anywhere in the row: the
ring's planner places them (`plan.py`), and what it decided travels with the batch as a
`ShardedLayout`. Runs in a loader worker: the plan is made ahead, and costs no step time.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from anchor_context.attention.patterns import EVERYTHING, Windows, effective_window
from anchor_context.layout import DocumentLayout
from anchor_context.parallel.groups import RankGrid
from anchor_context.parallel.plan import BLOCKS_PER_RANK, local_tokens, plan_rows
from anchor_context.parallel.schedule import ShardedLayout, make_schedule

PER_TOKEN = ("input_ids", "labels", "position_ids", "target_positions")
"""The keys of a batch that hold one entry per token, (B, S), as far as they are there."""


def shard_batch(batch: dict, *, grid: RankGrid, windows: Windows = EVERYTHING) -> dict:
    """The part of `batch` that this rank computes: S / (ring × Ulysses) tokens of each row.

    `batch["layout"]` stays the layout of the whole rows; with a ring it carries the schedules besides, one
    for every window of the model's layers.

    Args:
        windows: of the model's layers, in any order (`calls.layer_windows`). Read where there is a ring.

    Raises:
        ValueError: the row length does not divide, or the rows have a shared anchor and a ring.
    """
    check_row_length(batch["input_ids"].shape[1], grid)
    per_token = [key for key in PER_TOKEN if key in batch]
    if grid.ring_degree == 1:
        return batch | {key: _ulysses_part(batch[key], grid) for key in per_token}

    layout = batch["layout"]
    windows = [effective_window(layout, window) for window in windows]
    plans = plan_rows(layout, ranks=grid.ring_degree, windows=windows)
    tokens = torch.from_numpy(local_tokens(plans, rank=grid.ring_rank))
    schedules = {
        window: make_schedule(plans, rank=grid.ring_rank, window=window)
        for window in dict.fromkeys(windows)
    }
    of_layout = {f.name: getattr(layout, f.name) for f in fields(DocumentLayout)}
    return batch | {
        **{key: _ulysses_part(batch[key].gather(1, tokens), grid) for key in per_token},
        "layout": ShardedLayout(**of_layout, schedules=schedules),
    }


def _ulysses_part(x: torch.Tensor, grid: RankGrid) -> torch.Tensor:
    """The contiguous (B, length / U) part of a (B, length) tensor that belongs to the Ulysses rank."""
    return x.chunk(grid.ulysses_degree, dim=1)[grid.ulysses_rank].contiguous()


def token_multiple(grid: RankGrid) -> int:
    """What the tokens of a micro-batch must be divisible by, so that each rank gets equally many: of a ring,
    in so many blocks that its planner has a choice."""
    blocks = BLOCKS_PER_RANK if grid.ring_degree > 1 else 1
    return grid.sequence_degree * blocks


def tokens_per_rank(tokens: int, grid: RankGrid) -> int:
    """What a rank holds of a micro-batch of so many tokens, its padding included."""
    multiple = token_multiple(grid)
    return -(-tokens // multiple) * multiple // grid.sequence_degree


def check_row_length(row_length: int, grid: RankGrid) -> None:
    """Raise `ValueError` unless every rank gets equally many tokens of a row."""
    if row_length % grid.sequence_degree:
        raise ValueError(
            f"--seq-length {row_length} is not divisible by the {grid.sequence_degree} ranks that "
            f"share a row (ring {grid.ring_degree} × Ulysses {grid.ulysses_degree}); "
            f"use {row_length - row_length % grid.sequence_degree} or change the degrees"
        )
