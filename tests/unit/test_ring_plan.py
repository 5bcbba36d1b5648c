"""The planner: its counts against a count of every token pair, and the bytes and balance it reaches."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_context.parallel.plan import (
    BALANCE,
    RowPlan,
    blocks_per_rank,
    contiguous_plan,
    cut_row,
    plan_row,
    zigzag_plan,
)

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def unavoidable_tokens():
    sys.path.insert(0, BENCHMARKS)
    try:
        from sequence_parallel import unavoidable_tokens
    finally:
        sys.path.remove(BENCHMARKS)
    return unavoidable_tokens


@st.composite
def rows(draw) -> tuple[np.ndarray, int]:
    """(boundaries, ranks) of a small row."""
    ranks = draw(st.integers(1, 5))
    row_length = ranks * draw(st.integers(1, 48))
    inner = draw(st.sets(st.integers(1, max(1, row_length - 1)), max_size=12))
    inner = sorted(edge for edge in inner if edge < row_length)
    return np.array([0, *inner, row_length]), ranks


def log_normal_rows(row_length: int, *, rows: int, sigma: float, seed: int) -> list[np.ndarray]:
    """Boundaries of rows of log-normal documents (median 1339); a cut document goes on in the next."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(np.maximum(32, rng.lognormal(7.2, sigma, rows * row_length // 32)).astype(int))
    ends = ends[ends < rows * row_length]
    found = []
    for start in range(0, rows * row_length, row_length):
        inside = ends[(ends > start) & (ends < start + row_length)] - start
        found.append(np.concatenate(([0], inside, [row_length])))
    return found


@settings(max_examples=300)
@given(rows(), st.none() | st.integers(1, 60), st.booleans())
def test_counts_equal_those_of_every_pair_of_tokens(case, window, anchored):
    boundaries, ranks = case
    plan = plan_row(boundaries, ranks=ranks, windows=(window,), anchored=anchored)
    row_length = boundaries[-1]
    owner = np.repeat(plan.owner, plan.row.block)
    document = np.repeat(np.arange(len(boundaries) - 1), np.diff(boundaries))
    query, key = np.tril_indices(row_length)
    seen = document[query] == document[key]
    if window is not None:
        is_anchor = key == boundaries[document[query]]
        seen &= (query - key < window) | (is_anchor & anchored)
    query, key = query[seen], key[seen]

    np.testing.assert_array_equal(plan.load, np.bincount(owner[query], minlength=ranks))
    crossing = owner[query] != owner[key]
    sent = set(zip(owner[query[crossing]].tolist(), key[crossing].tolist(), strict=True))
    assert plan.sent_tokens == len(sent)


@settings(max_examples=150)
@given(rows())
def test_every_rank_gets_equally_many_tokens_and_a_plain_ring_sends_no_less(case):
    boundaries, ranks = case
    plan = plan_row(boundaries, ranks=ranks)
    counts = np.bincount(plan.owner, minlength=ranks)
    assert (counts * plan.row.block == boundaries[-1] // ranks).all()
    assert plan.sent_tokens <= (ranks - 1) * boundaries[-1]


def test_the_docstring_row():
    """Documents A 12, B 3, C 10, D 7 in four blocks of 8."""
    row = cut_row(np.array([0, 12, 15, 25, 32]), blocks=4)
    assert row.tail.tolist() == [8, 1, 8, 0] and row.reach.tolist() == [1, 3, 3, 3]
    assert row.work.tolist() == [36, (9 + 10 + 11 + 12) + (1 + 2 + 3) + 1, 44, 10 + 28]
    assert row.work.sum() == 12 * 13 / 2 + 3 * 4 / 2 + 10 * 11 / 2 + 7 * 8 / 2
    # 0 | 1 2 3: rank 1 needs A's first block. Every other split of C moves C's head besides.
    assert RowPlan(row, np.array([0, 1, 1, 1]), 2).sent_tokens == 8
    assert RowPlan(row, np.array([0, 0, 1, 1]), 2).sent_tokens == 1
    assert RowPlan(row, np.array([0, 1, 0, 1]), 2).sent_tokens == 8 + 1 + 8


@pytest.mark.parametrize(
    ("sigma", "row_length", "ranks", "share"),
    [(1.0, 131072, 8, 0.12), (1.4, 131072, 8, 0.22), (1.0, 32768, 4, 0.22), (1.4, 32768, 4, 0.40)],
)
def test_bytes_and_balance_on_log_normal_documents(sigma, row_length, ranks, share):
    sent, imbalance, imbalance_contiguous = [], [], []
    for seed in range(2):
        for boundaries in log_normal_rows(row_length, rows=60, sigma=sigma, seed=seed):
            plan = plan_row(boundaries, ranks=ranks)
            sent.append(plan.sent_tokens / ((ranks - 1) * row_length))
            imbalance.append(plan.imbalance)
            imbalance_contiguous.append(contiguous_plan(plan.row, ranks=ranks).imbalance)
    assert np.mean(sent) <= share
    assert np.max(imbalance) <= 1.10
    assert np.mean(imbalance_contiguous) > 1.5, "rows that need no planner prove nothing"


@pytest.mark.parametrize(
    ("row_length", "ranks"), [(131072, 8), (32768, 4), (65536, 2), (65536, 16)]
)
def test_one_row_long_document(row_length, ranks):
    plan = plan_row(np.array([0, row_length]), ranks=ranks)
    assert plan.imbalance <= 1.05
    assert plan.sent_tokens <= (ranks - 1) * row_length


def test_simple_placements_win_where_they_do_as_well():
    """Many short documents stay contiguous; one row-long document is halved as zigzag does."""
    short = plan_row(np.arange(0, 4097, 32), ranks=4)
    assert short.sent_tokens == 0 and short.imbalance == 1
    one = plan_row(np.array([0, 4096]), ranks=4)
    assert one.imbalance == pytest.approx(1) and one.sent_tokens == 0.75 * 3 * 4096


@pytest.mark.parametrize(("anchored", "anchors"), [(False, 0), (True, 3)])
def test_a_window_leaves_contiguous_pieces_in_balance(anchored, anchors):
    """Each rank needs what the first token of its piece sees, and the anchor; a model with a layer that sees
    everything is balanced as one."""
    boundaries = np.array([0, 4096])
    narrow = plan_row(boundaries, ranks=4, windows=(100,), anchored=anchored)
    np.testing.assert_array_equal(narrow.owner, np.arange(32) // 8)
    assert narrow.imbalance < 1.02 and narrow.sent(100) == 3 * 99 + anchors
    both = plan_row(boundaries, ranks=4, windows=(100, None), anchored=anchored)
    assert both.imbalance < BALANCE < contiguous_plan(both.row, ranks=4).imbalance
    assert 0 < both.sent(100) < both.sent(None) == plan_row(boundaries, ranks=4).sent_tokens


@pytest.mark.parametrize("window", [64, 1024, 8192])
def test_rows_are_balanced_through_any_window(window):
    for boundaries in log_normal_rows(65536, rows=10, sigma=1.4, seed=5):
        plan = plan_row(boundaries, ranks=8, windows=(window, window, None), anchored=True)
        assert plan.imbalance <= 1.10
        assert plan.sent(window) <= plan.sent(None)


@pytest.mark.parametrize("per_rank", [2, 3, 8, 11])
def test_zigzag_gives_every_rank_equally_many_blocks(per_rank):
    row = cut_row(np.array([0, 4 * per_rank * 5]), blocks=4 * per_rank)
    assert (np.bincount(zigzag_plan(row, ranks=4).owner) == per_rank).all()


def test_the_plan_depends_on_the_boundaries_alone():
    (boundaries,) = log_normal_rows(32768, rows=1, sigma=1.0, seed=3)
    first, again = (plan_row(boundaries.astype(t), ranks=4) for t in (np.int32, np.int64))
    np.testing.assert_array_equal(first.owner, again.owner)
    assert first.imbalance <= BALANCE


@pytest.mark.parametrize(
    ("row_length", "blocks"),
    [(4 * 1024, 8), (4 * 6, 6), (4 * 101, 1), (4 * 11 * 13, 11), (4 * 18, 9)],
)
def test_blocks_divide_any_row_that_the_ring_divides(row_length, blocks):
    assert blocks_per_rank(row_length, ranks=4) == blocks


def all_placements(tokens: int, ranks: int) -> np.ndarray:
    """(placements, tokens): every way to give each rank equally many tokens; rank 0 holds the last."""
    owners = np.zeros((1, 0), dtype=np.int64)
    for _ in range(tokens):
        owners = np.concatenate([np.insert(owners, 0, rank, axis=1) for rank in range(ranks)])
        counts = (owners[:, :, None] == np.arange(ranks)).sum(1)
        owners = owners[(counts <= tokens // ranks).all(1)]
    return owners[owners[:, -1] == 0]


@pytest.mark.parametrize(("tokens", "ranks"), [(6, 2), (8, 2), (6, 3), (8, 4)])
def test_no_placement_sends_less_than_the_benchmarks_minimum(unavoidable_tokens, tokens, ranks):
    """All documents in a row of a few tokens, all placements of single tokens."""
    placements = all_placements(tokens, ranks)
    reached = 0
    for cuts in range(2 ** (tokens - 1)):
        inner = [edge for edge in range(1, tokens) if cuts >> (edge - 1) & 1]
        row = cut_row(np.array([0, *inner, tokens]), blocks=tokens)
        least = min(RowPlan(row, owner, ranks).sent_tokens for owner in placements)
        bound = unavoidable_tokens(row.boundaries, ranks=ranks)
        assert least >= bound
        reached += least == bound > 0
    assert reached > 1, "the bound is never reached where it is more than nothing"


def test_the_benchmarks_minimum_by_hand(unavoidable_tokens):
    """Also where contiguous pieces send more than another placement: the first and last quarter together."""
    quarters = np.array([0, 800, 2400, 3200])
    row = cut_row(quarters, blocks=4)
    assert unavoidable_tokens(quarters, ranks=2) == 0
    assert RowPlan(row, np.array([0, 1, 1, 0]), 2).sent_tokens == 0
    assert contiguous_plan(row, ranks=2).sent_tokens == 800
    assert unavoidable_tokens(np.array([0, 3200]), ranks=4) == 2400 + 1600 + 800
    assert unavoidable_tokens(np.array([0, 100, 2000, 3200]), ranks=4) == (1100 + 300) + 400
