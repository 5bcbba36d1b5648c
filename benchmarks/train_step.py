"""Step time and peak memory of a training step: anchor against full against a plain Hugging Face loop.

    python benchmarks/train_step.py                          # the default for this machine
    python benchmarks/train_step.py --row_length 4096 --repeats 1

Same model, rows and type for all variants (`steps.py` says what each computes). Without a GPU: a LLaMA of 8
layers, hidden size 256, vocabulary 32,768, float32, rows of 16,384 tokens. With one: LLaMA-3.2-1B's
sizes, bfloat16, rows of 131,072 tokens. Documents are log-normal (median 1,339 tokens, sigma 1.0); every
repeat has another row, on which all variants take a step, one after the other, so that whatever else the
machine does meets them alike. `step_s` is the median. `peak_bytes` is of a step on the first row in a
process of its own: on the CPU the whole process's resident memory, on CUDA what tensors held. A
variant that does not fit has null.

The ceiling is the mask's share for attention alone: the attention part of a step with `anchor` can take no
less than that share of `full`'s.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from common import (
    document_lengths,
    gibibytes,
    in_fresh_process,
    mask_share,
    matmul_rate,
    print_json,
    print_table,
    seconds,
)
from steps import ONE_BILLION, SMALL, VARIANTS, Step, peak_of_step


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row_length", type=int, default=131_072 if on_cuda else 16_384)
    parser.add_argument("--repeats", type=int, default=5 if on_cuda else 3, help="rows, timed")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    flags = parser.parse_args()
    shape, dtype = (ONE_BILLION, torch.bfloat16) if on_cuda else (SMALL, torch.float32)
    rows = [document_lengths(flags.row_length, seed=seed) for seed in range(flags.repeats)]

    peaks = {
        variant: in_fresh_process(peak_of_step, variant, shape, device, dtype, rows[0])
        for variant in flags.variants
    }
    timed = [variant for variant in flags.variants if peaks[variant] is not None]
    times = time_steps(timed, shape, device, dtype, rows)
    results = []
    for variant in flags.variants:
        step_s = statistics.median(times[variant]) if variant in times else None
        results.append(
            {
                "variant": variant,
                "row_length": flags.row_length,
                "step_s": step_s,
                "tokens_per_second": flags.row_length / step_s if step_s else None,
                "peak_bytes": peaks[variant],
            }
        )
    share = statistics.median(mask_share(row, pattern="anchor") for row in rows)
    show(results, times, share)
    ceiling = {
        "anchor_mask_share": share,
        "documents": [len(row) for row in rows],
        "matmul_flops_per_second": matmul_rate(device, dtype),
    }
    print_json("train_step", device=device, ceiling=ceiling, results=results)


def time_steps(variants, shape, device, dtype, rows) -> dict[str, list[float]]:
    """{variant: seconds per row}, the variants taking turns."""
    row_length = int(rows[0].sum())
    steps = {
        variant: Step(variant, shape, device=device, dtype=dtype, row_length=row_length)
        for variant in variants
    }
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for step in steps.values():
        # Kernels, the allocator and the optimiser's states: on a GPU a whole step, else a short one.
        step(rows[0] if device.type == "cuda" else document_lengths(1024, seed=0))
    for row in rows:
        for variant, step in steps.items():
            times[variant].append(seconds(partial(step, row), device))
    return times


def show(results: list[dict], times: dict[str, list[float]], share: float) -> None:
    by_name = {one["variant"]: one for one in results}

    def of(name: str, key: str, one: dict) -> str:
        whole = by_name.get(name, {}).get(key)
        return f"{one[key] / whole:.3f}" if whole and one[key] else "-"

    print_table(
        {
            "variant": [one["variant"] for one in results],
            "row": [f"{one['row_length']:,}" for one in results],
            "step s": [f"{one['step_s']:.2f}" if one["step_s"] else "-" for one in results],
            "of full's": [of("full", "step_s", one) for one in results],
            "tokens/s": [
                f"{one['tokens_per_second']:,.0f}" if one["step_s"] else "-" for one in results
            ],
            "peak GiB": [gibibytes(one["peak_bytes"]) for one in results],
            "of plain's": [of("plain_hf", "peak_bytes", one) for one in results],
        }
    )
    for variant, taken in times.items():
        print(f"{variant}: " + ", ".join(f"{t:.2f}" for t in taken) + " s")
    print(f"the mask of anchor has {share:.3f} of full's pairs (median row)")


if __name__ == "__main__":
    main()
