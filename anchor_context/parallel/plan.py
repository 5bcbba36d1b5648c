"""The planner: which rank of a ring computes which block of a packed row.

A row of S tokens is cut into k · P equal blocks, k for each of P ranks. Because documents stand in one
piece, only one document can cross from a block into the next, so every block meets any earlier block in
at most one document, whatever the placement. A rank must receive the part of that document that stands
in a block (the block's *tail*) if it owns a later block of the document, once, however many it owns.
Through a sliding window it needs only the end of a tail, as much as the first token of the next block that
it owns sees; and besides, where the window hides it, the document's anchor.

    block       0        1        2        3
    documents   AAAAAAAA AAAABBBC CCCCCCCC CDDDDDDD
    tail        8        1        8        0        tokens that later blocks may ask of this one
    reach       1        3        3        3        the last block that may ask (itself: none)

Two aims pull apart: neighbouring blocks on one rank save bytes, and the late blocks of long documents,
which hold most of the attention pairs, must spread. The planner places the heaviest block first, where
it costs the fewest tokens among the ranks that keep within `BALANCE` of the mean, and then swaps pairs
of blocks while that helps. Where a contiguous or a zigzag placement does as well for fewer tokens, it
takes that.

A token stays on one rank in all layers, while their windows may differ: work and tokens that the planner
weighs are the mean over the layers.

Guarantees: a pure function of the document boundaries, the windows and the number of ranks, so every
rank finds the same plan without a word exchanged; every rank gets equally many tokens. Costs about 1.4 ms on
one core for a row of 131,072 tokens on 8 ranks, in a loader worker; some 20 ms on 32 ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anchor_context.attention.patterns import (
    EVERYTHING,
    PATTERNS,
    Windows,
    attended_boundaries,
    causal_pairs,
    window_shares,
)
from anchor_context.layout import DocumentLayout

BLOCKS_PER_RANK = 8
"""Wanted blocks per rank: fewer cannot be balanced, more cut more documents."""
BALANCE = 1.045
"""The busiest rank's work over the mean that the planner accepts to save bytes."""
SWAPS, MOST_SWAPS = 4, 12
"""Swaps after the placement: so many for bytes, up to the second number while out of balance."""


@dataclass(frozen=True, eq=False)
class BlockRow:
    """A row cut into n equal blocks: all that a placement's work and bytes depend on."""

    boundaries: np.ndarray
    """(documents + 1,) int64: where the row's documents start, then its length."""
    block: int
    """Tokens per block."""
    work: np.ndarray
    """(n,) float64: pairs of the block's queries and the keys that they see, the mean over the layers."""
    tail: np.ndarray
    """(n,) int64: tokens of the document that crosses the block's end, inside the block."""
    reach: np.ndarray
    """(n,) int64: last block that this document reaches; the block itself if none crosses."""
    document_start: np.ndarray
    """(n,) int64: first token of the document that holds the block's first token."""
    document_end: np.ndarray
    """(n,) int64: end of that document."""
    shares: dict[int | None, float]
    """Of every window of the model, the share of the layers that have it."""
    anchored: bool
    """Whether each document's first token is seen at any distance."""

    def asked(self, asking: np.ndarray, *, window: int | None) -> np.ndarray:
        """(…, n) int64: tokens of every block's tail that a later block sees, the anchor apart.

        Args:
            asking: (…, n) or (…, 1) integers: the block that asks, for each block. Nothing is asked for by
                one that is not later, or not of the document.
        """
        index = np.arange(len(self.tail))
        asks = (asking > index) & (asking <= self.reach)
        tokens = self.tail
        if window is not None:  # seen by the first token of `asking`
            tokens = np.clip(window - 1 - (asking - index - 1) * self.block, 0, tokens)
        return np.where(asks, tokens, 0)


def cut_row(
    boundaries: np.ndarray, *, blocks: int, windows: Windows = EVERYTHING, anchored: bool = False
) -> BlockRow:
    """Cut a row into `blocks` equal blocks.

    Args:
        boundaries: (documents + 1,) increasing integers from 0 to the row length S.
        windows: of the layers; only their shares count.
        anchored: whether each document's first token is seen at any distance.
    """
    boundaries = np.asarray(boundaries, dtype=np.int64)
    row_length = int(boundaries[-1])
    assert row_length % blocks == 0
    block = row_length // blocks
    cuts = np.arange(blocks + 1, dtype=np.int64) * block

    at = np.searchsorted(boundaries, cuts, side="right") - 1
    of_documents, of_parts = (
        causal_pairs(tokens, windows=windows, anchored=anchored)
        for tokens in (np.diff(boundaries), cuts - boundaries[at])
    )
    pairs_before = np.concatenate(([0.0], np.cumsum(of_documents)))
    work = np.diff(pairs_before[at] + of_parts)

    document_start = boundaries[at[:-1]]
    document_end = boundaries[at[:-1] + 1]
    # The document that holds a block's last token crosses its end if it ends later.
    last = np.searchsorted(boundaries, cuts[1:] - 1, side="right") - 1
    start, end = boundaries[last], boundaries[last + 1]
    crosses = end > cuts[1:]
    tail = np.where(crosses, cuts[1:] - np.maximum(start, cuts[:-1]), 0)
    reach = np.where(crosses, (end - 1) // block, np.arange(blocks))
    return BlockRow(
        boundaries,
        block,
        work,
        tail,
        reach,
        document_start,
        document_end,
        window_shares(windows),
        anchored,
    )


@dataclass(frozen=True, eq=False)
class RowPlan:
    """A placement of one row's blocks."""

    row: BlockRow
    owner: np.ndarray
    """(n,) int64: the ring rank of every block."""
    ranks: int

    @property
    def load(self) -> np.ndarray:
        """(ranks,) float64: attention pairs that each rank computes."""
        return np.bincount(self.owner, self.row.work, minlength=self.ranks)

    @property
    def imbalance(self) -> float:
        """Work of the busiest rank over the mean; 1 is perfect."""
        return float(self.load.max() / self.load.mean())

    def needed(self, window: int | None = None) -> np.ndarray:
        """(ranks, n) int64: tokens at the end of a block's tail that a rank must receive."""
        mine = _mine(self.owner, ranks=self.ranks)
        return np.where(mine, 0, self.row.asked(_next_owned(mine), window=window))

    def needed_anchors(self, window: int | None = None) -> np.ndarray:
        """(ranks, n) bool: whether a rank must receive, besides, the first token of the document that a block
        holds the beginning of and that crosses its end: the tail's first token."""
        row, mine = self.row, _mine(self.owner, ranks=self.ranks)
        if window is None or not row.anchored:
            return np.zeros_like(mine)
        # The document that crosses a block's end is that of the next block's first token.
        start, end = (np.append(x[1:], 0) for x in (row.document_start, row.document_end))
        begins_here = (row.tail > 0) & (start // row.block == np.arange(len(row.tail)))
        first_hidden = np.where(start + window < end, (start + window) // row.block, row.reach + 1)
        count = np.concatenate((np.zeros((self.ranks, 1), int), mine.cumsum(1)), axis=1)
        has_queries = count[:, row.reach + 1] - count[:, first_hidden] > 0
        arrives = self.needed(window) == row.tail
        return begins_here & has_queries & ~mine & ~arrives

    def sent(self, window: int | None = None) -> int:
        """Tokens whose keys and values cross ranks in a layer with this window, each once per receiver."""
        return int(self.needed(window).sum() + self.needed_anchors(window).sum())

    @property
    def sent_tokens(self) -> float:
        """The same, the mean over the layers."""
        return sum(share * self.sent(window) for window, share in self.row.shares.items())


def plan_row(
    boundaries: np.ndarray, *, ranks: int, windows: Windows = EVERYTHING, anchored: bool = False
) -> RowPlan:
    """Place the blocks of one row on `ranks` ring ranks.

    Args:
        boundaries: (documents + 1,) increasing integers from 0 to the row length, which `ranks` divides.
        windows, anchored: as for `cut_row`.
    """
    per_rank = blocks_per_rank(int(boundaries[-1]), ranks=ranks)
    row = cut_row(boundaries, blocks=per_rank * ranks, windows=windows, anchored=anchored)
    if per_rank == 1 or ranks == 1:
        return contiguous_plan(row, ranks=ranks)
    asked = _asked(row)
    owner = _swap(row, asked, _place(row, asked, ranks=ranks), ranks=ranks)
    plans = (
        RowPlan(row, owner, ranks),
        contiguous_plan(row, ranks=ranks),  # wins where documents are many and short
        zigzag_plan(row, ranks=ranks),  # wins on one row-long document
    )
    return min(plans, key=lambda plan: (max(plan.imbalance, BALANCE), plan.sent_tokens))


def plan_rows(
    layout: DocumentLayout, *, ranks: int, windows: Windows = EVERYTHING
) -> list[RowPlan]:
    """Plan every row of a layout (of a micro-batch of units: its one line), by what its pattern attends to.

    Args:
        windows: of the model's layers, in any order.

    Raises:
        ValueError: what the pattern attends to is no set of segments (`check_segments`); a shared anchor, for
            one, is visible to tokens of every rank.
    """
    boundaries = attended_boundaries(layout)[0].numpy().astype(np.int64)
    row_starts = np.arange(layout.batch_size + 1, dtype=np.int64) * layout.row_length
    at = np.searchsorted(boundaries, row_starts)
    anchored = PATTERNS[layout.pattern].anchored
    assert not anchored or PATTERNS[layout.pattern].unit == "document"
    return [
        plan_row(
            boundaries[first : last + 1] - start, ranks=ranks, windows=windows, anchored=anchored
        )
        for first, last, start in zip(at[:-1], at[1:], row_starts[:-1], strict=True)
    ]


def local_tokens(plans: list[RowPlan], *, rank: int) -> np.ndarray:
    """(B, L) int64: the row index of every token of a rank, L = S / ranks, in the order of the row."""
    blocks = np.stack([np.flatnonzero(plan.owner == rank) for plan in plans])
    block = plans[0].row.block
    return (blocks[:, :, None] * block + np.arange(block)).reshape(len(plans), -1)


def join_rows(plans: list[RowPlan]) -> RowPlan:
    """The plans of B rows of one length as one plan of one long row: no document crosses their edges."""
    blocks, block = len(plans[0].owner), plans[0].row.block

    def joined(name: str, shift: int) -> np.ndarray:
        """A field of the rows, which counts blocks (`shift` 1) or tokens (`block`) from the row's start."""
        of_rows = (getattr(plan.row, name) for plan in plans)
        return np.concatenate([x + b * blocks * shift for b, x in enumerate(of_rows)])

    row = BlockRow(
        boundaries=np.unique(joined("boundaries", block)),
        block=block,
        work=joined("work", 0),
        tail=joined("tail", 0),
        reach=joined("reach", 1),
        document_start=joined("document_start", block),
        document_end=joined("document_end", block),
        shares=plans[0].row.shares,
        anchored=plans[0].row.anchored,
    )
    return RowPlan(row, np.concatenate([plan.owner for plan in plans]), plans[0].ranks)


def contiguous_plan(row: BlockRow, *, ranks: int) -> RowPlan:
    """Each rank one piece of the row: the fewest bytes, and the busiest last owner of long documents."""
    blocks = len(row.work)
    return RowPlan(row, np.arange(blocks) // (blocks // ranks), ranks)


def zigzag_plan(row: BlockRow, *, ranks: int) -> RowPlan:
    """Each rank an early and a late piece: the balance of one row-long document.

    An odd number of blocks per rank puts one more into the early piece, or into the late one.
    """
    half_blocks = np.repeat(np.arange(ranks), len(row.work) // ranks)
    owner = np.concatenate((half_blocks, half_blocks[::-1]))[::2]
    return RowPlan(row, owner, ranks)


def blocks_per_rank(row_length: int, *, ranks: int) -> int:
    """The divisor of a rank's tokens that is nearest to `BLOCKS_PER_RANK` (1 for a prime number)."""
    tokens = row_length // ranks
    divisors = [d for d in range(1, 2 * BLOCKS_PER_RANK + 1) if tokens % d == 0]
    return min(divisors, key=lambda d: abs(np.log(d / BLOCKS_PER_RANK)))


def _mine(owner: np.ndarray, *, ranks: int) -> np.ndarray:
    """(ranks, n) bool: whether a rank owns a block."""
    return owner == np.arange(ranks)[:, None]


def _next_owned(mine: np.ndarray) -> np.ndarray:
    """(ranks, n) int64: the first later block that a rank owns; n if there is none."""
    blocks = mine.shape[1]
    owned = np.where(mine, np.arange(blocks), blocks)
    from_here = np.minimum.accumulate(owned[:, ::-1], axis=1)[:, ::-1]
    return np.append(from_here[:, 1:], np.full((len(mine), 1), blocks), axis=1)


def _asked(row: BlockRow) -> np.ndarray:
    """(n, n) float64: tokens of block j's tail (column) that block b (line) asks for, the mean over layers.

    A later block asks for less, in every layer, so what a rank receives is the most that one of its asks for.
    """
    index = np.arange(len(row.work))
    return sum(
        share * row.asked(index[:, None], window=window) for window, share in row.shares.items()
    )


def _place(row: BlockRow, asked: np.ndarray, *, ranks: int) -> np.ndarray:
    """Heaviest block first, each to the rank where it adds the fewest tokens and keeps the balance.

    A rank with room left must still take blocks: half the mean work of the blocks to come is
    reserved for each, or light blocks would later overfill a rank that is already at the limit.
    """
    blocks = len(row.work)
    asks = np.zeros((ranks, blocks))  # asks[r, j]: tokens of tail j that rank r's blocks ask for
    elsewhere = np.zeros((ranks, blocks))  # [r, j]: 1 if block j is placed, and not on rank r
    lowest = (row.document_start // row.block).tolist()
    owner = np.empty(blocks, dtype=np.int64)
    load, room = np.zeros(ranks), np.full(ranks, blocks // ranks)  # load of the mean rank: 1

    order = np.argsort(-row.work, kind="stable")
    work = row.work[order] * ranks / row.work.sum()
    after = np.arange(blocks)[::-1]  # blocks still to come
    reserve = 0.5 * (ranks - np.cumsum(work)) / np.maximum(after, 1)
    free = BALANCE - work + reserve
    for block, block_work, reserved, limit in zip(
        order.tolist(), work.tolist(), reserve.tolist(), free.tolist(), strict=True
    ):
        excess = np.maximum(load + room * reserved - limit, 0)
        # The tokens that a rank would newly receive, less the block's own tail if it receives that already.
        # The other ranks that ask for this tail receive it whoever takes the block, so they do not count.
        # Balance weighs most, and the load decides between equals.
        earlier = slice(lowest[block], block)
        more = np.maximum(asked[block, earlier] - asks[:, earlier], 0) * elsewhere[:, earlier]
        score = more.sum(1) - asks[:, block] + 1e12 * excess + 1e-3 * load
        rank = int(score.argmin())
        owner[block] = rank
        room[rank] -= 1
        load[rank] = load[rank] + block_work if room[rank] else np.inf
        elsewhere[:, block] = 1
        elsewhere[rank, block] = 0
        np.maximum(asks[rank], asked[block], out=asks[rank])
    return owner


def _swap(row: BlockRow, asked: np.ndarray, owner: np.ndarray, *, ranks: int) -> np.ndarray:
    """Swap pairs of blocks: first into balance, then for fewer tokens; returns the best placement seen.

    A pair's saving is the sum of its two moves, wrong only where the two blocks share a document, or where a
    window lets one block ask for less than another, so the placement is counted exactly after every swap.
    """
    blocks = len(row.work)
    index = np.arange(blocks)
    limit = BALANCE * row.work.sum() / ranks
    follows = (asked > 0).astype(np.float64)
    by_next = np.append(asked, np.zeros((1, blocks)), axis=0)  # a line for "no later block"
    gives = row.work[:, None] - row.work
    load = np.bincount(owner, row.work, minlength=ranks)
    weight = 1e9 / limit  # balance first
    best, best_owner = (np.inf, np.inf), owner.copy()

    for swap in range(MOST_SWAPS + 1):
        mine = _mine(owner, ranks=ranks)
        asking = mine.astype(np.float64) @ follows  # blocks of rank r that ask for tail j
        asks = by_next[_next_owned(mine), index]  # tokens of tail j that rank r's blocks ask for
        tokens = asks[~mine].sum()
        excess = np.maximum(load - limit, 0)
        if (excess.sum(), tokens) < best:
            best, best_owner = (excess.sum(), tokens), owner.copy()
        if (swap >= SWAPS and best[0] == 0) or swap == MOST_SWAPS:
            break
        # at[r, b]: tokens sent because block b is on rank r, the other blocks where they are
        by_none, by_one = (((asking == n) & ~mine).astype(np.float64) for n in (0, 1))
        at = by_none @ asked.T
        only = by_one @ asked.T  # of its own rank: asked for by b alone
        at[owner, index] = only[owner, index]
        at += asks.sum(0) - asks
        here = at[owner, index] + weight * excess[owner]
        # half[i, b]: what changes when block b takes the place of block i: the tokens sent because of b, and
        # the excess of i's rank, whose load is then less i's work and more b's. The swap of i and b changes
        # half[i, b] + half[b, i]. Two blocks of one rank need no exception: because the excess is convex in
        # the load, their sum is never below 0.
        half = np.maximum((load[owner] - limit)[:, None] - gives, 0)
        half *= weight
        half += at[owner] - here
        change = half + half.T
        i, j = divmod(int(change.argmin()), blocks)
        if change[i, j] > -1e-6:
            break
        load[owner[i]] -= gives[i, j]
        load[owner[j]] += gives[i, j]
        owner[i], owner[j] = owner[j], owner[i]
    return best_owner
