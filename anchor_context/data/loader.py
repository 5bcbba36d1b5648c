"""Prepared rows -> micro-batches: the order of rows, their labels and their layout.

Guarantees: the rows of a step, in order, depend on the data, the seed and the global batch alone, not
on how it is split into batch size × accumulation × data-parallel ranks. A step also carries its global
number of targets, known from the rows, so that the exact mean loss needs no communication.
Costs: everything is built by vectorised numpy in a worker process, ahead of the step.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from anchor_context.attention.patterns import attended_pairs, make_layout
from anchor_context.data.rows import BLANK_ROW, PreparedRows


@dataclass(frozen=True)
class RowOrder:
    """Which rows each step takes: seeded permutations of all rows, epoch after epoch.

    The stream of rows is cut into steps of `rows_per_step`. It ends after `total_rows` (None: never),
    filled up with blank rows.
    """

    rows: int
    seed: int
    rows_per_step: int
    total_rows: int | None

    def step(self, first_row: int) -> np.ndarray:
        """(rows_per_step,) int64: the row ids at positions first_row, first_row + 1, … of the stream."""
        place = np.arange(first_row, first_row + self.rows_per_step)
        ids = np.full(self.rows_per_step, BLANK_ROW, dtype=np.int64)
        for epoch in np.unique(place // self.rows):
            inside = place // self.rows == epoch
            ids[inside] = _epoch(self.rows, self.seed, int(epoch))[place[inside] % self.rows]
        if self.total_rows is not None:
            ids[place >= self.total_rows] = BLANK_ROW
        return ids


@lru_cache(maxsize=2)
def _epoch(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows in one epoch; kept, for millions of rows take a while to shuffle."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def stream_origin(prepared: PreparedRows, *, seed: int) -> dict[str, object]:
    """What the stream of rows depends on, by flag, as JSON holds it. How ranks share it is no part of it."""
    return prepared.origin | {"--seed": seed}


def check_same_stream(here: dict[str, object], there: dict[str, object]) -> None:
    """Raise `ValueError` where a place in the stream `there`, in rows, is another place `here`."""
    different = [
        f"{flag} is {here.get(flag)} here and was {there.get(flag)}"
        for flag in sorted(here.keys() | there.keys())
        if here.get(flag) != there.get(flag)
    ]
    if different:
        raise ValueError(
            f"--resume: the checkpoint stands at a place in other rows: {'; '.join(different)}. Going on "
            "here would repeat rows and leave others out: resume with what it was saved with, or train "
            "a saved model (--model_name_or_path …/step-N) in another --output-dir"
        )


class MicroBatches(IterableDataset):
    """The micro-batches of one data-parallel rank, ready for the model. See `make_loader`."""

    def __init__(
        self,
        prepared: PreparedRows,
        order: RowOrder,
        *,
        pattern: str,
        batch_size: int,
        data_rank: int,
        data_degree: int,
        first_row: int,
        transform: Callable[[dict], dict] | None,
    ):
        self.prepared, self.order, self.first_row = prepared, order, first_row
        self.transform, self.pattern = transform, pattern
        self.collate = partial(collate, prepared, pattern=pattern)
        self.batch_size, self.data_rank, self.data_degree = batch_size, data_rank, data_degree

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        assert worker is None or worker.num_workers == 1, "more workers would reorder micro-batches"
        first_row, order, prepared = self.first_row, self.order, self.prepared
        while order.total_rows is None or first_row < order.total_rows:
            ids = order.step(first_row)
            real = ids[ids != BLANK_ROW]
            targets = int(prepared.target_counts[real].sum())
            tokens = len(real) * prepared.row_length - int(prepared.pad_counts[real].sum())
            step = {
                "step_targets": targets,
                "step_tokens": tokens,
                "step_pairs": sum(self._pairs(row) for row in real),
                "step_rows": ids.tolist(),
            }
            # (accumulation, data-parallel ranks, batch size)
            for micro_ids in ids.reshape(-1, self.data_degree, self.batch_size)[:, self.data_rank]:
                batch = self.collate(micro_ids) | step
                yield batch if self.transform is None else self.transform(batch)
            first_row += order.rows_per_step

    def _pairs(self, row: int) -> int:
        """The (query, key) pairs that the pattern attends to in one row."""
        lengths = self.prepared.row(row).document_lengths()
        placement = self.prepared.anchor_placement
        return attended_pairs(lengths, pattern=self.pattern, anchor_placement=placement)


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
    transform: Callable[[dict], dict] | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """An iterable over the micro-batches of one data-parallel rank, `accumulation` of them per step.

    Args:
        batch_size: rows in a micro-batch.
        first_row: rows that earlier steps have used (to resume).
        total_rows: end after so many rows, the last step filled up with blank ones; None: never end.
        transform: applied to each batch in the worker (sequence parallelism shards it there).

    Returns:
        Batches as `collate` makes them, and with the whole step's `step_targets`, `step_tokens`
        (without padding), `step_pairs` (of attention, by the pattern) and `step_rows` (ids).
    """
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
        transform=transform,
    )
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=1,
        prefetch_factor=4,
        pin_memory=pin_memory,
        worker_init_fn=_heed_the_rank_alone,
        generator=torch.Generator(),  # else it draws from the global one, at every start and resume
    )


def _heed_the_rank_alone(_worker: int) -> None:
    """A scheduler signals data workers too, but their rank needs them to finish its step.

    They end with it, or by its SIGTERM, which multiprocessing sends when a rank leaves by an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def collate(prepared: PreparedRows, row_ids: np.ndarray, *, pattern: str) -> dict:
    """The rows as one micro-batch.

    Returns:
        input_ids, labels, position_ids: (B, S) int64; labels are shifted already and hold
        `IGNORE_INDEX` where there is no target. layout: of the whole rows. row_ids: list of int.
    """
    rows = [prepared.row(int(i)) for i in row_ids]
    length = prepared.row_length
    # Pieces and documents count over the whole micro-batch.
    pieces = [row.pieces() for row in rows]
    first_document = np.cumsum([0, *(documents.max() + 1 for _, documents in pieces)])
    layout = make_layout(
        np.concatenate([starts + b * length for b, (starts, _) in enumerate(pieces)]),
        documents=np.concatenate([ids + first_document[b] for b, (_, ids) in enumerate(pieces)]),
        batch_size=len(rows),
        row_length=length,
        pattern=pattern,
        anchor_placement=prepared.anchor_placement,
    )
    return {
        "input_ids": torch.from_numpy(
            np.stack([row.tokens[:length] for row in rows]).astype(np.int64)
        ),
        "labels": torch.from_numpy(np.stack([row.labels() for row in rows])),
        "position_ids": layout.position_ids,
        "layout": layout,
        "row_ids": [int(row) for row in row_ids],
    }
