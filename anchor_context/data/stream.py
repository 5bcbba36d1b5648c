"""The stream of rows: which ones each step takes, and whether two runs count places in the same stream.

Guarantees: the rows of a step, in order, depend on the data, the seed and the global batch alone, not
on how it is split into batch size × accumulation × data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from anchor_context.data.fingerprint import origin
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
    return origin(prepared.fingerprint) | {"--seed": seed}


def check_same_stream(here: dict[str, object], there: dict[str, object]) -> None:
    """Raise `ValueError` where a place in the stream `there`, in rows, is another place `here`."""
    different = [
        f"{flag} is {mine} here and was {other}" for flag, mine, other in _differences(here, there)
    ]
    if different:
        raise ValueError(
            f"--resume: the checkpoint stands at a place in other rows: {'; '.join(different)}. Going on "
            "here would repeat rows and leave others out: resume with what it was saved with, or train "
            "a saved model (--model_name_or_path …/step-N) in another --output-dir"
        )


def check_machines_agree(streams: list[dict[str, object]]) -> None:
    """Raise `ValueError` unless all ranks have the rows of the first one's stream."""
    for rank, stream in enumerate(streams):
        for flag, first, other in _differences(streams[0], stream):
            raise ValueError(
                f"the machines prepared different rows: {flag} is {first} on rank 0 and {other} on rank "
                f"{rank}. Give all machines the same files, or one --cache_dir that they share"
            )


def _differences(here: dict[str, object], there: dict[str, object]) -> list[tuple]:
    """(flag, its value here, its value there) where they differ."""
    flags = sorted(here.keys() | there.keys())
    return [(f, here.get(f), there.get(f)) for f in flags if here.get(f) != there.get(f)]
