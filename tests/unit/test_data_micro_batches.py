"""Units of a step's rows and their places: every document whole and once, limits kept, work even."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_context.data import micro_batches
from anchor_context.data.interleaving import interleave
from anchor_context.data.micro_batches import UNITS, MicroBatchPlan, cut_rows, deal_units
from anchor_context.data.rows import Row, blank_row
from anchor_context.parallel.plan import BLOCKS_PER_RANK, plan_row

PRICE = {"1B": 12 * 16 * 32 * 64 / (6 * 1.236e9), "8B": 12 * 32 * 32 * 128 / (6 * 7.5e9)}
"""Of a pair, in the matrix products of one token."""
MOST = 32_768


def make_row(lengths, *, pad_count: int = 0) -> Row:
    """A row of these documents, and padding behind them."""
    lengths = [*lengths, *[pad_count] * (pad_count > 0)]
    return Row(
        tokens=np.broadcast_to(np.int32(7), sum(lengths) + 1),
        starts=np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int32),
        untargeted=np.zeros(len(lengths), np.int32),
        documents=np.arange(len(lengths), dtype=np.int32),
        pad_count=pad_count,
    )


def documents_of(row: Row) -> list[int]:
    """Tokens of each document, padding left out; counted token by token."""
    length = len(row.tokens) - 1
    piece = np.searchsorted(row.starts, np.arange(length - row.pad_count), side="right") - 1
    return np.bincount(row.documents[piece]).tolist() if len(piece) else []


@st.composite
def steps(draw) -> tuple[list[Row], str]:
    """A few rows of one length, some interleaved, padded or blank, and a kind of unit."""
    kind = draw(st.sampled_from(UNITS))
    shared = kind == "document_without_anchor"
    length = draw(st.integers(2, 300))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        if draw(st.integers(0, 4)) == 0:
            rows.append(blank_row(length, 0))
            continue
        edges = draw(st.sets(st.integers(1, length - 1), max_size=20)) | ({1} if shared else set())
        lengths = np.diff([0, *sorted(edges), length]).tolist()
        pad = lengths.pop() if len(lengths) > 1 + shared and draw(st.booleans()) else 0
        row = make_row(lengths, pad_count=pad)
        if draw(st.booleans()):
            rng = np.random.default_rng(draw(st.integers(0, 99)))
            row = interleave(row, rng, goes_on=False, shared=shared)
        rows.append(row)
    return rows, kind


deals = st.fixed_dictionaries(
    {
        "data_ranks": st.integers(1, 6),
        "zero_stage": st.integers(0, 3),
        "most_tokens": st.integers(1, 400),
        "pair_price": st.sampled_from([0.0, 1e-4, 0.05]),
    }
)


@settings(max_examples=200)
@given(steps(), deals)
def test_every_unit_is_whole_in_one_micro_batch_of_one_rank(case, options):
    rows, kind = case
    units = cut_rows(rows, kind=kind)
    plan = deal_units(units, **options)

    found = []
    for rank in range(options["data_ranks"]):
        for index in range(plan.micro_batches):
            mine = plan.units_of(rank=rank, index=index)
            assert (np.diff(mine) > 0).all(), "not in the order of the rows"
            found += mine.tolist()
            anchor = int(kind == "document_without_anchor" and len(mine) > 0)
            assert plan.tokens[index, rank] == units.tokens[mine].sum() + anchor
            np.testing.assert_allclose(plan.cost[index, rank], plan.unit_cost[mine].sum())
    assert sorted(found) == list(range(len(units.tokens)))

    # Together they are the rows' documents, with all their tokens, and no padding.
    by_place = {
        (int(row), int(document)): int(tokens)
        for row, document, tokens in zip(units.row, units.document, units.tokens, strict=True)
    }
    expected = {}
    for i, row in enumerate(rows):
        lengths = documents_of(row)
        if kind == "row":
            expected |= {(i, 0): sum(lengths)} if lengths else {}
        else:
            skip = int(kind == "document_without_anchor")
            expected |= {(i, d): n for d, n in enumerate(lengths) if d >= skip}
    assert by_place == expected


@settings(max_examples=200)
@given(steps(), deals)
def test_a_micro_batch_keeps_the_limit_or_that_of_the_longest_unit_there(case, options):
    rows, kind = case
    plan = deal_units(cut_rows(rows, kind=kind), **options)
    tokens = plan.units.tokens + plan.units.anchors
    for index, planned in enumerate(plan.planned_tokens):
        here = plan.index == index
        if options["zero_stage"] >= 2:
            assert planned <= max(options["most_tokens"], tokens[here].max(initial=0))
            continue
        for rank in range(options["data_ranks"]):
            mine = here & (plan.rank == rank)
            alone = mine.sum() <= 1
            assert alone or plan.tokens[index, rank] <= options["most_tokens"]


@settings(max_examples=200)
@given(steps(), deals)
def test_no_micro_batch_is_blank_on_all_ranks(case, options):
    rows, kind = case
    plan = deal_units(cut_rows(rows, kind=kind), **options)
    assert plan.tokens.shape == (plan.micro_batches, options["data_ranks"])
    assert plan.micro_batches >= 1
    if len(plan.rank):
        assert (plan.planned_tokens > 0).all()
    assert plan.work_imbalance >= plan.least_imbalance * (1 - 1e-12) and plan.least_imbalance >= 1


@settings(max_examples=50)
@given(steps(), deals, st.integers(0, 9))
def test_places_depend_on_boundaries_and_options_alone(case, options, seed):
    """Neither on tokens, nor on labels, nor on a random state, nor on what was dealt before."""
    rows, kind = case
    first = deal_units(cut_rows(rows, kind=kind), **options)
    rng = np.random.default_rng(seed)
    np.random.seed(seed)
    deal_units(first.units, **(options | {"data_ranks": 3}))
    others = [
        Row(
            tokens=rng.integers(0, 99, len(row.tokens), dtype=np.int32),
            starts=row.starts.copy(),
            untargeted=rng.integers(0, 2, len(row.starts), dtype=np.int32),
            documents=row.documents.copy(),
            pad_count=row.pad_count,
        )
        for row in rows
    ]
    again = deal_units(cut_rows(others, kind=kind), **options)
    np.testing.assert_array_equal(first.rank, again.rank)
    np.testing.assert_array_equal(first.index, again.index)


@pytest.mark.parametrize("kind", UNITS)
def test_pairs_are_what_a_unit_attends_to(kind):
    """Counted one by one; what a micro-batch's anchor sees, itself, is no unit's."""
    rows = [make_row([1, 5, 9], pad_count=3), make_row([1, 13, 4])]
    units = cut_rows(rows, kind=kind)
    assert len(units.row) == {"document_without_anchor": 4, "row": 2}.get(kind, 6)
    for row, document, pairs in zip(units.row, units.document, units.pairs, strict=True):
        real = 18 - rows[row].pad_count
        unit = np.searchsorted(rows[row].starts, np.arange(real), side="right") - 1
        if kind == "row":
            unit = np.zeros(real, int)
        query, key = np.tril_indices(real)
        seen = unit[query] == unit[key]
        if kind == "document_without_anchor":
            seen |= key == 0
        assert pairs == (seen & (unit[query] == document)).sum()


def letters(plan: MicroBatchPlan) -> list[list[str]]:
    """The plan as the module's docstring draws it: ranks × micro-batches."""
    names = "abcdefgh"
    return [
        [
            "".join(names[u] * plan.units.tokens[u] for u in plan.units_of(rank=rank, index=index))
            for index in range(plan.micro_batches)
        ]
        for rank in range(plan.data_ranks)
    ]


def test_the_docstring_step():
    units = cut_rows([make_row([12, 4]), make_row([5, 3, 3, 2], pad_count=3)], kind="document")
    drawn = Path(micro_batches.__file__).read_text()
    for column, stage in ((0, 1), (1, 3)):
        plan = deal_units(units, data_ranks=2, zero_stage=stage, most_tokens=8, pair_price=0.01)
        for rank, found in enumerate(letters(plan)):
            (line,) = [line for line in drawn.splitlines() if f"    rank {rank}  " in line]
            assert line.split()[2:][2 * column : 2 * column + 2] == found
        assert plan.planned_tokens[0] == 12


def test_ranks_without_a_unit_get_blank_micro_batches():
    units = cut_rows([make_row([100, 10, 10])], kind="document")
    for stage in (1, 3):
        plan = deal_units(units, data_ranks=4, zero_stage=stage, most_tokens=10, pair_price=0.0)
        assert (plan.tokens == 0).any(axis=0).sum() >= 1
        assert plan.tokens.sum() == 120


def test_long_units_stand_side_by_side_where_ranks_meet_in_every_forward():
    lengths = [100, 8, 90, 8, 8, 80, 70, 8]
    units = cut_rows([make_row(lengths)], kind="document")
    plan = deal_units(units, data_ranks=4, zero_stage=3, most_tokens=40, pair_price=0.01)
    assert (plan.index[units.tokens > 40] == 0).all()
    assert sorted(plan.rank[units.tokens > 40]) == [0, 1, 2, 3]


def log_normal_step(
    row_length: int, rows: int, sigma: float, rng: np.random.Generator
) -> list[Row]:
    """Rows of log-normal documents, median 1339, each row's last cut at its end."""
    step = []
    for _ in range(rows):
        drawn = np.maximum(2, rng.lognormal(np.log(1339), sigma, row_length // 500).astype(int))
        ends = np.cumsum(drawn)
        assert ends[-1] >= row_length
        step.append(make_row(np.diff([0, *ends[ends < row_length], row_length])))
    return step


def whole_rows(units, ranks: int, price: float) -> float:
    """The busiest rank's work over the mean where every rank computes its own rows."""
    cost = np.bincount(units.row, units.tokens + price * units.pairs).reshape(ranks, -1).sum(1)
    return cost.max() / cost.mean()


@pytest.mark.parametrize("sigma", [1.0, 1.4])
@pytest.mark.parametrize(("ranks", "rows"), [(8, 1), (8, 4)])
def test_the_work_is_even(sigma, ranks, rows):
    rng = np.random.default_rng(0)
    once, least, every, before = [], [], [], []
    for _ in range(20):
        step = log_normal_step(131_072, ranks * rows, sigma, rng)
        units = cut_rows(step, kind="document")
        before.append(whole_rows(units, ranks, PRICE["1B"]))
        options = {"most_tokens": MOST, "pair_price": PRICE["1B"]}
        plan = deal_units(units, data_ranks=ranks, zero_stage=1, **options)
        once.append(plan.work_imbalance)
        least.append(plan.least_imbalance)
        plan = deal_units(units, data_ranks=ranks, zero_stage=3, **options)
        every.append(plan.work_imbalance)
    # One document may exceed a rank's share, and nobody else can have a part of it.
    assert np.max(np.array(once) / least) <= 1.005
    if rows == 4:
        assert np.mean(once) <= 1.01
    elif sigma == 1.0:
        assert np.mean(once) <= 1.02
    assert np.mean(every) <= np.mean(before), "no better than whole rows"
    assert np.mean(before) > 1.04, "rows that need no dealing prove nothing"


@pytest.mark.parametrize("sigma", [1.0, 1.4])
def test_a_ring_over_the_ranks_shares_the_longest_documents(sigma):
    """Micro-batches of ranks × N tokens, each by the ring's planner."""
    rng, ranks = np.random.default_rng(0), 8
    waited = mean = sent = plain = 0.0
    for _ in range(3):
        units = cut_rows(log_normal_step(131_072, ranks, sigma, rng), kind="document")
        plan = deal_units(
            units, data_ranks=1, zero_stage=3, most_tokens=ranks * MOST, pair_price=PRICE["1B"]
        )
        for index in range(plan.micro_batches):
            ends = np.cumsum(units.tokens[plan.units_of(rank=0, index=index)])
            length = -(-ends[-1] // (ranks * BLOCKS_PER_RANK)) * ranks * BLOCKS_PER_RANK
            ring = plan_row(np.unique([0, *ends, length]), ranks=ranks)
            cost = length / ranks + PRICE["1B"] * ring.load
            waited, mean = waited + cost.max(), mean + cost.mean()
            sent, plain = sent + ring.sent_tokens, plain + (ranks - 1) * length
    assert waited / mean <= 1.06
    assert sent / plain <= 0.12
