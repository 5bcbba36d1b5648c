"""Sending overlaps computing: the order in which the ring posts, computes and waits.

A fake `torch.distributed` and a fake kernel write down what is called; sizes tell which part it is for.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anchor_context.parallel import ring
from anchor_context.parallel.plan import plan_row
from anchor_context.parallel.schedule import RingSchedule, make_schedule
from anchor_context.parallel.traffic import Traffic

RANKS, RANK, HEADS, HEAD_DIM = 4, 1, 2, 8
ROW = 64


class Request:
    def __init__(self, calls: list, what: tuple):
        self.calls, self.what = calls, what

    def wait(self) -> None:
        self.calls.append(("wait", *self.what))


class Kernel:
    """Zeros of the right shapes."""

    def __init__(self, calls: list):
        self.calls = calls

    def forward(self, q, k, v, spans, *, causal, **settings):
        self.calls.append(("causal",) if causal else ("rectangles", len(k)))
        return torch.zeros_like(q), torch.zeros(q.shape[1], len(q))

    def backward(self, dout, q, k, v, out, lse, spans, *, causal, **settings):
        self.calls.append(("causal",) if causal else ("rectangles", len(k)))
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    made: list[tuple] = []

    def post(operations: list[tuple]) -> list[Request]:
        made.extend(("post", *operation) for operation in operations)
        return [Request(made, operation) for operation in operations]

    distributed = SimpleNamespace(
        get_rank=lambda group: RANK,
        get_world_size=lambda group: RANKS,
        get_global_rank=lambda group, rank: rank,
        isend="isend",
        irecv="irecv",
        P2POp=lambda operation, tensor, peer, group: (operation, peer, tensor.shape[1]),
        batch_isend_irecv=post,
    )
    monkeypatch.setattr(ring, "dist", distributed)
    return made


def one_document() -> RingSchedule:
    """Zigzag: every rank sends to, and receives from, every other."""
    schedule = make_schedule([plan_row(np.array([0, ROW]), ranks=RANKS)], rank=RANK)
    assert all(exchange.send.numel() for exchange in schedule.exchanges[1:])
    assert all(len(exchange.parts) == 1 for exchange in schedule.exchanges)
    return schedule


def tensor(tokens: int = ROW // RANKS) -> torch.Tensor:
    return torch.zeros(tokens, HEADS, HEAD_DIM)


def settings(calls: list) -> dict:
    return {"kernel": Kernel(calls), "group": None, "traffic": Traffic(), "scale": 1.0}


def test_the_forward_posts_every_message_before_it_computes_and_waits_only_for_the_next(calls):
    schedule = one_document()
    ring.ring_forward(tensor(), tensor(), tensor(), schedule, **settings(calls))
    others = [(n, exchange) for n, exchange in enumerate(schedule.exchanges) if n > 0]

    expected = []
    for number, exchange in others:
        expected.append(("post", "isend", (RANK + number) % RANKS, exchange.send.numel()))
        expected.append(("post", "irecv", (RANK - number) % RANKS, exchange.receive))
    expected += [("causal",), ("rectangles", schedule.exchanges[0].parts[0].keys.numel())]
    for number, exchange in others:
        expected.append(("wait", "isend", (RANK + number) % RANKS, exchange.send.numel()))
        expected.append(("wait", "irecv", (RANK - number) % RANKS, exchange.receive))
        expected.append(("rectangles", exchange.parts[0].keys.numel()))
    assert calls == expected


def test_the_backward_posts_each_sources_gradient_at_once_and_all_before_its_own_part(calls):
    schedule = one_document()
    received = [
        torch.zeros(2, exchange.receive, HEADS, HEAD_DIM) for exchange in schedule.exchanges
    ]
    lse = torch.zeros(HEADS, ROW // RANKS)
    ring.ring_backward(*(tensor() for _ in range(5)), lse, received, schedule, **settings(calls))
    others = [(n, exchange) for n, exchange in enumerate(schedule.exchanges) if n > 0]

    expected = []
    for number, exchange in others:  # back to the source; from the rank that the keys were sent to
        expected.append(("rectangles", exchange.parts[0].keys.numel()))
        expected.append(("post", "isend", (RANK - number) % RANKS, exchange.receive))
        expected.append(("post", "irecv", (RANK + number) % RANKS, exchange.send.numel()))
    expected += [("rectangles", schedule.exchanges[0].parts[0].keys.numel()), ("causal",)]
    for number, exchange in others:
        expected.append(("wait", "isend", (RANK - number) % RANKS, exchange.receive))
        expected.append(("wait", "irecv", (RANK + number) % RANKS, exchange.send.numel()))
    assert calls == expected
