"""How long ranks wait for each other: less inside a step once the first is done, in every process group."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from anchor_context.run import patience
from anchor_context.run.patience import BETWEEN_STEPS, IN_A_STEP, Patience, step_timeout


@pytest.fixture
def groups():
    """The default group, and one as a library makes it, whose time-out is the library's."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD, dist.new_group([0], timeout=timedelta(minutes=5))
    dist.destroy_process_group()


def timeouts(groups) -> set[timedelta]:
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_ranks_wait_less_in_a_step_but_not_in_the_first_nor_between_steps(groups):
    waiting = Patience()
    assert timeouts(groups) == {BETWEEN_STEPS}
    waiting.step_begins()
    assert timeouts(groups) == {BETWEEN_STEPS}, "the first step compiles"
    waiting.step_ends()
    assert timeouts(groups) == {BETWEEN_STEPS}, "a checkpoint may follow"
    for _ in range(2):
        waiting.step_begins()
        assert timeouts(groups) == {IN_A_STEP}
        later = dist.new_group([0])
        waiting.step_ends()
        assert timeouts((*groups, later)) == {BETWEEN_STEPS}


def test_a_slow_first_step_is_time_for_the_others(groups, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    waiting = Patience()
    waiting.step_begins()
    now[0] += 5 * 60
    waiting.step_ends()
    waiting.step_begins()
    assert timeouts(groups) == {timedelta(minutes=20)}
    assert step_timeout(timedelta(minutes=1)) == IN_A_STEP
    assert step_timeout(timedelta(hours=1)) == BETWEEN_STEPS
