"""What one ring rank computes, sends and receives: a placement turned into index tensors, ahead of time.

A rank's blocks, in the order of the row, form *runs* of neighbouring blocks. Its attention is

* causal attention inside the pieces of documents that its runs hold, and
* for a run that begins inside a document, exactly one rectangle: the run's first queries, of that
  document, against the document's earlier tokens. The rectangle is split by where those tokens are,
  on this rank or on another, and its parts are merged by log-sum-exp (`ring.py`).

What rank s sends to rank r is the tails (`plan.py`) that r needs, in the order of the row, so the
part of a rectangle that lies on s is one contiguous range of that message.

Guarantees: made from the boundaries alone, in a loader worker, identically on all ranks: what one rank
will send is what the other will await. Costs about a millisecond per row, and index tensors of the
rectangles' sides: a rank with several runs in one document names the shared keys once per run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np
import torch
from torch import Tensor

from anchor_context.attention.kernels import Spans
from anchor_context.attention.patterns import attended_boundaries
from anchor_context.layout import DocumentLayout
from anchor_context.parallel.plan import RowPlan, plan_row


@dataclass(frozen=True, eq=False)
class Rectangles:
    """Queries against the keys of one source: span i is one rectangle."""

    queries: Tensor
    """(Tq,) int64: local tokens."""
    keys: Tensor
    """(Tk,) int64: local tokens, or tokens of the source's message."""
    spans: Spans


@dataclass(frozen=True, eq=False)
class Step:
    """One exchange: send to the rank `step` places on, receive from the one `step` places back."""

    send: Tensor
    """(tokens,) int64: the local tokens whose keys and values are sent. Empty in step 0."""
    receive: int
    """Tokens received. 0 in step 0, where the source is the rank itself."""
    rectangles: Rectangles | None
    """What the received keys (in step 0 the rank's own) are for; None if nothing."""


@dataclass(frozen=True, eq=False)
class RingSchedule:
    """One rank's part of attention over B planned rows, tokens counted in its flattened (B, L) rows."""

    causal: Spans
    steps: tuple[Step, ...]
    """One for each rank of the ring."""
    imbalance: float
    """Attention pairs of the busiest rank over the mean, of this micro-batch."""
    sent_tokens: int
    """Tokens of keys and values that cross ranks, all ranks together, per layer and forward."""
    plain_ring_tokens: int
    """The same of a ring that knows no documents: (ranks - 1) · B · S."""

    @property
    def my_sent_tokens(self) -> int:
        """Tokens of keys and values that this rank sends per layer and forward."""
        return sum(step.send.numel() for step in self.steps)

    @property
    def my_received_tokens(self) -> int:
        """Tokens of keys and values that this rank receives per layer and forward."""
        return sum(step.receive for step in self.steps)

    def __str__(self) -> str:
        share = self.sent_tokens / max(self.plain_ring_tokens, 1)
        return (
            f"imbalance {self.imbalance:.3f}, {self.sent_tokens} tokens of keys and values sent per "
            f"layer ({share:.3f} of a plain ring's)"
        )


@dataclass(frozen=True, eq=False)
class ShardedLayout(DocumentLayout):
    """The layout of the whole rows, with this rank's part of the ring."""

    schedule: RingSchedule

    def _map(self, change: Callable[[Tensor], Tensor]) -> ShardedLayout:
        return replace(super()._map(change), schedule=_map_tensors(self.schedule, change))


def _map_tensors(value, change: Callable[[Tensor], Tensor]):
    """`value` with `change` applied to every tensor in its tuples and dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, change) for item in value)
    if is_dataclass(value):
        parts = {f.name: _map_tensors(getattr(value, f.name), change) for f in fields(value)}
        return replace(value, **parts)
    return value


def plan_rows(layout: DocumentLayout, *, ranks: int) -> list[RowPlan]:
    """Plan every row of a layout, by what its pattern attends to.

    Raises:
        ValueError: the layout has a shared anchor, which is visible to tokens of every rank.
    """
    boundaries = attended_boundaries(layout)[0].numpy().astype(np.int64)
    row_starts = np.arange(layout.batch_size + 1, dtype=np.int64) * layout.row_length
    edges = np.searchsorted(boundaries, row_starts)
    return [
        plan_row(boundaries[first : last + 1] - start, ranks=ranks)
        for first, last, start in zip(edges[:-1], edges[1:], row_starts[:-1], strict=True)
    ]


def local_tokens(plans: list[RowPlan], *, rank: int) -> np.ndarray:
    """(B, L) int64: the row index of every token of a rank, L = S / ranks, in the order of the row."""
    return np.stack(
        [
            _ranges(np.flatnonzero(p.owner == rank) * p.row.block, p.row.block).reshape(-1)
            for p in plans
        ]
    )


def make_schedule(plans: list[RowPlan], *, rank: int) -> RingSchedule:
    """The schedule of ring rank `rank`; `plans` as every rank of the ring makes them."""
    ranks = plans[0].ranks
    needed = [plan.needed() for plan in plans]
    local = _LocalRows(plans, rank)
    runs = [run for b, plan in enumerate(plans) for run in _runs(b, plan, rank)]

    steps = []
    for step in range(ranks):
        source, target = (rank - step) % ranks, (rank + step) % ranks
        send_starts, send_lengths = local.tails(
            [
                np.flatnonzero(n[target] & (p.owner == rank))
                for n, p in zip(needed, plans, strict=True)
            ]
        )
        if source == rank:
            blocks = [np.flatnonzero(plan.owner == rank) for plan in plans]
            message_starts, message_ends = local.starts, local.ends
            receive = 0
        else:
            blocks = [
                np.flatnonzero(n[rank] & (p.owner == source))
                for n, p in zip(needed, plans, strict=True)
            ]
            lengths = [plan.row.tail[js] for plan, js in zip(plans, blocks, strict=True)]
            flat_ends = np.cumsum(np.concatenate(lengths))
            splits = np.cumsum([len(x) for x in lengths])[:-1]
            message_ends = np.split(flat_ends, splits)
            message_starts = [e - x for e, x in zip(message_ends, lengths, strict=True)]
            receive = int(flat_ends[-1]) if len(flat_ends) else 0

        q_ranges, k_ranges = [], []
        for run in runs:
            b = run.row
            # The blocks of the source that hold earlier tokens of the run's first document.
            low, high = np.searchsorted(blocks[b], (run.first_block_of_document, run.first_block))
            if run.head == 0 or low == high:
                continue
            start = message_starts[b][low]
            if source == rank:  # only the document's part of the first block
                start = message_ends[b][low] - plans[b].row.tail[blocks[b][low]]
            q_start = local.start_of(b, run.first_block)
            q_ranges.append((q_start, q_start + run.head))
            k_ranges.append((start, message_ends[b][high - 1]))
        steps.append(
            Step(
                send=_to_tensor(_ranges(send_starts, send_lengths)),
                receive=receive,
                rectangles=_rectangles(q_ranges, k_ranges),
            )
        )

    load = sum(plan.load for plan in plans)
    row_length = plans[0].row.block * len(plans[0].owner)
    return RingSchedule(
        causal=_causal_spans(plans, runs, local),
        steps=tuple(steps),
        imbalance=float(load.max() / load.mean()),
        sent_tokens=sum(plan.sent_tokens for plan in plans),
        plain_ring_tokens=(ranks - 1) * len(plans) * row_length,
    )


@dataclass(frozen=True)
class _Run:
    """Neighbouring blocks first_block … last_block of one row on one rank."""

    row: int
    first_block: int
    last_block: int
    first_block_of_document: int
    """Block in which the document of the run's first token starts."""
    head: int
    """Queries of that document in the run if it starts before the run, else 0."""


def _runs(b: int, plan: RowPlan, rank: int) -> list[_Run]:
    mine = np.flatnonzero(plan.owner == rank)
    breaks = np.flatnonzero(np.diff(mine) > 1) + 1
    runs = []
    for piece in np.split(mine, breaks):
        first, last, row = int(piece[0]), int(piece[-1]), plan.row
        start, token = int(row.document_start[first]), first * row.block
        head = min(int(row.document_end[first]), (last + 1) * row.block) - token
        runs.append(_Run(b, first, last, start // row.block, head if start < token else 0))
    return runs


class _LocalRows:
    """Where the blocks of a rank stand in its flattened (B, L) tokens."""

    def __init__(self, plans: list[RowPlan], rank: int):
        self.plans = plans
        self.blocks = [np.flatnonzero(plan.owner == rank) for plan in plans]
        block, per_row = plans[0].row.block, len(self.blocks[0])
        self.starts = [(b * per_row + np.arange(per_row)) * block for b in range(len(plans))]
        self.ends = [starts + block for starts in self.starts]

    def start_of(self, b: int, block: int) -> int:
        return int(self.starts[b][np.searchsorted(self.blocks[b], block)])

    def tails(self, chosen: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) of the tails of `chosen[b]`, own blocks of row b."""
        starts, lengths = [], []
        for b, blocks in enumerate(chosen):
            tail = self.plans[b].row.tail[blocks]
            starts.append(self.ends[b][np.searchsorted(self.blocks[b], blocks)] - tail)
            lengths.append(tail)
        return np.concatenate(starts), np.concatenate(lengths)


def _causal_spans(plans: list[RowPlan], runs: list[_Run], local: _LocalRows) -> Spans:
    """The pieces of documents inside the runs, covering every local token."""
    starts = []
    for run in runs:
        row = plans[run.row].row
        token, end = run.first_block * row.block, (run.last_block + 1) * row.block
        inner = row.boundaries[(row.boundaries > token) & (row.boundaries < end)]
        shift = local.start_of(run.row, run.first_block) - token
        starts.append(np.concatenate(([token], inner)) + shift)
    total = len(plans) * len(local.blocks[0]) * plans[0].row.block
    cu_seqlens = np.append(np.concatenate(starts), total)
    longest = int(np.diff(cu_seqlens).max())
    edges = torch.from_numpy(cu_seqlens.astype(np.int32))
    return Spans(edges, edges, longest, longest)


def _rectangles(q_ranges: list[tuple], k_ranges: list[tuple]) -> Rectangles | None:
    if not q_ranges:
        return None
    sides = []
    for ranges in (np.array(q_ranges), np.array(k_ranges)):
        lengths = ranges[:, 1] - ranges[:, 0]
        cu_seqlens = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        sides.append((_ranges(ranges[:, 0], lengths), torch.from_numpy(cu_seqlens), lengths.max()))
    (queries, cu_q, max_q), (keys, cu_k, max_k) = sides
    return Rectangles(
        _to_tensor(queries), _to_tensor(keys), Spans(cu_q, cu_k, int(max_q), int(max_k))
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray | int) -> np.ndarray:
    """The integers starts[i] … starts[i] + lengths[i] - 1, one range after the other."""
    lengths = np.broadcast_to(lengths, starts.shape)
    offsets = starts - np.concatenate(([0], np.cumsum(lengths)[:-1])) if len(starts) else starts
    return np.repeat(offsets, lengths) + np.arange(lengths.sum())


def _to_tensor(indices: np.ndarray) -> Tensor:
    return torch.from_numpy(indices.astype(np.int64))
