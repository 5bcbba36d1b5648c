"""What one ring rank computes, sends and receives: a placement turned into index tensors, ahead of time.

A rank's blocks, in the order of the row, form *runs* of neighbouring blocks. Its attention is

* causal attention inside the pieces of documents that its runs hold, and
* for a run that begins inside a document, exactly one rectangle: the run's first queries, of that
  document, against the document's earlier tokens. The rectangle is split by where those tokens are,
  on this rank or on another, and its parts are merged by log-sum-exp (`ring.py`).

A sliding window is the kernel's in the first of these. From the rectangle it cuts a band, which is split
once more, into plain rectangles and triangles, so that every kernel can compute it. The keys of one source
stand in the order of the row, and a query sees the last of them, from the window's edge on. While the edge
moves through tokens of other ranks, all queries see the same keys: a rectangle. While it moves through m
tokens of this source, each query sees one key less than the one before (a line is a query, m = 4):

    x x x x x x     the first m - 1 keys and queries: a triangle, a causal one if both are read backwards
    . x x x x x     the other keys and all m queries: a rectangle
    . . x x x x
    . . . x x x

An anchor that the window hides is one more key of each query that it is hidden from: a rectangle of its own.

What rank s sends to rank r is the tails (`plan.py`) that r needs, as much of each as its windows see, and the
anchors, in the order of the row, so the part of a rectangle that lies on s is one contiguous range of that
message.

Guarantees: made from the boundaries alone, in a loader worker, identically on all ranks: what one rank
will send is what the other will await. Costs a third of a millisecond per row of 131,072 tokens on 8
ranks, and index tensors of the rectangles' sides: a rank with several runs in one document names the
shared keys once per run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from anchor_context.attention.kernels import Spans
from anchor_context.attention.patterns import effective_window
from anchor_context.layout import DocumentLayout
from anchor_context.parallel.plan import BlockRow, RowPlan, join_rows


@dataclass(frozen=True, eq=False)
class Part:
    """Queries, each of them once, against the keys of one source: span i is one rectangle or triangle."""

    queries: Tensor
    """(Tq,) int64: local tokens."""
    keys: Tensor
    """(Tk,) int64: local tokens, or tokens of the source's message."""
    spans: Spans
    causal: bool
    """Whether the spans are triangles."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """At one distance d: send to the rank d places on, receive from the rank d places back."""

    send: Tensor
    """(tokens,) int64: the local tokens whose keys and values are sent. Empty at distance 0."""
    receive: int
    """Tokens received. 0 at distance 0, where the source is the rank itself."""
    parts: tuple[Part, ...]
    """What the received keys (at distance 0 the rank's own) are for."""


@dataclass(frozen=True, eq=False)
class RingSchedule:
    """One rank's part of attention over B planned rows, tokens counted in its flattened (B, L) rows."""

    window: int | None
    """Tokens that a query sees, itself included; None where it sees all of its unit."""
    causal: Spans
    exchanges: tuple[Exchange, ...]
    """One for each distance: 0, 1, …, ranks - 1."""
    imbalance: float
    """Attention pairs of the busiest rank over the mean, of this micro-batch and all layers together."""
    sent_tokens: int
    """Tokens of keys and values that cross ranks, all ranks together, per layer and forward."""
    plain_ring_tokens: int
    """The same of a ring that knows no documents: (ranks - 1) · B · S."""

    @property
    def my_sent_tokens(self) -> int:
        """Tokens of keys and values that this rank sends per layer and forward."""
        return sum(exchange.send.numel() for exchange in self.exchanges)

    @property
    def my_received_tokens(self) -> int:
        """Tokens of keys and values that this rank receives per layer and forward."""
        return sum(exchange.receive for exchange in self.exchanges)

    def __str__(self) -> str:
        """Bytes as a share of a plain ring's, which holds for any heads and dtype: a plan knows tokens."""
        share = self.sent_tokens / max(self.plain_ring_tokens, 1)
        return (
            f"imbalance {self.imbalance:.3f}, {self.sent_tokens:,} tokens of keys and values sent per "
            f"layer: {share:.3f} of a plain ring's bytes"
        )


@dataclass(frozen=True, eq=False)
class ShardedLayout(DocumentLayout):
    """The layout of the whole rows, with this rank's part of the ring."""

    schedules: dict[int | None, RingSchedule]
    """For every window of the model's layers."""

    @property
    def imbalance(self) -> float:
        """Attention pairs of the busiest rank over the mean: one number, because a token has one place."""
        return next(iter(self.schedules.values())).imbalance

    def schedule_of(self, window: int | None) -> RingSchedule:
        """The schedule of a layer with this window.

        Raises:
            ValueError: a window that `shard_batch` was not told.
        """
        window = effective_window(self, window)
        if window not in self.schedules:
            raise ValueError(
                f"a layer attends through a sliding window of {window} tokens, and the ring was planned for "
                f"{list(self.schedules)}: give shard_batch the windows of all layers"
            )
        return self.schedules[window]

    def _map(self, change: Callable[[Tensor], Tensor]) -> ShardedLayout:
        return replace(super()._map(change), schedules=_map_tensors(self.schedules, change))


def _map_tensors(value, change: Callable[[Tensor], Tensor]):
    """`value` with `change` applied to every tensor in its tuples, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if is_dataclass(value):
        parts = {f.name: _map_tensors(getattr(value, f.name), change) for f in fields(value)}
        return replace(value, **parts)
    return value


@dataclass(frozen=True)
class _Sources:
    """Where one rank finds the keys of every block: in its local tokens, or in the message of their owner."""

    ranks: int
    distance: np.ndarray
    """(n,) how many places back the owner of a block stands."""
    ends: np.ndarray
    """(n,) where the keys of a block end."""
    lone_anchors: np.ndarray
    """(n,) where the anchor of the document that crosses the block's end is, if it came without the tokens
    after it; else -1."""


def make_schedule(plans: list[RowPlan], *, rank: int, window: int | None = None) -> RingSchedule:
    """The schedule of ring rank `rank` for layers with `window`; `plans` as every rank makes them."""
    plan = join_rows(plans)
    ranks, row = plan.ranks, plan.row
    mine = plan.owner == rank
    # (ranks, n, 2): tokens that a rank needs of a block, in the order of the row: an anchor, the tail's end.
    needed = np.stack((plan.needed_anchors(window), plan.needed(window)), axis=-1).astype(np.int64)
    local_ends = np.cumsum(mine) * row.block  # where an own block ends in the local tokens

    # Distance by distance, what the target needs of this rank's blocks.
    wanted = needed[(rank + np.arange(ranks)) % ranks] * mine[:, None]
    distance, blocks, kind = np.nonzero(wanted)
    tokens = wanted[distance, blocks, kind]
    starts = local_ends[blocks] - np.where(kind == 0, row.tail[blocks], tokens)
    sends = _split(_ranges(starts, tokens), _sums(distance, tokens, ranks))

    # Distance by distance, what arrives: the same of the source, one after the other.
    distance_of = (rank - plan.owner) % ranks
    blocks, kind = np.nonzero(needed[rank])
    order = np.argsort(distance_of[blocks], kind="stable")
    blocks, kind = blocks[order], kind[order]
    tokens = needed[rank, blocks, kind]
    receives = _sums(distance_of[blocks], tokens, ranks)
    ends = np.cumsum(tokens) - (np.cumsum(receives) - receives)[distance_of[blocks]]
    key_ends, lone_anchors = local_ends.copy(), np.full(len(mine), -1)
    key_ends[blocks[kind == 1]] = ends[kind == 1]
    lone_anchors[blocks[kind == 0]] = ends[kind == 0] - 1
    sources = _Sources(ranks, distance_of, key_ends, lone_anchors)

    # Runs of neighbouring blocks; first block, and the block behind the last.
    changes = np.diff(mine, prepend=False, append=False)
    runs = np.flatnonzero(changes).reshape(-1, 2).T
    # Pieces of documents inside the runs cover every local token: where they start in the row, and locally.
    starts = np.unique(np.concatenate((row.boundaries[:-1], runs[0] * row.block)))
    starts = starts[mine[starts // row.block]]
    local = local_ends[starts // row.block] - row.block + starts % row.block
    edges = np.append(local, np.count_nonzero(mine) * row.block)

    kinds = (
        *_bands(row, runs, sources, window=window, local_ends=local_ends),
        _hidden_anchors(row, starts, edges, sources, window=window),
    )
    longest = int(np.diff(edges).max())
    cu_seqlens = torch.from_numpy(edges.astype(np.int32))
    return RingSchedule(
        window=window,
        causal=Spans(cu_seqlens, cu_seqlens, longest, longest),
        exchanges=tuple(
            Exchange(send, receive, tuple(part for part in parts if part is not None))
            for send, receive, *parts in zip(sends, receives.tolist(), *kinds, strict=True)
        ),
        imbalance=plan.imbalance,
        sent_tokens=plan.sent(window),
        plain_ring_tokens=(ranks - 1) * len(plan.owner) * row.block,
    )


def _bands(
    row: BlockRow,
    runs: np.ndarray,
    sources: _Sources,
    *,
    window: int | None,
    local_ends: np.ndarray,
) -> tuple[list[Part | None], list[Part | None]]:
    """Of every distance, the rectangles and the triangles of the runs that begin inside a document.

    Args:
        runs: (2, runs): first block, and the block behind the last.
        local_ends: (n,) where an own block ends in the local tokens.
    """
    if window is None:
        window = 2 * int(row.boundaries[-1])  # whose edge never comes to a key
    runs = runs[:, row.document_start[runs[0]] < runs[0] * row.block]
    first, behind = runs
    start = first * row.block
    heads = np.minimum(row.document_end[first], behind * row.block) - start
    edge = start - window + 1  # of the window of a run's first query

    # The earlier blocks of a run's document, as far as its first query sees them: keys low … high - 1.
    lowest = row.document_start[first] // row.block
    run = np.repeat(np.arange(len(first)), first - lowest)
    blocks = _ranges(lowest, first - lowest)
    low = np.maximum(blocks * row.block, np.maximum(row.document_start[first], edge)[run])
    high = (blocks + 1) * row.block
    seen = np.flatnonzero(low < high)
    seen = seen[np.lexsort((run[seen], sources.distance[blocks[seen]]))]
    run, blocks, low, high = run[seen], blocks[seen], low[seen], high[seen]
    distance = sources.distance[blocks]

    # Those of one run and one source stand one behind the other among its keys, and end where the last ends.
    group = distance * len(first) + run
    is_first, is_last = np.diff(group, prepend=-1) != 0, np.diff(group, append=-1) != 0
    keys = sources.ends[blocks] - (high - low)
    keys_end = sources.ends[blocks[is_last]][np.cumsum(is_first) - 1]

    # Queries of the run, counted from its first: the edge comes to these keys, and leaves them.
    comes, leaves = (np.minimum(x - edge[run], heads[run]) for x in (low, high))
    left_before = np.where(is_first, 0, np.roll(leaves, 1))
    local = (local_ends[first] - row.block)[run]
    same, moving = comes - left_before, leaves - comes
    part = partial(_parts, ranks=sources.ranks)
    rectangles = part(
        distance=np.tile(distance, 2),
        queries=np.concatenate((local + left_before, local + comes)),
        query_lengths=np.concatenate((same, moving)),
        keys=np.concatenate((keys, keys + moving - 1)),
        key_lengths=np.concatenate((keys_end - keys, keys_end - (keys + moving - 1))),
    )
    triangles = part(
        distance=distance,
        queries=local + comes,
        query_lengths=moving - 1,
        keys=keys,
        key_lengths=moving - 1,
        causal=True,
    )
    return rectangles, triangles


def _hidden_anchors(
    row: BlockRow, starts: np.ndarray, edges: np.ndarray, sources: _Sources, *, window: int | None
) -> list[Part | None]:
    """Of every distance, the anchors that the window hides from some of this rank's queries.

    Args:
        starts: (pieces,) where the pieces of documents on this rank start in the row.
        edges: (pieces + 1,) where they start among the local tokens, and where the last one ends.
    """
    if window is None or not row.anchored:
        return [None] * sources.ranks
    anchors = row.boundaries[np.searchsorted(row.boundaries, starts, side="right") - 1]
    blocks = anchors // row.block
    lengths = np.diff(edges)
    near = np.clip(anchors + window - starts, 0, lengths)  # those that see their anchor
    after = (blocks + 1) * row.block - anchors  # tokens of the anchor's block, from the anchor on
    lone = sources.lone_anchors[blocks]
    return _parts(
        distance=sources.distance[blocks],
        queries=edges[:-1] + near,
        query_lengths=lengths - near,
        keys=np.where(lone < 0, sources.ends[blocks] - after, lone),
        key_lengths=np.ones_like(blocks),
        ranks=sources.ranks,
    )


def _parts(
    *,
    distance: np.ndarray,
    queries: np.ndarray,
    query_lengths: np.ndarray,
    keys: np.ndarray,
    key_lengths: np.ndarray,
    ranks: int,
    causal: bool = False,
) -> list[Part | None]:
    """The part of every distance, of spans that are given by where they start and how long they are.

    Spans without queries are left out. The tokens of causal ones are named backwards.
    """
    chosen = np.flatnonzero(query_lengths > 0)
    if not len(chosen):
        return [None] * ranks
    chosen = chosen[np.argsort(distance[chosen], kind="stable")]
    distance = distance[chosen]
    sides = (
        _by_distance(starts[chosen], lengths[chosen], distance, ranks, backwards=causal)
        for starts, lengths in ((queries, query_lengths), (keys, key_lengths))
    )
    return [
        Part(q, k, Spans(cu_q, cu_k, max_q, max_k), causal) if len(q) else None
        for (q, cu_q, max_q), (k, cu_k, max_k) in zip(*sides, strict=True)
    ]


def _by_distance(
    starts: np.ndarray, lengths: np.ndarray, distance: np.ndarray, ranks: int, *, backwards: bool
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(tokens, cu_seqlens, longest) of every distance's ranges; `distance`, sorted, is that of each range.
    Each range by itself is read backwards, or not."""
    counts, sizes = np.bincount(distance, minlength=ranks), _sums(distance, lengths, ranks)
    # A 0 before the lengths of each distance.
    cu_seqlens = np.cumsum(np.insert(lengths, np.cumsum(counts) - counts, 0))
    cu_seqlens -= np.repeat(np.cumsum(sizes) - sizes, counts + 1)
    longest = np.zeros(ranks, dtype=np.int64)
    np.maximum.at(longest, distance, lengths)
    if backwards:
        tokens = _ranges(starts[::-1], lengths[::-1])[::-1].copy()
    else:
        tokens = _ranges(starts, lengths)
    return zip(
        _split(tokens, sizes),
        _split(cu_seqlens.astype(np.int32), counts + 1),
        longest.tolist(),
        strict=True,
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers starts[i] … starts[i] + lengths[i] - 1, one range after the other."""
    stops = starts + lengths
    index = np.arange(stops.max(initial=0))  # copying its pieces is faster than computing them
    pieces = [index[i:j] for i, j in zip(starts.tolist(), stops.tolist(), strict=True)]
    return np.concatenate([index[:0], *pieces])


def _sums(distance: np.ndarray, tokens: np.ndarray, ranks: int) -> np.ndarray:
    """(ranks,) int64: the tokens of each distance."""
    return np.bincount(distance, tokens, minlength=ranks).astype(np.int64)


def _split(tokens: np.ndarray, sizes: np.ndarray) -> tuple[Tensor, ...]:
    """Tensors of these sizes, one after the other."""
    return torch.from_numpy(tokens).split(sizes.tolist())
