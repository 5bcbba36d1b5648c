"""How long ranks wait for each other before they take one for hung.

Inside a step they meet within seconds of each other, and ten minutes are plenty. The first step also waits
for compilers, for kernels that are tuned and for data that is read for the first time; between steps one rank
may write a checkpoint or a model while the others wait for it. There it is half an hour.

    patience = Patience()        # half an hour, in all process groups
    while …:
        patience.step_begins()   # ten minutes, but not in the first step
        …
        patience.step_ends()     # half an hour

Guarantees: where the first step took long, the others have four times as long, so that a slow machine is not
taken for a hung one. A rank that dies is found at once, whatever the time-out: its connections close.
Costs: some ten microseconds per step and process group.
"""

from __future__ import annotations

import time
from datetime import timedelta

# Neither has a public name; the time-out of a group that exists cannot be changed otherwise.
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

BETWEEN_STEPS = timedelta(minutes=30)
IN_A_STEP = timedelta(minutes=10)


def step_timeout(first_step: timedelta) -> timedelta:
    """The time-out inside a step, when the first one took so long."""
    return min(BETWEEN_STEPS, max(IN_A_STEP, 4 * first_step))


class Patience:
    """The time-out of all collectives of this process, in whatever group. To be made once the groups are."""

    def __init__(self):
        self._in_a_step: timedelta | None = None  # known after the first step
        self._began = 0.0
        set_timeout(BETWEEN_STEPS)

    def step_begins(self) -> None:
        self._began = time.monotonic()
        if self._in_a_step is not None:
            set_timeout(self._in_a_step)

    def step_ends(self) -> None:
        if self._in_a_step is None:
            self._in_a_step = step_timeout(timedelta(seconds=time.monotonic() - self._began))
        set_timeout(BETWEEN_STEPS)


def set_timeout(timeout: timedelta) -> None:
    """Of every collective that this process starts from here on; DeepSpeed has groups of its own."""
    for group in list(_world.pg_map):
        _set_pg_timeout(timeout, group)
