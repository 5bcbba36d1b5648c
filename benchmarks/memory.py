"""How memory grows with the row, what a plan expects, and what micro-batches save: a training step's bytes.

    python benchmarks/memory.py                           # the default for this machine
    python benchmarks/memory.py --gib 4 --variants anchor --parts growth longest
    python benchmarks/memory.py --parts expected          # on one H100: a minute

Every peak but those of `expected` is of an optimiser step in a process of its own (`steps.py`); on the CPU
it is the whole process's resident memory, on CUDA what tensors held.

growth         `exponent` is the slope of log(peak − peak of a row of 2K) over log(row length − 2K), for
               rows from 8K to 64K tokens, so that neither weights, libraries nor the loss's tile, which are
               there with any row, can flatter it. 1 is linear, the ceiling: activations are per token.
               Without a GPU every layer keeps its activations, the case in which most is held; with one,
               layers are checkpointed. plain_hf holds (row × row) masks: it is fitted up to 16K.
longest        The longest row, in steps of 1,024 tokens, whose peak stays within --gib, layers checkpointed,
               by bisection to a sixteenth; it is the result with the variant's name and "longest".
expected       What the memory plan expects of a treatment beside what tensors held at once, bytes that
               PyTorch's allocator handed out: between 1.0 and 1.2 times it. With the time of a forward and
               backward; on the CPU the profiler's counting is not in it.
micro_batches  What a step of one long row of documents of at most 4,096 tokens adds to the process's memory,
               nothing recomputed, in one forward and in micro-batches of 4,096; and the time per token
               beside that of rows of 4,096 tokens.

Without a GPU: a LLaMA of 4 layers, hidden size 128, vocabulary 32,768, float32, 2 GiB, and for micro-batches
the one of `train_step.py`, of 8 layers and hidden size 256. With one: LLaMA-3.2-1B's sizes, bfloat16, all of
the GPU's memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from functools import partial

import numpy as np
import torch
from common import (
    document_lengths,
    gibibytes,
    in_fresh_process,
    most_held,
    print_json,
    print_table,
    restart_peak,
    seconds,
)
from steps import ONE_BILLION, SMALL, VARIANTS, Plan, Shape, Step, peak_of_step

from anchor_context.loss import liger_available
from anchor_context.memory.estimate import ModelSizes, Setup, expected_peak
from anchor_context.memory.treatments import Treatment
from anchor_context.run.device import peak_memory_bytes

TINY = Shape(4, 128, 344, 2, 1, 32_768)
FIXED = 2_048
"""Tokens in the row whose peak counts as there anyway."""
FITTED = {"plain_hf": (4_096, 8_192, 16_384)}
FITTED |= dict.fromkeys(("anchor", "full"), (8_192, 16_384, 32_768, 65_536))
GRAIN = 1024
PLENTY = 2**50
"""Bytes: a plan for them refuses nothing."""
MICRO_BATCH = 4_096
"""Tokens, and the longest document, of the part `micro_batches`."""

NOTHING, FULL = Treatment(), Treatment(checkpoint_every=1)
TILED = Treatment(checkpoint_every=1, tiled_mlp=True)
OFFLOADED = Treatment(checkpoint_every=1, offload=True)
EXPECTED = {
    "cpu": [
        (shape, dtype, tokens, treatment)
        for shape, tokens in ((TINY, 8_192), (SMALL, 4_096))
        for dtype in (torch.float32, torch.bfloat16)
        for treatment in (NOTHING, Treatment(checkpoint_every=2), FULL, TILED)
    ],
    "cuda": [
        (ONE_BILLION, torch.bfloat16, tokens, treatment)
        for tokens, treatment in (
            (32_768, NOTHING),
            (131_072, FULL),
            (262_144, FULL),
            (262_144, OFFLOADED),
        )
    ],
}
PARTS = ("growth", "longest", "expected", "micro_batches")


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory / 2**30 if on_cuda else 2.0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=total, help="the memory to fit, in GiB")
    parser.add_argument("--variants", nargs="+", default=("anchor", "plain_hf"), choices=VARIANTS)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--row_length", type=int, default=65_536, help="of micro_batches")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of micro_batches")
    parser.add_argument(
        "--at_most_seconds",
        type=float,
        default=3600,
        help="start no probe of the bisection that would end later, going by the one before",
    )
    flags = parser.parse_args()
    deadline = time.monotonic() + flags.at_most_seconds

    results, exponents = [], {}
    for variant in flags.variants if {"growth", "longest"} & set(flags.parts) else ():
        found, exponents[variant] = measure_rows(
            variant, device, flags.parts, limit=int(flags.gib * 2**30), deadline=deadline
        )
        results += found
    if exponents:
        show_rows(results, exponents, gib=flags.gib)
    if "expected" in flags.parts:
        results += measure_expected(device)
    if "micro_batches" in flags.parts:
        results += measure_micro_batches(device, flags.row_length, repeats=flags.repeats)
    print_json(
        "memory",
        device=device,
        ceiling={"exponent": 1.0, "memory_bytes": int(flags.gib * 2**30)},
        results=results,
        exponent=exponents,
    )


# --- growth, longest ------------------------------------------------------------------------------


def measure_rows(
    variant: str, device: torch.device, parts: list[str], *, limit: int, deadline: float
) -> tuple[list[dict], float | None]:
    """The results of one variant, and its exponent."""
    on_cuda = device.type == "cuda"
    shape, dtype = (ONE_BILLION, torch.bfloat16) if on_cuda else (TINY, torch.float32)

    def peak(row_length: int, checkpointing: str = "full") -> int | None:
        """None where it does not fit."""
        # Where layers are checkpointed MLPs are tiled, too, when the plan needs it.
        free = limit if checkpointing == "full" else PLENTY
        plan_for = {
            "gradient_checkpointing": checkpointing,
            "micro_batch_tokens": "row",
            "free_bytes": free,
        }
        lengths = document_lengths(row_length, seed=0)
        try:
            return in_fresh_process(
                peak_of_step, variant, shape, device, dtype, lengths, "auto", plan_for
            )
        except ValueError:  # the plan says so
            return None

    results, exponent, peaks = [], None, {}
    if "growth" in parts:
        fitted_with = "full" if on_cuda else "none"
        peaks = {length: peak(length, fitted_with) for length in (FIXED, *FITTED[variant])}
        results += [
            {"variant": variant, "row_length": length, "peak_bytes": size}
            for length, size in peaks.items()
        ]
        exponent = fit(peaks)
    if "longest" in parts:
        longest = longest_row(peak, peaks if on_cuda else {}, limit=limit, deadline=deadline)
        results.append({"variant": f"{variant} longest", **longest})
    return results, exponent


def show_rows(results: list[dict], exponents: dict[str, float | None], *, gib: float) -> None:
    print_table(
        {
            "variant": [r["variant"] for r in results],
            "row": [f"{r['row_length']:,}" for r in results],
            "peak GiB": [gibibytes(r["peak_bytes"]) for r in results],
        }
    )
    for variant, exponent in exponents.items():
        slope = "-" if exponent is None else f"{exponent:.3f}"
        print(f"{variant}: exponent {slope}")
    for result in results:
        if result["variant"].endswith("longest"):
            print(f"{result['variant']}: {result['row_length']:,} tokens fit {gib:.1f} GiB")


def fit(peaks: dict[int, int | None]) -> float | None:
    """The exponent with which the peaks grow from `FIXED` on; None where fewer than two rows fit."""
    rows = [length for length, size in peaks.items() if length > FIXED and size is not None]
    if len(rows) < 2:
        return None
    tokens = [length - FIXED for length in rows]
    grown = [peaks[length] - peaks[FIXED] for length in rows]
    return float(np.polyfit(np.log(tokens), np.log(grown), 1)[0])


def longest_row(
    peak, known: dict[int, int | None], *, limit: int, deadline: float
) -> dict[str, int | None]:
    """The longest row, a multiple of `GRAIN` tokens, whose peak is at most `limit` bytes.

    Starts from the peaks that are known, doubles until one does not fit, then halves the gap.
    """
    sizes = dict(known)
    probe_seconds = 0.0

    def in_time() -> bool:
        return time.monotonic() + 2 * probe_seconds < deadline  # a row may be twice the last one's

    def fits(row_length: int) -> bool:
        nonlocal probe_seconds
        if row_length not in sizes:
            started = time.monotonic()
            sizes[row_length] = peak(row_length)
            probe_seconds = time.monotonic() - started
        return sizes[row_length] is not None and sizes[row_length] <= limit

    fitting = max([length for length in known if fits(length)], default=0)
    failing = max(8 * GRAIN, 2 * fitting)
    while in_time() and fits(failing):
        fitting, failing = failing, 2 * failing
    # Each probe is a process and a step: a sixteenth is near enough.
    while in_time() and failing - fitting > max(GRAIN, fitting // 16):
        middle = (fitting + failing) // 2 // GRAIN * GRAIN
        if fits(middle):
            fitting = middle
        else:
            failing = middle
    return {"row_length": fitting, "peak_bytes": sizes.get(fitting)}


# --- expected -------------------------------------------------------------------------------------


def measure_expected(device: torch.device) -> list[dict]:
    """Of each of this device's cases what the plan expects and what tensors held."""
    results = in_fresh_process(held_and_expected, device) or []
    print_table(
        {
            "treatment": [r["variant"] for r in results],
            "tokens": [f"{r['row_length']:,}" for r in results],
            "expected GiB": [gibibytes(r["expected_bytes"]) for r in results],
            "held GiB": [gibibytes(r["peak_bytes"]) for r in results],
            "ratio": [f"{r['expected_bytes'] / r['peak_bytes']:.3f}" for r in results],
            "forward and backward s": [f"{r['step_s']:.2f}" for r in results],
        }
    )
    return results


def held_and_expected(device: torch.device) -> list[dict]:
    """All cases in this process, which need be no fresh one for a GPU's allocator or the profiler's count."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    results = []
    for shape, dtype, tokens, treatment in EXPECTED[device.type]:
        measure = partial(held_and_seconds, shape, device, dtype, tokens, treatment)
        held, taken = measure()
        if device.type == "cpu":
            held = most_held(measure)
        sizes = ModelSizes.of(
            shape.model(device=torch.device("meta"), dtype=dtype, max_length=tokens)
        )
        setup = Setup(sizes, dtype.itemsize, device.type, liger=liger_available(device))
        results.append(
            {
                "variant": f"{treatment}, {str(dtype).removeprefix('torch.')}",
                "row_length": tokens,
                "peak_bytes": held,
                "expected_bytes": expected_peak(setup, treatment, tokens).total,
                "step_s": taken,
            }
        )
        print(results[-1], flush=True)  # at once, should a later case run out of memory
    return results


def held_and_seconds(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    treatment: Treatment,
) -> tuple[int, float]:
    """Peak and seconds per forward and backward of a step with two forwards, as long as each other.

    The second one is beside the first one's gradients, as all but the first are in a step.
    """
    plan = Plan(treatment, micro_batch_tokens=tokens)
    step = Step(plan, shape, device=device, dtype=dtype, row_length=2 * tokens)
    rows = [document_lengths(tokens, seed=seed) for seed in range(2)]
    # From now on kernels are compiled, buffers are allocated, and the optimiser has its states.
    step(rows[0], "anchor")
    if device.type == "cuda":
        restart_peak(device)
    taken = seconds(lambda: step(np.concatenate(rows), "anchor"), device)
    return peak_memory_bytes(device), taken / 2


# --- micro-batches --------------------------------------------------------------------------------


def measure_micro_batches(device: torch.device, row_length: int, *, repeats: int) -> list[dict]:
    """A long row in one forward, in micro-batches, and as many rows as long as a micro-batch."""
    long_row = document_lengths(row_length, seed=0, longest=MICRO_BATCH)
    short_rows = np.concatenate(
        [document_lengths(MICRO_BATCH, seed=seed) for seed in range(row_length // MICRO_BATCH)]
    )
    added = {
        name: in_fresh_process(added_bytes, device, long_row, most_tokens)
        for name, most_tokens in (("one forward", row_length), ("micro-batches", MICRO_BATCH))
    }
    taken = in_fresh_process(seconds_in_turns, device, [long_row, short_rows], repeats)
    per_token = [time / row.sum() for time, row in zip(taken, (long_row, short_rows), strict=True)]
    print(
        f"a row of {row_length:,} tokens adds {gibibytes(added['one forward'])} GiB in one forward, "
        f"{gibibytes(added['micro-batches'])} in micro-batches of {MICRO_BATCH:,}: "
        f"{added['micro-batches'] / added['one forward']:.3f} of it (at most 0.2)"
    )
    print(
        f"a token takes {1e6 * per_token[0]:.1f} µs there, {1e6 * per_token[1]:.1f} in rows of "
        f"{MICRO_BATCH:,}: {per_token[0] / per_token[1]:.3f} times that (at most 1.1)"
    )
    return [
        {
            "variant": f"row in {name}",
            "row_length": row_length,
            "peak_bytes": size,
            "seconds_per_token": per_token[0] if name == "micro-batches" else None,
        }
        for name, size in added.items()
    ] + [
        {
            "variant": f"rows of {MICRO_BATCH}",
            "row_length": MICRO_BATCH,
            "peak_bytes": None,
            "seconds_per_token": per_token[1],
        }
    ]


def added_bytes(device: torch.device, lengths: np.ndarray, most_tokens: int) -> int:
    """What the process, or a GPU's tensors, grow by in a step; run it in a fresh process."""
    step = step_with_nothing_recomputed(device, lengths, most_tokens)
    step(document_lengths(256, seed=0), "anchor")  # from now on the optimiser has its states
    before = restart_peak(device)
    step(lengths, "anchor")
    return peak_memory_bytes(device) - before


def seconds_in_turns(device: torch.device, rows: list[np.ndarray], repeats: int) -> list[float]:
    """Medians of a step in micro-batches of `MICRO_BATCH` tokens on each of the rows, taking turns."""
    step = step_with_nothing_recomputed(device, rows[0], MICRO_BATCH)
    step(document_lengths(MICRO_BATCH, seed=0), "anchor")
    times = [
        [seconds(partial(step, row, "anchor"), device) for row in rows] for _ in range(repeats)
    ]
    return [statistics.median(of_row) for of_row in zip(*times, strict=True)]


def step_with_nothing_recomputed(
    device: torch.device, lengths: np.ndarray, most_tokens: int
) -> Step:
    warnings.filterwarnings("ignore", category=FutureWarning)
    shape, dtype = (
        (ONE_BILLION, torch.bfloat16) if device.type == "cuda" else (SMALL, torch.float32)
    )
    plan = Plan(NOTHING, micro_batch_tokens=most_tokens)
    return Step(plan, shape, device=device, dtype=dtype, row_length=int(lengths.sum()))


if __name__ == "__main__":
    main()
