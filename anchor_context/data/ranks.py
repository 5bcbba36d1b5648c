"""How evenly the rows of a prepared set would lie on N ranks, and what they would send each other.

    ranks share                          waiting  micro-batches         sent
    data parallel, ZeRO 1                  1.013            4.0      0.0 GiB
    data parallel, ZeRO 2 and 3            1.093            5.0      0.0 GiB
    ring_attn                              1.005            4.0      2.1 GiB

Guarantees: the figures of data-parallel ranks are those of the loader's own plans, and a ring's those of its
planner, for the first `STEPS` steps of rows in the order of the set.
Costs: 10 to 30 ms a step and row of the table for 8 ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from anchor_context.data.inspection import LLAMA_7B_WORK
from anchor_context.data.micro_batches import MicroBatchPlan, Units, cut_rows, deal_units, unit_kind
from anchor_context.data.rows import PreparedRows
from anchor_context.parallel.plan import BLOCKS_PER_RANK, RowPlan, plan_row

STEPS = 20
CLOSE = 0.03
"""Ways that wait for so little more than the best one are as good, and the one that sends least is taken."""


# Of LLaMA-2-7B, by whose sizes work and exchanges are told, in bfloat16.
PAIR_PRICE = LLAMA_7B_WORK.pair_price
"""The work of a (query, key) pair; that of one token without attention is 1."""
QUERY_BYTES = 32 * 4096 * 2
"""Of one token's queries in all layers; its outputs have as many."""
KEY_VALUE_BYTES = 2 * QUERY_BYTES
"""Of one token's keys and values in all layers."""


@dataclass(frozen=True)
class Way:
    """One way to share the work, with its means over the steps."""

    name: str
    zero_stages: tuple[int, ...]
    """DeepSpeed's, under which it is as told here."""
    imbalance: float
    """The work that ranks wait for over a rank's mean work."""
    micro_batches: float
    sent_bytes: float
    """Of a step's forward, by all ranks together; the backward sends about twice as much again."""


def ways_to_share(
    prepared: PreparedRows,
    *,
    pattern: str,
    ranks: int,
    rows_per_rank: int,
    micro_batch_tokens: int,
) -> list[Way]:
    """Measure every way that these rows allow.

    Raises:
        ValueError: fewer rows than one step has.
    """
    rows_per_step = ranks * rows_per_rank
    steps = min(STEPS, len(prepared) // rows_per_step)
    if steps == 0:
        raise ValueError(
            f"--ranks {ranks} × --rows_per_rank {rows_per_rank}: a step has {rows_per_step} rows, and "
            f"{prepared.directory} only {len(prepared)}"
        )
    kind = unit_kind(pattern, prepared.anchor_placement)
    found: dict[str, list[Way]] = {}
    for step in range(steps):
        first = step * rows_per_step
        rows = [prepared.row(i) for i in range(first, first + rows_per_step)]
        units = cut_rows(rows, kind=kind)
        for way in _ways(units, ranks, micro_batch_tokens, placement=prepared.anchor_placement):
            found.setdefault(way.name, []).append(way)
    return [
        replace(
            of_steps[0],
            imbalance=float(np.mean([way.imbalance for way in of_steps])),
            micro_batches=float(np.mean([way.micro_batches for way in of_steps])),
            sent_bytes=float(np.mean([way.sent_bytes for way in of_steps])),
        )
        for of_steps in found.values()
    ]


def best_way(ways: list[Way], *, zero_stage: int) -> Way:
    """The one that waits least under a ZeRO stage; of those that are close, the one that sends least."""
    possible = [way for way in ways if zero_stage in way.zero_stages]
    least = min(way.imbalance for way in possible)
    return min(
        (way for way in possible if way.imbalance <= least + CLOSE), key=lambda way: way.sent_bytes
    )


def _ways(units: Units, ranks: int, most_tokens: int, *, placement: str) -> Iterator[Way]:
    def deal(data_ranks: int, zero_stage: int) -> MicroBatchPlan:
        return deal_units(
            units,
            data_ranks=data_ranks,
            zero_stage=zero_stage,
            most_tokens=most_tokens * (ranks // data_ranks),
            pair_price=PAIR_PRICE,
        )

    for name, stages in (("ZeRO 1", (1,)), ("ZeRO 2 and 3", (2, 3))):
        plan = deal(ranks, stages[0])
        yield Way(
            f"data parallel, {name}", stages, plan.work_imbalance, plan.micro_batches, sent_bytes=0
        )
    if placement == "shared":  # its anchor is visible to tokens of every rank of a ring
        return
    plan = deal(1, 1)
    tokens = plan.tokens.sum()
    for ulysses in (1, 2, 4, 8):
        ring = ranks // ulysses
        if ranks % ulysses or ring < 2:
            continue
        plans = ring_plans(plan, ring)
        exchanged = (2 * QUERY_BYTES + KEY_VALUE_BYTES) * tokens * (ulysses - 1) / ulysses
        keys_and_values = KEY_VALUE_BYTES * sum(p.sent_tokens for p in plans)
        name = "ring_attn" if ulysses == 1 else f"hybrid_attn, Ulysses {ulysses} × ring {ring}"
        yield Way(
            name,
            (1, 2, 3),
            ring_imbalance(plans, ranks=ring),
            plan.micro_batches,
            sent_bytes=exchanged + keys_and_values,
        )


def ring_plans(plan: MicroBatchPlan, ranks: int) -> list[RowPlan]:
    """Every micro-batch of one data group on the ranks of a ring, padded to whole blocks."""
    plans = []
    for index in range(plan.micro_batches):
        ends = np.cumsum(plan.units.tokens[plan.units_of(rank=0, index=index)])
        blocks = ranks * BLOCKS_PER_RANK
        padded = -(-ends[-1] // blocks) * blocks
        plans.append(plan_row(np.unique(np.concatenate(([0], ends, [padded]))), ranks=ranks))
    return plans


def ring_imbalance(plans: list[RowPlan], *, ranks: int) -> float:
    """The work that a ring's ranks wait for over a rank's mean: they meet in every micro-batch."""
    # (micro-batches, ranks)
    cost = np.array([p.row.boundaries[-1] / ranks + PAIR_PRICE * p.load for p in plans])
    return float(cost.max(1).sum() / cost.mean(1).sum())


def describe_ways(ways: list[Way]) -> str:
    """A table for people, and which way to take."""
    lines = [f"{'ranks share':<36} {'waiting':>8} {'micro-batches':>14} {'sent':>12}"]
    lines += [
        f"{way.name:<36} {way.imbalance:>8.3f} {way.micro_batches:>14.1f} "
        f"{way.sent_bytes / 2**30:>8.1f} GiB"
        for way in ways
    ]
    lines += [
        "waiting: the work of the rank that others wait for over the mean; sent: of a step's forward, with "
        "LLaMA-2-7B's sizes",
        *(
            f"under ZeRO {stage} I would take: {best_way(ways, zero_stage=stage).name}"
            for stage in (1, 3)
        ),
    ]
    return "\n".join(lines)
