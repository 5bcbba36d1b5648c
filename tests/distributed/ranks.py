"""Runs a function on N gloo processes and hands its results back; counts what they hand to each other."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Traffic(TorchDispatchMode):
    """Counts the bytes of all tensors that this process gives to torch.distributed, by operation.

    It listens where every communication passes on its way into torch's C++, whoever asked for it.
    """

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            name = operation._schema.name.removeprefix("c10d::")
            self.bytes[name] += sum(x.numel() * x.element_size() for x in tensors)
        return operation(*args, **(kwargs or {}))
