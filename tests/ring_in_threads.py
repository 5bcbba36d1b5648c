"""A whole ring in one process: a thread per rank, mailboxes for the network, one device for all.

What crosses ranks and what each computes is the real code; only `torch.distributed` is played. So the ring's
kernel calls (rectangles, not only causal spans) can be held to the reference on one GPU, or on a CPU.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from anchor_context.attention import flash, reference
from anchor_context.attention.kernels import Kernel
from anchor_context.attention.patterns import make_layout
from anchor_context.layout import DocumentLayout
from anchor_context.parallel import ring
from anchor_context.parallel.account import CommAccount
from anchor_context.parallel.groups import make_grid
from anchor_context.parallel.schedule import local_tokens, plan_rows
from anchor_context.parallel.shard import shard_batch

ROW = 384
LAYOUTS = {
    "one": [[384]],
    "four": [[1, 130, 53, 200]],
    "across every edge by one": [[97, 96, 96, 95]],  # rectangles of a single query
    "batch": [[384], [2] * 192],
}
"""Documents of each row."""
SECONDS = 60
"""A message that has not come by then will not come."""


class Network:
    """`torch.distributed`'s part that the ring uses. Messages between two ranks arrive in order."""

    isend, irecv = "isend", "irecv"

    def __init__(self, ranks: int):
        self.ranks, self.own = ranks, threading.local()
        self.mailboxes: dict[tuple[int, int], Queue] = defaultdict(Queue)

    def get_rank(self, group) -> int:
        return self.own.rank

    def get_world_size(self, group) -> int:
        return self.ranks

    def get_global_rank(self, group, rank: int) -> int:
        return rank

    def barrier(self, group) -> None:
        pass

    def P2POp(self, operation: str, tensor: Tensor, peer: int, group) -> tuple:
        return operation, tensor, peer

    def batch_isend_irecv(self, operations: list[tuple]) -> list:
        return [self._post(*operation) for operation in operations]

    def _post(self, operation: str, tensor: Tensor, peer: int):
        if operation == self.isend:
            self.mailboxes[self.own.rank, peer].put(tensor.clone())
            return SimpleNamespace(wait=lambda: None)
        mailbox = self.mailboxes[peer, self.own.rank]
        return SimpleNamespace(wait=lambda: tensor.copy_(mailbox.get(timeout=SECONDS)))


def layout_of(name: str, *, pattern: str) -> DocumentLayout:
    """The layout of `LAYOUTS[name]`, documents starting with their anchors where the pattern has one."""
    rows = [np.cumsum([0, *lengths[:-1]]) for lengths in LAYOUTS[name]]
    return make_layout(
        np.concatenate([starts + number * ROW for number, starts in enumerate(rows)]),
        batch_size=len(rows),
        row_length=ROW,
        pattern=pattern,
        anchor_placement="per_document" if pattern == "anchor" else "none",
    )


def errors_of_ring(
    layout: DocumentLayout, kernel: Kernel, *, ranks: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """{out, dq, dk, dv: relative error} of a ring of `ranks`, against the dense float64 reference."""
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int) -> Tensor:
        shape = (layout.batch_size, layout.row_length, heads, 64)
        return torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2)

    whole = [tensor(4), tensor(2), tensor(2)]  # grouped heads
    grad = tensor(4)
    wide = [x.double().requires_grad_() for x in whole]
    out = reference.attend(*wide, layout.to(device), scale=0.125)
    out.backward(grad.double())
    expected = [out.detach(), *(x.grad for x in wide)]

    network = Network(ranks)
    plans = plan_rows(layout, ranks=ranks)
    places = [
        torch.from_numpy(local_tokens(plans, rank=rank)).to(device)[:, None, :, None]
        for rank in range(ranks)
    ]
    empty = torch.zeros(layout.batch_size, layout.row_length, dtype=torch.long)
    batch = {"input_ids": empty, "labels": empty, "position_ids": empty, "layout": layout}

    def of_rank(rank: int) -> list[Tensor]:
        network.own.rank = rank
        grid = make_grid(rank=rank, world_size=ranks, ring_degree=ranks, ulysses_degree=1)

        def here(x: Tensor) -> Tensor:
            """(B, H, S, D) -> this rank's (B·L, H, D)."""
            return flash.flatten_rows(x.gather(2, places[rank].expand(-1, x.shape[1], -1, 64)))

        mine = [here(x) for x in whole]
        own = shard_batch(batch, grid=grid)["layout"].to(device)
        # Not through autograd, whose one thread per GPU would serve the ranks one after the other.
        settings = {"kernel": kernel, "group": None, "account": CommAccount(), "scale": 0.125}
        out, lse, received = ring.ring_forward(*mine, own.schedule, **settings)
        gradients = ring.ring_backward(
            here(grad), *mine, out, lse, received, own.schedule, **settings
        )
        return [x.unflatten(0, (layout.batch_size, -1)) for x in (out, *gradients)]

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(ranks) as pool:
        patch.setattr(ring, "dist", network)
        found = list(pool.map(of_rank, range(ranks)))

    assert network.mailboxes, "nothing crossed ranks"
    errors = {}
    for number, name in enumerate(("out", "dq", "dk", "dv")):
        together = torch.zeros_like(expected[number])
        for place, parts in zip(places, found, strict=True):
            part = parts[number].double().transpose(1, 2)
            together.scatter_(2, place.expand_as(part), part)
        errors[name] = ((together - expected[number]).norm() / expected[number].norm()).item()
    return errors
