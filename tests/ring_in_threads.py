"""A whole ring, or Ulysses, in one process: a thread per rank, mailboxes for the network, one device for all.

What crosses ranks and what each computes is the real code; only `torch.distributed` is played. So the ring's
kernel calls (rectangles, not only causal spans) can be held to the reference on one GPU, or on a CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from yunchang.comm import all_to_all

from anchor_context.attention import flash, reference
from anchor_context.attention.kernels import Kernel
from anchor_context.attention.kernels.sinks import gradient_of_sinks
from anchor_context.attention.patterns import PATTERNS, make_layout
from anchor_context.layout import DocumentLayout
from anchor_context.parallel import ring, ulysses
from anchor_context.parallel.groups import make_grid
from anchor_context.parallel.plan import local_tokens, plan_rows
from anchor_context.parallel.shard import shard_batch
from anchor_context.parallel.traffic import Traffic

ROW = 384
LAYOUTS = {
    "one": [[384]],
    "four": [[1, 128, 55, 200]],
    "across every edge by one": [[97, 96, 96, 95]],  # rectangles of a single query
    "batch": [[384], [2] * 192],
}
"""Documents of each row."""
SECONDS = 60
"""A message that has not come by then will not come."""


class Network:
    """`torch.distributed`'s part that ring and Ulysses use. Messages between two ranks arrive in order."""

    isend, irecv = "isend", "irecv"

    def __init__(self, ranks: int):
        self.ranks, self.own = ranks, threading.local()
        # All of them now: two threads that made one at the same time would have two.
        self.mailboxes = {pair: Queue() for pair in product(range(ranks), repeat=2)}
        self.crossed: set[tuple[int, int]] = set()
        """The pairs of ranks of which one sent to the other."""

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

    def all_to_all_single(self, output: Tensor, tensor: Tensor, group=None) -> None:
        for peer in range(self.ranks):
            self._post(self.isend, tensor[peer], peer)
        for peer in range(self.ranks):
            self._post(self.irecv, output[peer], peer).wait()

    def run(self, of_rank: Callable[[int], object]) -> list:
        """`[of_rank(rank)]` of every rank, each in a thread of its own."""

        def on_own_thread(rank: int):
            self.own.rank = rank
            return of_rank(rank)

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(self.ranks) as pool:
            for module in (ring, ulysses, all_to_all):
                patch.setattr(module, "dist", self)
            return list(pool.map(on_own_thread, range(self.ranks)))

    def _post(self, operation: str, tensor: Tensor, peer: int):
        if operation == self.isend:
            self.mailboxes[self.own.rank, peer].put(tensor.clone())
            self.crossed.add((self.own.rank, peer))
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
        anchor_placement=PATTERNS[pattern].placement("per_document"),
    )


def errors_of_ring(
    layout: DocumentLayout,
    kernel: Kernel,
    *,
    ranks: int,
    device: torch.device,
    dtype: torch.dtype,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> dict[str, float]:
    """{out, dq, dk, dv: error} of a ring of `ranks`, against the dense float64 reference, relative to it
    (where it is 0, as are dq and dk if a query sees itself alone: to dv).

    With `sinks` (4,), dsinks as well, which is the sum over ranks.
    """
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int) -> Tensor:
        shape = (layout.batch_size, layout.row_length, heads, 64)
        return torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2)

    whole = [tensor(4), tensor(2), tensor(2)]  # grouped heads
    grad = tensor(4)
    wide = [x.double().requires_grad_() for x in whole]
    logits = None if sinks is None else sinks.double().to(device).requires_grad_()
    seen = {"sliding_window": window, "sinks": logits}
    out = reference.attend(*wide, layout.to(device), scale=0.125, **seen)
    out.backward(grad.double())
    expected = [out.detach(), *(x.grad for x in wide)]

    network, of_sinks = Network(ranks), []
    windows = (window, None)  # as of a model whose layers differ
    plans = plan_rows(layout, ranks=ranks, windows=windows)
    places = [
        torch.from_numpy(local_tokens(plans, rank=rank)).to(device)[:, None, :, None]
        for rank in range(ranks)
    ]
    empty = torch.zeros(layout.batch_size, layout.row_length, dtype=torch.long)
    batch = {"input_ids": empty, "labels": empty, "position_ids": empty, "layout": layout}

    def of_rank(rank: int) -> list[Tensor]:
        grid = make_grid(rank=rank, world_size=ranks, ring_degree=ranks, ulysses_degree=1)

        def here(x: Tensor) -> Tensor:
            """(B, H, S, D) -> this rank's (B·L, H, D)."""
            return flash.flatten_rows(x.gather(2, places[rank].expand(-1, x.shape[1], -1, 64)))

        mine = [here(x) for x in whole]
        own = shard_batch(batch, grid=grid, windows=windows)["layout"].to(device)
        schedule = own.schedule_of(window)
        # Not through autograd, whose one thread per GPU would serve the ranks one after the other.
        settings = {"kernel": kernel, "group": None, "traffic": Traffic(), "scale": 0.125}
        own_sinks = None if sinks is None else sinks.to(device, dtype)
        out, lse, received = ring.ring_forward(*mine, schedule, own_sinks, **settings)
        gradients = ring.ring_backward(here(grad), *mine, out, lse, received, schedule, **settings)
        if sinks is not None:
            of_sinks.append(gradient_of_sinks(here(grad), out, lse, own_sinks))
        return [x.unflatten(0, (layout.batch_size, -1)) for x in (out, *gradients)]

    found = network.run(of_rank)
    assert network.crossed or window == 1, "nothing crossed ranks"
    errors = {}
    for number, name in enumerate(("out", "dq", "dk", "dv")):
        together = torch.zeros_like(expected[number])
        for place, parts in zip(places, found, strict=True):
            part = parts[number].double().transpose(1, 2)
            together.scatter_(2, place.expand_as(part), part)
        size = expected[number].norm() or expected[-1].norm()
        errors[name] = ((together - expected[number]).norm() / size).item()
    if sinks is not None:
        together = torch.stack(of_sinks).double().sum(0)
        errors["dsinks"] = ((together - logits.grad).norm() / logits.grad.norm()).item()
    return errors
