"""Splitting a batch over ranks, and the schedule that travels with it."""

from __future__ import annotations

import io
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.parallel.groups import make_grid
from anchor_context.parallel.plan import (
    RowPlan,
    blocks_per_rank,
    cut_row,
    local_tokens,
    plan_rows,
)
from anchor_context.parallel.schedule import Part, ShardedLayout, make_schedule
from anchor_context.parallel.shard import shard_batch

STARTS = np.array([0, 5, 70, 96, 97, 150])  # two rows of 96 tokens


def batch(pattern="anchor", placement="per_document") -> dict:
    layout = make_layout(
        STARTS, batch_size=2, row_length=96, pattern=pattern, anchor_placement=placement
    )
    tokens = torch.arange(192).view(2, 96)
    return {
        "input_ids": tokens,
        "labels": tokens + 1000,
        "position_ids": layout.position_ids,
        "layout": layout,
        "rows": 2,
    }


def grids(ring_degree: int, ulysses_degree: int) -> list:
    ranks = ring_degree * ulysses_degree
    return [
        make_grid(
            rank=rank, world_size=ranks, ring_degree=ring_degree, ulysses_degree=ulysses_degree
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(
    ("ring_degree", "ulysses_degree"), [(4, 1), (2, 2), (1, 4), (3, 2), (1, 1)]
)
def test_the_ranks_hold_every_token_once_with_its_label_and_position(ring_degree, ulysses_degree):
    whole = batch()
    parts = [shard_batch(whole, grid=grid) for grid in grids(ring_degree, ulysses_degree)]
    together = torch.cat([part["input_ids"] for part in parts], dim=1)
    assert (together.sort(dim=1).values == whole["input_ids"]).all()
    for part in parts:
        assert part["rows"] == 2 and part["input_ids"].shape == (2, 96 // len(parts))
        assert (part["labels"] == part["input_ids"] + 1000).all()
        flat = whole["position_ids"].flatten()[part["input_ids"]]
        assert (part["position_ids"] == flat).all()


def test_the_layout_stays_whole_and_carries_the_schedule():
    whole = batch()
    part = shard_batch(whole, grid=grids(4, 1)[2])
    layout = part["layout"]
    assert isinstance(layout, ShardedLayout) and layout.row_length == 96
    assert (layout.cu_seqlens == whole["layout"].cu_seqlens).all()
    schedule = layout.schedule_of(None)
    assert len(schedule.exchanges) == 4
    sent, plain = schedule.sent_tokens, 3 * 2 * 96
    assert 0 < sent < plain
    expected = f"{sent} tokens of keys and values sent per layer: {sent / plain:.3f} of a plain ring's bytes"
    assert str(schedule).startswith("imbalance 1.") and expected in str(schedule)
    assert type(shard_batch(whole, grid=grids(1, 4)[0])["layout"]) is type(whole["layout"])


def test_a_sharded_layout_moves_and_pickles_with_its_schedule():
    layout = shard_batch(batch(), grid=grids(4, 1)[1], windows=(None, 9))["layout"]
    moved, again = layout.to("meta"), pickle.loads(pickle.dumps(layout))
    for window in (None, 9):
        schedule = moved.schedule_of(window)
        assert schedule.causal.cu_seqlens_q.device.type == "meta"
        assert {exchange.send.device.type for exchange in schedule.exchanges} == {"meta"}
        schedule, other = layout.schedule_of(window), again.schedule_of(window)
        assert schedule.my_sent_tokens == other.my_sent_tokens
        for exchange, same in zip(schedule.exchanges, other.exchanges, strict=True):
            assert (exchange.send == same.send).all()


def test_layers_may_differ_in_their_window():
    """One placement, weighed by the layers, and a schedule for each window, which sends what it shows."""
    whole = batch(pattern="intra_doc", placement="none")
    layouts = [
        shard_batch(whole, grid=grid, windows=(9, None, 9, 4))["layout"] for grid in grids(4, 1)
    ]
    for layout in layouts:
        assert list(layout.schedules) == [9, None, 4]
        sent = [layout.schedule_of(window).sent_tokens for window in (4, 9, None)]
        assert 0 < sent[0] < sent[1] < sent[2]
        assert layout.imbalance == layout.schedule_of(4).imbalance
    # Rows of 5 + 65 + 26 and 1 + 53 + 42 tokens.
    documents = [np.array([5, 65, 26]), np.array([1, 53, 42])]
    pairs = {
        w: [np.minimum(np.arange(n) + 1, w).sum() for d in documents for n in d] for w in (4, 9)
    }
    pairs[None] = [n * (n + 1) // 2 for d in documents for n in d]
    plans = plan_rows(whole["layout"], ranks=4, windows=(9, None, 9, 4))
    mean = (2 * sum(pairs[9]) + sum(pairs[None]) + sum(pairs[4])) / 4
    assert sum(plan.load.sum() for plan in plans) == pytest.approx(mean)
    assert sum(plan.sent_tokens for plan in plans) == (2 * sent[1] + sent[2] + sent[0]) / 4


def tensors_of(value) -> list[torch.Tensor]:
    """Every tensor that can be reached from `value`, however it is kept there."""
    found = []

    class Finder(pickle.Pickler):
        def persistent_id(self, part):
            if isinstance(part, torch.Tensor):
                found.append(part)
                return "tensor"

    Finder(io.BytesIO()).dump(value)
    return found


@pytest.mark.parametrize("ring_degree", [1, 4])
def test_every_tensor_of_a_layout_is_pinned(ring_degree, monkeypatch):
    """One that is not would make its transfer wait for the GPU."""
    pinned = []  # (a tensor, its copy)

    def pin(tensor):
        pinned.append((tensor, tensor.clone()))
        return pinned[-1][1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    layout = shard_batch(batch(), grid=grids(ring_degree, 1)[0])["layout"]
    before = tensors_of(layout)
    assert len(before) == 4 if ring_degree == 1 else len(before) > 4 + 2 * ring_degree
    after = layout.pin_memory()
    assert type(after) is type(layout)
    assert {id(tensor) for tensor in before} == {id(tensor) for tensor, _ in pinned}
    assert {id(tensor) for tensor in tensors_of(after)} == {id(copy) for _, copy in pinned}


def test_what_one_rank_sends_is_what_the_other_awaits():
    plans = plan_rows(batch(pattern="full", placement="none")["layout"], ranks=4)
    schedules = [make_schedule(plans, rank=rank) for rank in range(4)]
    for rank, schedule in enumerate(schedules):
        for number, exchange in enumerate(schedule.exchanges):
            assert schedules[(rank + number) % 4].exchanges[number].receive == exchange.send.numel()
    total = sum(schedule.my_sent_tokens for schedule in schedules)
    assert total == schedules[0].sent_tokens > 0


@st.composite
def placed_rows(draw) -> list[RowPlan]:
    """Any placement of the blocks of one to three rows, not only the planner's, with anchors or without."""
    anchored = draw(st.booleans())
    ranks = draw(st.integers(1, 4))
    row_length = ranks * draw(st.integers(1, 12))
    blocks = ranks * blocks_per_rank(row_length, ranks=ranks)
    plans = []
    for _ in range(draw(st.integers(1, 3))):
        inner = draw(st.sets(st.integers(1, row_length), max_size=5)) - {row_length}
        boundaries = np.array([0, *sorted(inner), row_length])
        row = cut_row(boundaries, blocks=blocks, anchored=anchored)
        owner = draw(st.permutations(np.arange(blocks) % ranks))
        plans.append(RowPlan(row, np.array(owner), ranks))
    return plans


@settings(max_examples=300)
@given(placed_rows(), st.none() | st.integers(1, 40))
def test_the_ranks_compute_every_pair_once_and_send_nothing_else(plans, window):
    ranks, row_length = plans[0].ranks, int(plans[0].row.boundaries[-1])
    schedules = [make_schedule(plans, rank=rank, window=window) for rank in range(ranks)]
    row_starts = np.arange(len(plans))[:, None] * row_length
    tokens = [(local_tokens(plans, rank=r) + row_starts).reshape(-1) for r in range(ranks)]

    pairs, keys_sent = [], []
    for rank, schedule in enumerate(schedules):
        assert schedule.window == window
        edges = schedule.causal.cu_seqlens_q.tolist()
        for low, high in pairwise(edges):
            mine = tokens[rank][low:high].tolist()
            reach = window or row_length
            pairs += [
                (q, k) for i, q in enumerate(mine) for k in mine[max(0, i + 1 - reach) : i + 1]
            ]
        for number, exchange in enumerate(schedule.exchanges):
            source = (rank - number) % ranks
            message = tokens[source][schedules[source].exchanges[number].send.numpy()]
            assert len(message) == exchange.receive == len(set(message.tolist()))
            keys = tokens[rank] if number == 0 else message
            met = [pair for part in exchange.parts for pair in pairs_of(part, tokens[rank], keys)]
            pairs += met
            keys_sent.append(len(message))
            seen = {key for _, key in met}
            assert number == 0 or seen == set(message.tolist()), "something sent is of no use"

    documents = np.concatenate([np.diff(plan.row.boundaries) for plan in plans])
    document = np.repeat(np.arange(len(documents)), documents)
    start = np.repeat(np.cumsum(documents) - documents, documents)
    query, key = np.tril_indices(len(document))
    seen = document[query] == document[key]
    if window is not None:
        near, is_anchor = query - key < window, key == start[query]
        seen &= near | (is_anchor & plans[0].row.anchored)
    assert sorted(pairs) == sorted(zip(query[seen].tolist(), key[seen].tolist(), strict=True))
    assert sum(keys_sent) == schedules[0].sent_tokens == sum(plan.sent(window) for plan in plans)


def pairs_of(part: Part, queries: np.ndarray, keys: np.ndarray) -> list[tuple[int, int]]:
    """(query, key) of a part, of a rank's tokens and a source's; no query occurs twice in it."""
    assert len(set(part.queries.tolist())) == len(part.queries)
    found = []
    for q, k in zip(
        pairwise(part.spans.cu_seqlens_q.tolist()),
        pairwise(part.spans.cu_seqlens_k.tolist()),
        strict=True,
    ):
        asking = queries[part.queries[slice(*q)].numpy()].tolist()
        met = keys[part.keys[slice(*k)].numpy()].tolist()
        assert (
            0 < len(asking) <= part.spans.max_seqlen_q and 0 < len(met) <= part.spans.max_seqlen_k
        )
        assert not part.causal or len(asking) == len(met)
        for i, query in enumerate(asking):
            found += [(query, key) for key in (met[: i + 1] if part.causal else met)]
    return found


def test_rows_that_do_not_divide_are_an_error_that_names_a_row_length_that_does():
    with pytest.raises(ValueError, match=r"--seq-length 96 .*ring 5 × Ulysses 1.*use 95"):
        shard_batch(batch(), grid=grids(5, 1)[0])


def test_a_shared_anchor_cannot_be_planned():
    with pytest.raises(ValueError, match="per_document"):
        shard_batch(batch(placement="shared"), grid=grids(2, 1)[0])
    shard_batch(batch(placement="shared"), grid=grids(1, 2)[0])  # Ulysses takes it


def test_flex_on_a_ring_is_an_error_that_names_what_to_use():
    with pytest.raises(ValueError, match=r"ring_attn.*--parallel_mode ulysses_attn.*flash"):
        make_engine("flex", device=torch.device("cpu"), dtype=torch.float32, grid=grids(2, 1)[0])
