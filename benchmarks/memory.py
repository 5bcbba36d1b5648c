"""How memory grows with the row, and the longest row that fits: a training step's peak, per variant.

    python benchmarks/memory.py                           # the default for this machine
    python benchmarks/memory.py --gib 4 --variants anchor

Every peak is of an optimiser step in a process of its own (`steps.py`); on the CPU it is the whole process's
resident memory, on CUDA what tensors held.

`exponent` is the slope of log(peak − peak of a row of 2K) over log(row length − 2K), for rows from 8K to 64K
tokens, so that neither weights, libraries nor the loss's tile, which are there with any row, can flatter
it. 1 is linear, the ceiling: activations are per token. Without a GPU every layer keeps its activations, the
case in which most is held; with one, layers are checkpointed. plain_hf holds (row × row) masks: it is
fitted up to 16K.

Then the longest row, in steps of 1,024 tokens, whose peak stays within --gib, layers checkpointed, by
bisection to a sixteenth; it is the result with the variant's name and "longest".

Without a GPU: a LLaMA of 4 layers, hidden size 128, vocabulary 32,768, float32, 2 GiB. With one:
LLaMA-3.2-1B's sizes, bfloat16, all of the GPU's memory.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from common import (
    document_lengths,
    gibibytes,
    in_fresh_process,
    print_json,
    print_table,
)
from steps import ONE_BILLION, VARIANTS, Shape, peak_of_step

TINY = Shape(4, 128, 344, 2, 1, 32_768)
FIXED = 2_048
"""Tokens in the row whose peak counts as there anyway."""
FITTED = {"plain_hf": (4_096, 8_192, 16_384)}
FITTED |= dict.fromkeys(("anchor", "full"), (8_192, 16_384, 32_768, 65_536))
GRAIN = 1024


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory / 2**30 if on_cuda else 2.0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=total, help="the memory to fit, in GiB")
    parser.add_argument("--variants", nargs="+", default=("anchor", "plain_hf"), choices=VARIANTS)
    parser.add_argument(
        "--at_most_seconds",
        type=float,
        default=3600,
        help="start no probe of the bisection that would end later, going by the one before",
    )
    flags = parser.parse_args()
    deadline = time.monotonic() + flags.at_most_seconds
    shape, dtype = (ONE_BILLION, torch.bfloat16) if on_cuda else (TINY, torch.float32)

    results, exponents, longest = [], {}, {}
    for variant in flags.variants:

        def peak(
            row_length: int, checkpointing: str = "full", variant: str = variant
        ) -> int | None:
            row = document_lengths(row_length, seed=0)
            return in_fresh_process(peak_of_step, variant, shape, device, dtype, row, checkpointing)

        fitted_with = "full" if on_cuda else "none"
        peaks = {length: peak(length, fitted_with) for length in (FIXED, *FITTED[variant])}
        results += [
            {"variant": variant, "row_length": length, "peak_bytes": size}
            for length, size in peaks.items()
        ]
        exponents[variant] = fit(peaks)
        longest[variant] = longest_row(
            peak, peaks if on_cuda else {}, limit=int(flags.gib * 2**30), deadline=deadline
        )
        results.append({"variant": f"{variant} longest", **longest[variant]})

    print_table(
        {
            "variant": [r["variant"] for r in results],
            "row": [f"{r['row_length']:,}" for r in results],
            "peak GiB": [gibibytes(r["peak_bytes"]) for r in results],
        }
    )
    for variant, exponent in exponents.items():
        slope = "-" if exponent is None else f"{exponent:.3f}"
        row = longest[variant]["row_length"]
        print(f"{variant}: exponent {slope}; {row:,} tokens fit {flags.gib:.1f} GiB")
    print_json(
        "memory",
        device=device,
        ceiling={"exponent": 1.0, "memory_bytes": int(flags.gib * 2**30)},
        results=results,
        exponent=exponents,
    )


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


if __name__ == "__main__":
    main()
