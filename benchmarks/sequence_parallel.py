"""Sequence parallelism measured: bytes, balance and step time per layout.

    python benchmarks/sequence_parallel.py                 # under a minute on two cores
    python benchmarks/sequence_parallel.py --rows 240      # the table of parallel/README.md
    python benchmarks/sequence_parallel.py --step_row_length 16384 --steps 3

Two parts. *On paper*, for rows of log-normal documents and for one row-long document: what each placement
of blocks on ring ranks leaves of imbalance and bytes; `step_s` is null. *Really run*, on gloo
processes on this machine: forward and backward of one attention layer on shorter rows, with the bytes
that the processes counted as sent, which must equal the predicted ones.

    imbalance         attention pairs of the busiest rank over the mean, mean over rows
    sent_bytes        sent by all ranks together, per row, layer and forward, mean over rows
    plain_ring_bytes  the same of a ring that passes every key and value to every rank
    minimum_bytes     a bound from below: what a ring of so many ranks must send even if it may place
                      every token by itself, equally many on each rank, and need not balance the work
                      (`unavoidable_tokens`). No bound for Ulysses, which sends heads of queries too
    plan_s            all that a loader worker plans for one row, in processor time, median: which rank
                      gets which block, which tokens those are, and one rank's schedule of messages
    step_s            forward and backward of one layer by the slowest rank, median (processes
                      share this machine's cores: compare layouts, not machines)

Bytes on paper are bfloat16 keys and values of 8 heads of 128 (LLaMA-3-8B's); those really run are float32,
--kv_heads of --head_dim. A backward sends the gradients of what the forward sent, as many bytes again;
Ulysses sends its four all-to-alls, forward.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import print_json, print_table  # first of ours: it makes the others importable

from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.parallel.groups import make_grid, make_groups
from anchor_context.parallel.plan import (
    BLOCKS_PER_RANK,
    RowPlan,
    contiguous_plan,
    cut_row,
    local_tokens,
    plan_row,
    zigzag_plan,
)
from anchor_context.parallel.schedule import make_schedule
from anchor_context.parallel.shard import shard_batch
from anchor_context.parallel.ulysses import kv_repeats

PAPER_BYTES_PER_TOKEN = 2 * 8 * 128 * 2  # keys and values, heads, head size, bfloat16
ROW_KINDS = ((1339, 1.0), (1339, 1.4), (None, None))
"""Median and sigma of the documents; None: one document."""
SIZES = ((131072, 8), (32768, 4))  # row length, ring ranks
LAYOUTS = {  # really run: name -> (ring degree, Ulysses degree)
    "one rank": (1, 1),
    "ring 2": (2, 1),
    "ring 4": (4, 1),
    "hybrid 2x2": (2, 2),
    "Ulysses 2": (1, 2),
    "Ulysses 4": (1, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=60, help="rows of each kind on paper")
    parser.add_argument("--seed", type=int, default=0, help="of the document lengths")
    parser.add_argument("--step_row_length", type=int, default=4096, help="tokens, really run")
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps per layout; 0: paper only"
    )
    parser.add_argument("--heads", type=int, default=8, help="query heads, really run")
    parser.add_argument("--kv_heads", type=int, default=2, help="key/value heads, really run")
    parser.add_argument("--head_dim", type=int, default=64, help="head size, really run")
    flags = parser.parse_args()

    results = []
    for row_length, ranks in SIZES:
        for median, sigma in ROW_KINDS:
            results += on_paper(row_length, ranks, median, sigma, flags)
    if flags.steps:
        results += really_run(flags)
    print_table(table(results))
    print_json(
        "sequence_parallel",
        device=torch.device("cpu"),
        ceiling={
            "imbalance": 1.0,
            "sent_bytes": "minimum_bytes",
            "blocks_per_rank": BLOCKS_PER_RANK,
        },
        results=results,
    )


# --- on paper -------------------------------------------------------------------------------------


def on_paper(row_length: int, ranks: int, median, sigma, flags) -> list[dict]:
    """One result for each placement: contiguous, zigzag and the planner's."""
    rows = make_rows(row_length, median, sigma, rows=flags.rows, seed=flags.seed)
    placements = {"contiguous": plan_contiguous, "zigzag": plan_zigzag, "planned ring": plan_row}
    results = []
    for name, place in placements.items():
        plans, seconds = zip(*(time_plan(row, ranks, place) for row in rows), strict=True)
        results.append(
            result(
                layout=name,
                ranks=ranks,
                row_length=row_length,
                median=median,
                sigma=sigma,
                imbalance=statistics.mean(plan.imbalance for plan in plans),
                sent=statistics.mean(plan.sent_tokens for plan in plans) * PAPER_BYTES_PER_TOKEN,
                plain=(ranks - 1) * row_length * PAPER_BYTES_PER_TOKEN,
                minimum=statistics.mean(unavoidable_tokens(row, ranks=ranks) for row in rows)
                * PAPER_BYTES_PER_TOKEN,
                plan_s=statistics.median(seconds),
                step_s=None,
            )
        )
    return results


def make_rows(row_length: int, median, sigma, *, rows: int, seed: int) -> list[np.ndarray]:
    """Boundaries of packed rows of log-normal documents (at least 32 tokens); a cut one goes on."""
    if median is None:
        return [np.array([0, row_length])] * rows
    rng = np.random.default_rng(seed)
    total, ends = rows * row_length, [0]
    while ends[-1] < total:
        ends.append(ends[-1] + int(max(32, rng.lognormal(np.log(median), sigma))))
    edges = np.union1d(np.minimum(ends, total), np.arange(0, total + 1, row_length))
    starts = np.searchsorted(edges, np.arange(0, total + 1, row_length))
    return [edges[first : last + 1] - edges[first] for first, last in pairwise(starts)]


def plan_contiguous(boundaries: np.ndarray, *, ranks: int) -> RowPlan:
    """One piece of the row per rank."""
    return contiguous_plan(cut_row(boundaries, blocks=ranks), ranks=ranks)


def plan_zigzag(boundaries: np.ndarray, *, ranks: int) -> RowPlan:
    """An early and a late piece per rank."""
    return zigzag_plan(cut_row(boundaries, blocks=2 * ranks), ranks=ranks)


def time_plan(boundaries: np.ndarray, ranks: int, place=plan_row) -> tuple[RowPlan, float]:
    """A row's plan, and the processor seconds that it took with what one rank makes of it."""
    start = time.process_time()
    plan = place(boundaries, ranks=ranks)
    local_tokens([plan], rank=0)
    make_schedule([plan], rank=0)
    return plan, time.process_time() - start


def unavoidable_tokens(boundaries: np.ndarray, *, ranks: int) -> int:
    """Tokens whose keys and values must cross ranks, each once per receiver, wherever the tokens are.

    Each of P ranks holds C = S / P tokens of the row, any of them. Order the holders of a document of L
    tokens by their last token of it. That token sees everything that the holders before hold, so its
    holder receives it: all L tokens but those of itself and the holders behind. None holds more than C, so

        the last holder receives at least L - C tokens, the last but one L - 2 C, ...

    and the document is received at least the sum of max(0, L - k C) over k = 1 ... P - 1 times. Documents
    share no keys, so these add up. One row-long document gives half of what a plain ring sends; a row of
    documents of at most C tokens gives 0.
    """
    share = int(boundaries[-1]) // ranks
    over = np.diff(boundaries)[:, None] - share * np.arange(1, ranks)
    return int(np.maximum(over, 0).sum())


# --- really run -----------------------------------------------------------------------------------


def really_run(flags) -> list[dict]:
    """One result for each kind of row and layout: a layer's time, the bytes the processes counted."""
    row_length, results = flags.step_row_length, []
    for ranks in (1, 2, 4):
        cases = []
        for median, sigma in ROW_KINDS:
            # Documents shrink with the row, or most rows would hold one alone.
            median = median and median * row_length // SIZES[-1][0]
            (boundaries,) = make_rows(row_length, median, sigma, rows=1, seed=flags.seed)
            cases += [
                (name, median, sigma, boundaries)
                for name, (ring_degree, ulysses_degree) in LAYOUTS.items()
                if ring_degree * ulysses_degree == ranks
            ]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        found = mp.get_context("spawn").SimpleQueue()
        mp.spawn(attend_cases, (ranks, port, cases, flags, found), nprocs=ranks)
        of_ranks = [found.get() for _ in range(ranks)]
        for case, of_case in zip(cases, zip(*of_ranks, strict=True), strict=True):
            results.append(result_of_run(*case, of_case, flags))
    return results


def result_of_run(name: str, median, sigma, boundaries: np.ndarray, of_ranks, flags) -> dict:
    """Joins what the ranks measured with the prediction, which must be right."""
    ring_degree, ulysses_degree = LAYOUTS[name]
    ranks, row_length = ring_degree * ulysses_degree, int(boundaries[-1])
    plan = plan_row(boundaries, ranks=ring_degree)
    per_token = 2 * flags.kv_heads * flags.head_dim * 4
    # Ulysses ranks share a token's heads, and repeat them where there are too few to share.
    repeats = kv_repeats(flags.kv_heads, ulysses_degree)
    ring_bytes = sum(one["ring_kv"] for one in of_ranks)
    assert ring_bytes == plan.sent_tokens * per_token * repeats, "the prediction is wrong"
    return result(
        layout=name,
        ranks=ranks,
        row_length=row_length,
        median=median,
        sigma=sigma,
        imbalance=plan.imbalance,
        sent=ring_bytes + sum(one["ulysses"] for one in of_ranks),
        plain=(ranks - 1) * row_length * per_token,
        minimum=unavoidable_tokens(boundaries, ranks=ranks) * per_token,
        plan_s=statistics.median(time_plan(boundaries, ring_degree)[1] for _ in range(5)),
        step_s=max(one["step_s"] for one in of_ranks),
    )


def attend_cases(rank: int, world: int, port: int, cases, flags, found) -> None:
    """One rank: every case in turn."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found.put([attend_steps(rank, world, name, rows, flags) for name, _, _, rows in cases])
    dist.barrier()
    dist.destroy_process_group()


def attend_steps(rank: int, world: int, name: str, boundaries: np.ndarray, flags) -> dict:
    """A warm-up and the timed steps of one layer on this rank, and the bytes of a forward."""
    ring_degree, ulysses_degree = LAYOUTS[name]
    grid = make_grid(
        rank=rank, world_size=world, ring_degree=ring_degree, ulysses_degree=ulysses_degree
    )
    ring_group, ulysses_group = make_groups(grid, rank=rank, world_size=world)
    engine = make_engine(
        "flash",
        device=torch.device("cpu"),
        dtype=torch.float32,
        grid=grid,
        ring_group=ring_group,
        ulysses_group=ulysses_group,
    )
    row_length = int(boundaries[-1])
    layout = make_layout(
        boundaries[:-1],
        batch_size=1,
        row_length=row_length,
        pattern="intra_doc",
        anchor_placement="none",
    )
    index = torch.arange(row_length)[None]
    batch = {"input_ids": index, "labels": index, "position_ids": index, "layout": layout}
    layout = shard_batch(batch, grid=grid)["layout"]
    q, k, v = (
        torch.randn(1, heads, row_length // world, flags.head_dim, requires_grad=True)
        for heads in (flags.heads, flags.kv_heads, flags.kv_heads)
    )
    seconds, sent = [], {}
    for _ in range(flags.steps + 1):
        dist.barrier()
        start = time.perf_counter()
        out = engine.attend(q, k, v, layout, scale=flags.head_dim**-0.5)
        forward = engine.traffic.take()
        sent = {kind: forward.get(kind, {"sent": 0})["sent"] for kind in ("ring_kv", "ulysses")}
        out.sum().backward()
        seconds.append(time.perf_counter() - start)
    return {"step_s": statistics.median(seconds[1:]), **sent}


# --- the report -----------------------------------------------------------------------------------


def result(*, sent: float, plain: float, minimum: float, **columns) -> dict:
    """One line of the table; bytes are whole."""
    plan_s, step_s = columns.pop("plan_s"), columns.pop("step_s")
    return columns | {
        "sent_bytes": round(sent),
        "plain_ring_bytes": round(plain),
        "minimum_bytes": round(minimum),
        "plan_s": plan_s,
        "step_s": step_s,
    }


def table(results: list[dict]) -> dict[str, list[str]]:
    """The columns for people."""

    def of_plain(one: dict, key: str) -> str:
        plain = one["plain_ring_bytes"]
        return f"{one[key] / plain:.3f}" if plain else "-"

    return {
        "layout": [one["layout"] for one in results],
        "ranks": [one["ranks"] for one in results],
        "row": [one["row_length"] for one in results],
        "median": [one["median"] or "-" for one in results],
        "sigma": [one["sigma"] or "-" for one in results],
        "imbalance": [f"{one['imbalance']:.3f}" for one in results],
        "sent MiB": [f"{one['sent_bytes'] / 2**20:.2f}" for one in results],
        "of plain": [of_plain(one, "sent_bytes") for one in results],
        "minimum": [of_plain(one, "minimum_bytes") for one in results],
        "plan ms": [f"{one['plan_s'] * 1e3:.2f}" for one in results],
        "step ms": [
            "-" if one["step_s"] is None else f"{one['step_s'] * 1e3:.1f}" for one in results
        ],
    }


if __name__ == "__main__":
    main()
