"""A rank that dies makes the others stop with an error, not wait for ever.

The groups' timeout is left at half an hour: what ends the wait is the dead rank's closed connection.
"""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import free_port
from rows import ROW, layout_of

from anchor_context.engine import make_engine
from anchor_context.parallel.groups import make_grid, make_groups
from anchor_context.parallel.shard import shard_batch

RANKS, VICTIM = 4, 2
A_MINUTE = 60


def attend_for_ever(rank: int, port: int, degrees: tuple[int, int]):
    """Steps of attention; in the third, the victim dies between forward and backward."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(minutes=30))
    grid = make_grid(rank=rank, world_size=RANKS, ring_degree=degrees[0], ulysses_degree=degrees[1])
    ring_group, ulysses_group = make_groups(grid, rank=rank, world_size=RANKS)
    engine = make_engine(
        "flash",
        device=torch.device("cpu"),
        dtype=torch.float32,
        grid=grid,
        ring_group=ring_group,
        ulysses_group=ulysses_group,
    )
    index = torch.arange(ROW)[None]
    layout = layout_of(("one",), pattern="anchor", placement="per_document")
    batch = {"input_ids": index, "labels": index, "position_ids": index, "layout": layout}
    batch = shard_batch(batch, grid=grid)
    for step in range(10**9):
        q = torch.randn(1, 4, ROW // RANKS, 16, requires_grad=True)
        out = engine.attend(q, q, q, batch["layout"], scale=0.25)
        if step == 2 and rank == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)
        out.sum().backward()


@pytest.mark.parametrize("degrees", [(4, 1), (2, 2)])
def test_the_other_ranks_stop_with_an_error_within_a_minute(degrees):
    context = mp.get_context("spawn")
    port = free_port()
    processes = [
        context.Process(target=attend_for_ever, args=(rank, port, degrees)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    try:
        victim, others = processes[VICTIM], [p for p in processes if p is not processes[VICTIM]]
        victim.join(
            5 * A_MINUTE
        )  # starting processes takes what it takes; the minute counts from here
        deadline = time.monotonic() + A_MINUTE
        assert victim.exitcode == -signal.SIGKILL
        for process in others:
            process.join(max(0, deadline - time.monotonic()))
        assert [process.exitcode for process in others] == [1, 1, 1]
    finally:
        for process in processes:
            process.kill()
