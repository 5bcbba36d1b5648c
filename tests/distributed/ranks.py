"""Runs a function on N gloo processes and hands its results back: the launcher of these tests."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(function: Callable, ranks: int, folder: Path, *arguments) -> list:
    """`[function(rank, ranks, *arguments)]` of every rank; raises if a rank fails."""
    mp.spawn(_main, (ranks, free_port(), str(folder), function, arguments), nprocs=ranks)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(ranks)]


def _main(rank: int, ranks: int, port: int, folder: str, function: Callable, arguments: tuple):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=TIMEOUT)
    result = function(rank, ranks, *arguments)
    torch.save(result, Path(folder) / f"rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
