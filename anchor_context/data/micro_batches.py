"""The units of a step's rows, dealt to data ranks and micro-batches.

A *unit* is the smallest thing that attention does not cross: a document, with all its chunks where rows
are interleaved; a whole row for `full`. Nothing outside a unit changes its outputs, so a step's gradient
is the sum over its units in any grouping. Here every unit gets its place: one micro-batch of one data
rank. What ranks wait for depends on where they meet:

* once a step (no ZeRO, or stage 1): for the rank whose micro-batches cost most together. Units go to the
  ranks by cost alone, and each rank packs its own into micro-batches.
* in every forward (stage 3 gathers weights there, stage 2 reduces gradients behind it): for the costliest
  rank of each micro-batch, one after the other. The k-th micro-batches of all ranks are filled together,
  the longest units first, so that long ones stand side by side. A unit that exceeds the limit of tokens
  lifts it for all ranks in its micro-batch: they wait for it, and plan memory for it, anyway.

Two rows, two ranks, at most 8 tokens in a micro-batch (`-` is padding, which is no unit):

    rows        aaaaaaaaaaaabbbb  cccccdddeeeff---

                once a step             in every forward
    rank 0      aaaaaaaaaaaa  ff        aaaaaaaaaaaa  ff
    rank 1      ccccceee  bbbbddd       bbbbccccceee  ddd

To sequence parallelism a data rank is a group of ranks, which share the tokens of its micro-batches.

Guarantees: a pure function of the rows' boundaries, the ranks, the stage, the limit of tokens, the price of
a pair and the layers' windows, so all ranks find the same plan without a word exchanged; equally many
micro-batches on each rank.
Costs: 2 to 4 ms of one core for 32 rows of 131,072 tokens (1,900 documents), in a loader worker.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from anchor_context.attention.patterns import EVERYTHING, PATTERNS, Windows, causal_pairs
from anchor_context.data.rows import Row

UNITS = ("document", "anchored_document", "document_without_anchor", "row")
"""Kinds of unit. An anchored document begins with its anchor. A document without anchor belongs to rows with
one shared anchor: each micro-batch begins with an anchor of its own, for all documents in it."""


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a step's rows, in the order of the rows."""

    kind: str
    """One of `UNITS`."""
    row: np.ndarray
    """(units,) int64: the unit's row, counted within the step."""
    document: np.ndarray
    """(units,) int64: its document, counted within the row; 0 for a whole row."""
    tokens: np.ndarray
    """(units,) int64."""
    windows: Windows
    """Of the model's layers, through which its tokens see."""
    start: np.ndarray
    """(units,) int64: where it starts in its document (or row), in tokens; 0 unless it was cut off."""
    new_anchors: np.ndarray
    """(units,) int64: 1 where it gets an anchor in front that its row does not have; `tokens` counts it."""

    @cached_property
    def pairs(self) -> np.ndarray:
        """(units,) float64: the (query, key) pairs that attention computes, the mean over the layers."""
        anchored = self.kind == "anchored_document"
        own = causal_pairs(self.tokens, windows=self.windows, anchored=anchored)
        return own + self.anchors * self.tokens  # the shared anchor is one more key

    @property
    def anchors(self) -> int:
        """Tokens that every micro-batch holds besides its units."""
        return int(self.kind == "document_without_anchor")


@dataclass(frozen=True, eq=False)
class MicroBatchPlan:
    """The place of every unit of a step, as `deal_units` chose it."""

    units: Units
    rank: np.ndarray
    """(units,) int64: the data rank that computes the unit."""
    index: np.ndarray
    """(units,) int64: which of that rank's micro-batches, from 0."""
    unit_cost: np.ndarray
    """(units,) float64: the work of a unit; that of one token without attention is 1."""
    data_ranks: int
    meets_every_forward: bool
    """Whether ranks wait for each other in every micro-batch, and not once a step."""

    @cached_property
    def micro_batches(self) -> int:
        """Micro-batches of each rank, blank ones included; at least 1."""
        return int(self.index.max(initial=0)) + 1

    @cached_property
    def tokens(self) -> np.ndarray:
        """(micro-batches, data ranks) int64: tokens of each micro-batch, 0 where it is blank."""
        tokens = self._sums(self.units.tokens).astype(np.int64)
        return tokens + self.units.anchors * (tokens > 0)

    @cached_property
    def cost(self) -> np.ndarray:
        """(micro-batches, data ranks) float64: the work of each micro-batch."""
        return self._sums(self.unit_cost)

    @property
    def planned_tokens(self) -> np.ndarray:
        """(micro-batches,) int64: the most tokens that a rank has there, for which all plan memory."""
        return self.tokens.max(axis=1)

    @property
    def work_imbalance(self) -> float:
        """See the function of this name."""
        return work_imbalance(self.cost, meets_every_forward=self.meets_every_forward)

    @property
    def least_imbalance(self) -> float:
        """What the costliest unit alone makes of it, because one rank computes it: a bound from below."""
        if not len(self.unit_cost):
            return 1.0
        return max(1.0, float(self.unit_cost.max() / self._mean_cost))

    def units_of(self, *, rank: int, index: int) -> np.ndarray:
        """(units,) int64: the units of one micro-batch, in the order of the rows."""
        return np.flatnonzero((self.rank == rank) & (self.index == index))

    @property
    def _mean_cost(self) -> float:
        return self.unit_cost.sum() / self.data_ranks

    def _sums(self, of_units: np.ndarray) -> np.ndarray:
        shape = (self.micro_batches, self.data_ranks)
        place = self.index * self.data_ranks + self.rank
        return np.bincount(place, of_units, minlength=shape[0] * shape[1]).reshape(shape)


def unit_kind(pattern: str, anchor_placement: str) -> str:
    """Which of `UNITS` a pattern's units are.

    Raises:
        ValueError: rows as units, each behind a shared anchor: in one micro-batch a token would see two.
    """
    if PATTERNS[pattern].unit == "row":
        if anchor_placement == "shared":
            raise ValueError(
                f"--attention_pattern {pattern} with a shared anchor: its rows cannot share a micro-batch; "
                "use --micro_batch_tokens row, or --anchor_placement per_document"
            )
        return "row"
    kinds = {"shared": "document_without_anchor", "per_document": "anchored_document"}
    return kinds.get(anchor_placement, "document")


def work_imbalance(cost: np.ndarray, *, meets_every_forward: bool) -> float:
    """The work that ranks wait for over a rank's mean work; 1 is perfect (and a blank step).

    Args:
        cost: (micro-batches, data ranks) the work of each micro-batch.
        meets_every_forward: whether ranks wait for each other in every micro-batch, and not once a step.
    """
    mean = cost.sum() / cost.shape[1]
    if mean == 0:
        return 1.0
    waited = cost.max(axis=1).sum() if meets_every_forward else cost.sum(axis=0).max()
    return float(waited / mean)


def meets_every_forward(zero_stage: int) -> bool:
    """Whether DeepSpeed's ranks wait for each other in every micro-batch: stage 3 gathers weights in its
    forward, stages 2 and 3 reduce gradients behind it."""
    return zero_stage >= 2


def cut_rows(rows: Sequence[Row], *, kind: str, windows: Windows = EVERYTHING) -> Units:
    """The units of a step's rows. Padding is no unit: a blank row has none.

    Args:
        kind: one of `UNITS`.
        windows: of the model's layers; only their shares count.
    """
    assert kind in UNITS
    row, document, tokens = [], [], []
    skip = int(kind == "document_without_anchor")  # a row's shared anchor is its document 0
    for i, one in enumerate(rows):
        pieces = one.document_pieces
        lengths = (one.ends - one.starts)[:pieces]
        documents = one.documents[:pieces] if kind != "row" else np.zeros(pieces, np.int64)
        found = np.bincount(documents, lengths).astype(np.int64)[skip:]
        row.append(np.full(len(found), i))
        document.append(np.arange(skip, skip + len(found)))
        tokens.append(found)
    n = np.concatenate(tokens)
    zero = np.zeros_like(n)
    return Units(kind, np.concatenate(row), np.concatenate(document), n, windows, zero, zero)


def cut_units(units: Units, *, context: int) -> Units:
    """Cut `units` into units of at most `context` tokens, the anchor that they see included.

    With an anchor in front of each document (`^`), at a context of 4:

        ^ a a a a a a a b      ^ a a a   ^ a a a   ^ a b      (one document; its first anchor is its row's)

    Args:
        context: at least 2.
    """
    own_anchors = units.kind == "anchored_document"
    room = context - units.anchors
    later = room - own_anchors  # tokens of the document in a piece after the first
    pieces = 1 + np.maximum(0, -((room - units.tokens) // later))
    whole = np.repeat(np.arange(len(pieces)), pieces)
    k = np.arange(len(whole)) - (np.cumsum(pieces) - pieces)[whole]
    start = np.where(k > 0, room + (k - 1) * later, 0)
    new_anchors = own_anchors * (k > 0).astype(np.int64)
    n = np.minimum(room + k * later, units.tokens[whole]) - start + new_anchors
    return replace(
        units,
        row=units.row[whole],
        document=units.document[whole],
        tokens=n,
        start=start,
        new_anchors=new_anchors,
    )


def deal_units(
    units: Units, *, data_ranks: int, zero_stage: int, most_tokens: int, pair_price: float
) -> MicroBatchPlan:
    """Deal a step's units so that the data ranks wait for each other as little as they can.

    Args:
        data_ranks: ranks, or groups of ranks that share the tokens of a micro-batch.
        zero_stage: DeepSpeed's; 0 without it.
        most_tokens: in a micro-batch, of all ranks that share it together, with its anchor. A longer
            unit is a micro-batch by itself.
        pair_price: the work of a (query, key) pair; that of one token without attention is 1.
    """
    tokens, cost = units.tokens, units.tokens + pair_price * units.pairs
    room = most_tokens - units.anchors
    every_forward = meets_every_forward(zero_stage)
    if every_forward:
        index, rank = _fill(tokens, cost, bins=data_ranks, room=room)
    else:
        _, rank = _fill(tokens, cost, bins=data_ranks, room=np.inf)
        index = np.empty_like(rank)
        for r in range(data_ranks):
            mine = rank == r
            index[mine], _ = _fill(tokens[mine], cost[mine], bins=1, room=room)
    return MicroBatchPlan(units, rank, index, cost, data_ranks, every_forward)


def _fill(
    tokens: np.ndarray, cost: np.ndarray, *, bins: int, room: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fill columns of `bins` bins each, one after the other; returns each unit's (column, bin).

    A bin of a column has room for so many tokens, or for those of the longest unit left, if that is
    longer. The cheapest bin always takes the longest unit that it has room for. When it finds none, it
    alone decides what the others can add without being waited for: nothing beyond the costliest bin.

    Args:
        tokens, cost: (units,); a longer unit costs no less.
    """
    order = np.lexsort((cost, tokens))
    lengths, costs = tokens[order].tolist(), cost[order].tolist()
    assert costs == sorted(costs)
    in_column, in_bin = [0] * len(order), [0] * len(order)
    # longest[i]: how many of the i shortest units to go through for the longest one left among them.
    longest = list(range(len(order) + 1))

    def longest_left(i: int) -> int:
        while longest[i] != i:
            longest[i] = longest[longest[i]]
            i = longest[i]
        return i

    totals = [0.0] * bins
    column = 0
    while left := longest_left(len(order)):
        rooms = [max(room, lengths[left - 1])] * bins
        # Of equally cheap bins the one that was cheapest so far is first.
        heap = sorted((0.0, totals[b], b) for b in range(bins))
        highest, most_cost = 0.0, np.inf
        while heap:
            load, total, b = heap[0]
            fitting = min(bisect_right(lengths, rooms[b]), bisect_right(costs, most_cost - load))
            unit = longest_left(fitting) - 1
            if unit < 0:
                most_cost = highest
                heapq.heappop(heap)
                continue
            longest[unit + 1] = unit
            in_column[unit], in_bin[unit] = column, b
            rooms[b] -= lengths[unit]
            totals[b] += costs[unit]
            load += costs[unit]
            highest = max(highest, load)
            heapq.heapreplace(heap, (load, total, b))
        column += 1

    columns, bins_ = np.empty_like(order), np.empty_like(order)
    columns[order], bins_[order] = in_column, in_bin
    return columns, bins_
