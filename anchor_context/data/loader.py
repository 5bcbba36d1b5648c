"""Prepared rows -> micro-batches, step by step.

Guarantees: the rows of a step are those of its place in the stream (`stream.py`), however ranks share them.
A step also carries its global number of targets, known from the rows, so that the exact mean loss needs no
communication.
Costs: everything is built by vectorised numpy in a worker process, ahead of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from anchor_context.attention.patterns import EVERYTHING, Windows, attended_pairs
from anchor_context.data.collate import StepRows, collate
from anchor_context.data.context_schedule import ContextSchedule
from anchor_context.data.micro_batches import (
    Units,
    cut_rows,
    cut_units,
    deal_units,
    meets_every_forward,
    unit_kind,
    work_imbalance,
)
from anchor_context.data.rows import BLANK_ROW, PreparedRows, Row
from anchor_context.data.stream import RowOrder
from anchor_context.run.lifeline import live_with_rank


@dataclass(frozen=True)
class Dealing:
    """How the rows of a step become the micro-batches of data ranks."""

    micro_batch_tokens: int | None = None
    """At most so many tokens in a micro-batch: whole units of any of the step's rows. None: whole rows."""
    zero_stage: int = 0
    """DeepSpeed's, which decides where ranks wait for each other."""
    pair_price: float = 0.0
    """The work of a (query, key) pair in all layers; that of one token without attention is 1."""
    windows: Windows = EVERYTHING
    """Of the model's layers: what of the pairs they compute."""
    divisible_by: int = 1
    """Micro-batches of units are padded to a multiple of so many tokens, for the ranks that share one."""


@dataclass(eq=False)
class MicroBatches(IterableDataset):
    """The micro-batches of one data-parallel rank, ready for the model. See `make_loader`."""

    prepared: PreparedRows
    order: RowOrder
    _: KW_ONLY
    pattern: str
    batch_size: int
    data_rank: int
    data_degree: int
    first_row: int
    first_step: int
    context: ContextSchedule | None
    dealing: Dealing
    transform: Callable[[dict], dict] | None

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        assert worker is None or worker.num_workers == 1, "more workers would reorder micro-batches"
        first_row, steps_done, order = self.first_row, self.first_step, self.order
        cut = self._whole_rows if self.dealing.micro_batch_tokens is None else self._units
        while order.total_rows is None or first_row < order.total_rows:
            ids = order.step(first_row)
            for batch in cut(ids, self._step(ids, steps_done)):
                yield batch if self.transform is None else self.transform(batch)
            first_row += order.rows_per_step
            steps_done += 1

    def totals(self, steps: int) -> tuple[int, float]:
        """(tokens without padding, attended pairs) of the next `steps` steps, on all ranks."""
        per_step = self.order.rows_per_step
        ids = [self.order.step(self.first_row + step * per_step) for step in range(steps)]
        rows, times = np.unique(np.concatenate(ids), return_counts=True)
        used = [(int(row), int(n)) for row, n in zip(rows, times, strict=True) if row != BLANK_ROW]
        tokens = sum(
            n * (self.prepared.row_length - int(self.prepared.pad_counts[row])) for row, n in used
        )
        pairs = sum(n * self._pairs(row) for row, n in used)
        for step, of_step in enumerate(ids, start=self.first_step):
            if (context := self._context_length(step)) is not None:
                rows = [self.prepared.row(int(i)) for i in of_step]
                _, more_tokens, more_pairs = self._cut(rows, context=context)
                tokens, pairs = tokens + more_tokens, pairs + more_pairs
        return tokens, pairs

    def _step(self, ids: np.ndarray, steps_done: int) -> dict:
        """What all micro-batches of a step say of it, as its rows are prepared."""
        prepared, real = self.prepared, ids[ids != BLANK_ROW]
        return {
            "step_targets": int(prepared.target_counts[real].sum()),
            "step_tokens": len(real) * prepared.row_length - int(prepared.pad_counts[real].sum()),
            "step_pairs": sum(self._pairs(row) for row in real),
            "step_rows": ids.tolist(),
            "context_length": self._context_length(steps_done),
        }

    def _whole_rows(self, ids: np.ndarray, step: dict) -> Iterator[dict]:
        # (accumulation, data-parallel ranks, batch size)
        micro_batches = ids.reshape(-1, self.data_degree, self.batch_size)
        length = self.prepared.row_length
        cost = [length + self.dealing.pair_price * self._pairs(row) for row in ids]
        step = step | {
            "micro_batches": len(micro_batches),
            "work_imbalance": work_imbalance(
                np.reshape(cost, micro_batches.shape).sum(-1),
                meets_every_forward=meets_every_forward(self.dealing.zero_stage),
            ),
            "planned_tokens": self.batch_size * length,
        }
        for k, mine in enumerate(micro_batches[:, self.data_rank]):
            batch = collate(self.prepared, mine, pattern=self.pattern)
            yield batch | step | {"is_last": k == len(micro_batches) - 1}

    def _units(self, ids: np.ndarray, step: dict) -> Iterator[dict]:
        prepared, dealing = self.prepared, self.dealing
        rows = [prepared.row(int(i)) for i in ids]
        units, more_tokens, more_pairs = self._cut(rows, context=step["context_length"])
        step = step | {
            "step_tokens": step["step_tokens"] + more_tokens,
            "step_pairs": step["step_pairs"] + more_pairs,
        }
        plan = deal_units(
            units,
            data_ranks=self.data_degree,
            zero_stage=dealing.zero_stage,
            most_tokens=dealing.micro_batch_tokens,
            pair_price=dealing.pair_price,
        )
        step = step | {
            "micro_batches": plan.micro_batches,
            "work_imbalance": plan.work_imbalance,
        }
        source = StepRows(rows, self.pattern, prepared.anchor_placement, prepared.pad_id)
        for k, tokens in enumerate(plan.planned_tokens.tolist()):
            batch = source.collate(
                plan, rank=self.data_rank, index=k, divisible_by=dealing.divisible_by
            )
            padded = max(1, -(-tokens // dealing.divisible_by)) * dealing.divisible_by
            last = k == plan.micro_batches - 1
            yield batch | step | {"planned_tokens": padded, "is_last": last}

    def _cut(self, rows: list[Row], *, context: int | None) -> tuple[Units, int, float]:
        """The units of a step's rows, and the tokens and pairs that cutting documents at `context` adds to
        the rows': anchors, and fewer pairs."""
        kind = unit_kind(self.pattern, self.prepared.anchor_placement)
        uncut = cut_rows(rows, kind=kind, windows=self.dealing.windows)
        if context is None:
            return uncut, 0, 0
        units = cut_units(uncut, context=context)
        more_tokens, more_pairs = (
            (now.sum() - before.sum()).item()
            for now, before in ((units.tokens, uncut.tokens), (units.pairs, uncut.pairs))
        )
        return units, more_tokens, more_pairs

    def _context_length(self, steps_done: int) -> int | None:
        return None if self.context is None else self.context.length(steps_done)

    def _pairs(self, row: int) -> float:
        """The (query, key) pairs that the pattern attends to in one row, the mean over the layers."""
        starts, documents = self.prepared.row(row).pieces()
        return attended_pairs(
            np.diff(starts, append=self.prepared.row_length),
            documents=documents,
            pattern=self.pattern,
            anchor_placement=self.prepared.anchor_placement,
            windows=self.dealing.windows,
        )


def make_loader(
    prepared: PreparedRows,
    *,
    pattern: str,
    seed: int,
    batch_size: int,
    accumulation: int,
    data_rank: int,
    data_degree: int,
    first_row: int = 0,
    total_rows: int | None = None,
    first_step: int = 0,
    context: ContextSchedule | None = None,
    dealing: Dealing | None = None,
    transform: Callable[[dict], dict] | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """An iterable over the micro-batches of one data-parallel rank.

    Args:
        batch_size, accumulation: their product, times the data ranks, are the rows of a step; a micro-batch
            of whole rows has `batch_size` of them.
        first_row: rows that earlier steps have used (to resume).
        total_rows: end after so many rows, the last step filled up with blank ones; None: never end.
        first_step: steps that are done; the first to come has the `context` behind so many.
        context: cuts documents shorter, at a length that grows step by step; needs micro-batches of units.
        dealing: how a step's rows become micro-batches; None: `batch_size` whole rows each.
        transform: applied to each batch in the worker (sequence parallelism shards it there).

    Returns:
        Batches as `collate.py` makes them. With them go the step's `step_targets`, `step_tokens` (without
        padding), `step_pairs` (of attention, by the pattern and the layers' windows), `step_rows` (ids) and
        `context_length` (the most tokens that attention spans, where `context` cuts documents; else None);
        and of its cut `micro_batches` (how many each rank has), `is_last` (whether the step ends with this
        one), `planned_tokens` (the most tokens that any data rank has in it: the same number on all ranks)
        and `work_imbalance`.
    """
    dealing = dealing or Dealing()
    assert context is None or dealing.micro_batch_tokens is not None, "whole rows are not cut"
    order = RowOrder(
        rows=len(prepared),
        seed=seed,
        rows_per_step=batch_size * accumulation * data_degree,
        total_rows=total_rows,
    )
    batches = MicroBatches(
        prepared,
        order,
        pattern=pattern,
        batch_size=batch_size,
        data_rank=data_rank,
        data_degree=data_degree,
        first_row=first_row,
        first_step=first_step,
        context=context,
        dealing=dealing,
        transform=transform,
    )
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=1,
        prefetch_factor=4,
        pin_memory=pin_memory,
        worker_init_fn=live_with_rank,
        generator=torch.Generator(),  # else it draws from the global one, at every start and resume
    )


def one_step(batches: Iterator[dict]) -> Iterator[dict]:
    """The next step's micro-batches out of a loader's."""
    for batch in batches:
        yield batch
        if batch["is_last"]:
            return
