"""How evenly a step's work lies on its ranks: whole rows, documents dealt to ranks, and a ring over them.

    python benchmarks/micro_batches.py [--steps 100] [--micro_batch_tokens 32768]

On paper, from document boundaries alone: every data-parallel rank has some rows of log-normal documents
(median 1,339 tokens; a document cut by a row's end is two). Work counts a token's matrix products, and
its attention at the price that a pair has in a model of 1B or 8B parameters.

    rows         every rank computes its own rows, a row in a forward
    dealt        `data/micro_batches.py`: documents dealt to the ranks, whole
    zero 1 / 3   whether ranks wait for each other once a step, or in every forward
    ring         the same ranks share every micro-batch, of ranks × N tokens, by the ring's planner

    work_imbalance  what ranks wait for over a rank's mean work: mean over the steps (1 is perfect), and the
                    worst
    least           the same that the longest document alone forces, wherever the others go. Under stage 3 its
                    micro-batch has that many tokens on every rank, and shorter documents cannot fill
                    them with as much work. A ring shares the document: 1
    micro_batches   forwards of every rank in a step, mean
    sent_share      keys and values that cross ranks, as a share of a plain ring's
    deal_s          one core's time for a step's units and places, median
    plan_s          the same for the ring's plans of its micro-batches, which come on top
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from common import MEDIAN, print_json, print_table

from anchor_context.data.micro_batches import MicroBatchPlan, cut_rows, deal_units
from anchor_context.data.ranks import ring_imbalance, ring_plans
from anchor_context.data.rows import Row
from anchor_context.run.work import ModelWork

MODELS = {
    "1B": ModelWork(matmul_parameters=1_236_000_000, attention_width=16 * 32 * 64),
    "8B": ModelWork(matmul_parameters=7_500_000_000, attention_width=32 * 32 * 128),
}
SIGMAS = (1.0, 1.4)
SIZES = ((131_072, 8, 1), (131_072, 8, 4), (32_768, 8, 4), (131_072, 64, 1))
"""Row length, ranks, rows of each."""
MOST_RING_RANKS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="of every kind (64 ranks: a fifth)")
    parser.add_argument("--micro_batch_tokens", type=int, default=32_768, help="of one rank, N")
    flags = parser.parse_args()

    results = []
    for model in MODELS:
        for sigma in SIGMAS:
            for size in SIZES:
                results += measure(model, sigma, *size, flags)
    print_results(results)
    print_json(
        "micro_batches",
        device=torch.device("cpu"),
        ceiling={"work_imbalance": "least of every result"},
        results=results,
    )


def measure(
    model: str, sigma: float, row_length: int, ranks: int, rows: int, flags: argparse.Namespace
) -> list[dict]:
    """One result for each way to share the steps."""
    work = MODELS[model]
    price = work.pair_price
    steps = flags.steps if ranks <= 8 else -(-flags.steps // 5)
    found: dict[str, list[dict]] = {}
    for step in make_steps(row_length, ranks * rows, sigma, steps=steps):
        ways = dict(share(step, ranks, price, flags.micro_batch_tokens))
        for way, figures in ways.items():
            found.setdefault(way, []).append(figures)
    about = {
        "model": model,
        "sigma": sigma,
        "row_length": row_length,
        "ranks": ranks,
        "rows_per_rank": rows,
    }
    return [about | {"layout": way} | summary(of_steps) for way, of_steps in found.items()]


def summary(of_steps: list[dict]) -> dict:
    """Means over the steps, of times the median."""

    def over_steps(key: str, average=np.mean) -> float | None:
        values = [figures.get(key) for figures in of_steps]
        return None if None in values else float(average(values))

    return {
        "work_imbalance": over_steps("imbalance"),
        "worst": over_steps("imbalance", np.max),
        "least": over_steps("least"),
        "micro_batches": over_steps("micro_batches"),
        "sent_share": over_steps("sent_share"),
        "deal_s": over_steps("deal_s", np.median),
        "plan_s": over_steps("plan_s", np.median),
    }


def share(
    step: list[Row], ranks: int, price: float, most_tokens: int
) -> Iterator[tuple[str, dict]]:
    """Every way to share one step's rows, with its figures."""
    units = cut_rows(step, kind="document")
    cost = units.tokens + price * units.pairs
    rows = np.bincount(units.row, cost).reshape(ranks, -1)
    mean = rows.sum() / ranks
    for stage, waited in ((1, rows.sum(1).max()), (3, rows.max(0).sum())):
        yield f"rows, zero {stage}", {"imbalance": waited / mean, "micro_batches": rows.shape[1]}

    for stage in (1, 3):
        plan, seconds = deal(step, ranks, stage, price, most_tokens)
        yield (
            f"dealt, zero {stage}",
            {
                "imbalance": plan.work_imbalance,
                "least": plan.least_imbalance
                if stage == 1
                else least_in_forwards(plan, most_tokens),
                "micro_batches": plan.micro_batches,
                "deal_s": seconds,
            },
        )
    if ranks <= MOST_RING_RANKS:
        plan, seconds = deal(step, 1, 1, price, ranks * most_tokens)
        yield "ring", ring_figures(plan, ranks, price) | {"deal_s": seconds}


def deal(
    step: list[Row], data_ranks: int, zero_stage: int, price: float, most_tokens: int
) -> tuple[MicroBatchPlan, float]:
    """The plan of a step, and the processor seconds that it took, from the rows on."""
    start = time.process_time()
    plan = deal_units(
        cut_rows(step, kind="document"),
        data_ranks=data_ranks,
        zero_stage=zero_stage,
        most_tokens=most_tokens,
        pair_price=price,
    )
    return plan, time.process_time() - start


def least_in_forwards(plan: MicroBatchPlan, most_tokens: int) -> float:
    """A bound from below of `work_imbalance` where ranks meet in every forward.

    The micro-batch of the longest document, of L tokens, costs what that document costs. All ranks
    together hold at most ranks × max(N, L) tokens in it, at best those of the longest documents, which
    cost most per token; what is left costs at least its mean in the other micro-batches.
    """
    longest_first = np.argsort(-plan.units.tokens)
    tokens, cost = plan.units.tokens[longest_first], plan.unit_cost[longest_first]
    room = plan.data_ranks * max(most_tokens, tokens[0])
    beside = np.interp(room, np.cumsum(tokens), np.cumsum(cost))
    waited = cost[0] + (cost.sum() - min(beside, plan.data_ranks * cost[0])) / plan.data_ranks
    return waited / (cost.sum() / plan.data_ranks)


def ring_figures(plan: MicroBatchPlan, ranks: int, price: float) -> dict:
    """What the ring's planner makes of every micro-batch: its ranks wait for each other in all of them."""
    start = time.process_time()
    plans = ring_plans(plan, ranks)
    seconds = time.process_time() - start
    sent = sum(p.sent_tokens for p in plans)
    return {
        "imbalance": ring_imbalance(plans, ranks=ranks, pair_price=price),
        "least": 1.0,
        "micro_batches": plan.micro_batches,
        "sent_share": sent / sum((ranks - 1) * p.row.boundaries[-1] for p in plans),
        "plan_s": seconds,
    }


# --- rows -----------------------------------------------------------------------------------------


def make_steps(row_length: int, rows: int, sigma: float, *, steps: int) -> Iterator[list[Row]]:
    """Steps of packed rows of log-normal documents, each row's last cut at its end."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield [make_row(draw_lengths(row_length, sigma, rng)) for _ in range(rows)]


def draw_lengths(row_length: int, sigma: float, rng: np.random.Generator) -> np.ndarray:
    lengths: list[int] = []
    left = row_length
    while left:
        lengths.append(min(left, max(2, int(rng.lognormal(np.log(MEDIAN), sigma)))))
        left -= lengths[-1]
    return np.array(lengths)


def make_row(lengths: np.ndarray) -> Row:
    """A row of these documents; its tokens are of no interest."""
    return Row(
        tokens=np.broadcast_to(np.int32(0), int(lengths.sum()) + 1),
        starts=np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int32),
        untargeted=np.zeros(len(lengths), np.int32),
        documents=np.arange(len(lengths), dtype=np.int32),
        pad_count=0,
    )


# --- the report -----------------------------------------------------------------------------------


def print_results(results: list[dict]) -> None:
    """A line for each model, sigma and size; beside a mean, in brackets, the least there can be."""
    keys = ("model", "sigma", "row_length", "ranks", "rows_per_rank")
    lines: dict[tuple, dict[str, dict]] = {}
    for result in results:
        lines.setdefault(tuple(result[key] for key in keys), {})[result["layout"]] = result

    def column(layout: str, cell: Callable[[dict], str]) -> list[str]:
        return [cell(line[layout]) if layout in line else "-" for line in lines.values()]

    def imbalance(r: dict) -> str:
        return f"{r['work_imbalance']:.3f}" + (f" ({r['least']:.3f})" if r["least"] else "")

    def milliseconds(key: str) -> Callable[[dict], str]:
        return lambda r: f"{r[key] * 1e3:.1f}"

    layouts = ("rows, zero 1", "rows, zero 3", "dealt, zero 1", "dealt, zero 3", "ring")
    print_table(
        {
            "model": [key[0] for key in lines],
            "sigma": [key[1] for key in lines],
            "row": [f"{key[2]:,}" for key in lines],
            "ranks x rows": [f"{key[3]} x {key[4]}" for key in lines],
            **{layout: column(layout, imbalance) for layout in layouts},
            "of plain ring": column("ring", lambda r: f"{r['sent_share']:.3f}"),
            "micro-batches": column("dealt, zero 3", lambda r: f"{r['micro_batches']:.1f}"),
            "deal 1 ms": column("dealt, zero 1", milliseconds("deal_s")),
            "deal 3 ms": column("dealt, zero 3", milliseconds("deal_s")),
            "ring plan ms": column("ring", milliseconds("plan_s")),
        }
    )


if __name__ == "__main__":
    main()
