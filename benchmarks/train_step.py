"""Step time, rate and peak memory of a training step: patterns, kernels and plans side by side.

    python benchmarks/train_step.py                                  # the default for this machine
    python benchmarks/train_step.py --row_length 4096 --repeats 1 --cases auto:anchor auto:full

Same model, rows and type for all cases. A case is PLAN:PATTERN (`steps.py` has the plans), or plain_hf; each
runs with every kernel that runs here. Without a GPU: a LLaMA of 8 layers, hidden size 256, vocabulary
32,768, float32, rows of 16,384 tokens. With one: LLaMA-3.2-1B's sizes, bfloat16, rows of 131,072 tokens.
Documents are log-normal (median 1,339 tokens, sigma 1.0); every repeat has another row, on which all cases
of a plan take a step, one after the other, so that whatever else the machine does meets them alike.

`step_s` is the median, and `mfu` counts the pattern's own work against the data sheet (null off the GPU).
`peak_bytes` is, on CUDA, the most that tensors held over the steps, and on the CPU, where a process's peak is
of its whole life, the resident memory of one that takes a step on the first row. A case that does not fit has
null. The ceiling is the mask's share for attention alone: the attention part of a step with `anchor` can take
no less than that share of `full`'s.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from common import (
    Report,
    document_lengths,
    gibibytes,
    in_fresh_process,
    kernels_here,
    mask_share,
    matmul_rate,
    pairs_of,
    print_table,
    restart_peak,
    seconds,
)
from steps import ONE_BILLION, PLANS, SMALL, Shape, Step, peak_of_step

from anchor_context.run.device import peak_flops, peak_memory_bytes
from anchor_context.run.work import ModelWork

CASE = ("variant", "plan", "kernel", "row_length")
ON_CUDA = ("micro_batches:anchor", "checkpointed:anchor", "checkpointed:full")
ON_CPU = ("auto:anchor", "auto:full", "plain_hf")


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row_length", type=int, default=131_072 if on_cuda else 16_384)
    parser.add_argument("--repeats", type=int, default=2 if on_cuda else 3, help="rows, timed")
    choices = [f"{plan}:{pattern}" for plan in ("auto", *PLANS) for pattern in ("anchor", "full")]
    parser.add_argument(
        "--cases",
        nargs="+",
        default=ON_CUDA if on_cuda else ON_CPU,
        choices=[*choices, "plain_hf"],
        metavar="PLAN:PATTERN",
        help=f"of the plans auto, {', '.join(PLANS)}, or plain_hf",
    )
    parser.add_argument(
        "--at_most_seconds", type=float, default=3600, help="begin no step that ends later"
    )
    parser.add_argument("--keep", type=Path, help="append every result to this file at once")
    flags = parser.parse_args()
    deadline = time.monotonic() + flags.at_most_seconds
    shape, dtype = (ONE_BILLION, torch.bfloat16) if on_cuda else (SMALL, torch.float32)
    rows = [document_lengths(flags.row_length, seed=seed) for seed in range(flags.repeats)]

    report = Report("train_step", case=CASE, device=device, keep=flags.keep)
    kernels = kernels_here(device, dtype, head_dim=shape.head_dim)
    for plan, cases in groupby(flags.cases, key=lambda case: case.partition(":")[0]):
        if time.monotonic() > deadline:
            print(f"no time is left for {plan}", flush=True)
            continue
        patterns = [case.partition(":")[2] or case for case in cases]
        case = (plan, shape, device, dtype)
        names = ["sdpa"] if plan == "plain_hf" else kernels
        for result in measure(*case, patterns, names, rows, deadline=deadline):
            report.add(result)
        gc.collect()  # the plan's model, before the next one's
        if on_cuda:
            torch.cuda.empty_cache()
    share = statistics.median(mask_share(row, pattern="anchor") for row in rows)
    show(report.results)
    print(f"the mask of anchor has {share:.3f} of full's pairs (median row)")
    report.end(
        ceiling={
            "anchor_mask_share": share,
            "documents": [len(row) for row in rows],
            "matmul_flops_per_second": matmul_rate(device, dtype),
        }
    )


def measure(
    plan: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    patterns: list[str],
    kernels: list[str],
    rows: list[np.ndarray],
    *,
    deadline: float,
) -> Iterator[dict]:
    """After every row, a result for each kernel and pattern: the medians so far."""
    on_cuda = device.type == "cuda"
    step = Step(plan, shape, device=device, dtype=dtype, row_length=int(rows[0].sum()))
    work = ModelWork.of(step.model)
    promised = peak_flops(device)
    times: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], int | None] = {}
    for repeat, row in enumerate(rows):
        for kernel in kernels:
            if not step.plain:
                step.use_kernel(kernel)
            if repeat == 0:
                # The allocator and the optimiser's states: on a GPU a whole step, of the cheapest pattern.
                # For another kernel's own a short one is enough.
                whole = on_cuda and kernel == kernels[0]
                warm_up = row if whole else document_lengths(1024, seed=0)
                fits(partial(step, warm_up, "anchor"), step, device)
            for pattern in patterns:
                if time.monotonic() + slowest(times, pattern) > deadline:
                    print(f"no time is left for {plan}:{pattern} with {kernel}", flush=True)
                    continue
                case = (kernel, pattern)
                before = peaks.get(case) or 0
                if on_cuda:
                    restart_peak(device)
                taken = fits(partial(step, row, pattern), step, device)
                if taken is not None:
                    times.setdefault(case, []).append(taken)
                    if on_cuda:
                        peaks[case] = max(before, peak_memory_bytes(device))
                if not on_cuda and repeat == 0:
                    same = (pattern, shape, device, dtype, row)
                    peaks[case] = in_fresh_process(peak_of_step, *same, plan)
                step_s = statistics.median(times[case]) if case in times else None
                flops = statistics.median(
                    work.flops(tokens=int(r.sum()), pairs=pairs_of(r, pattern=pattern))
                    for r in rows[: repeat + 1]
                )
                yield {
                    "variant": pattern,
                    "plan": step.told,
                    "kernel": kernel,
                    "row_length": int(row.sum()),
                    "repeats": repeat + 1,
                    "step_s": step_s,
                    "tokens_per_second": int(row.sum()) / step_s if step_s else None,
                    "mfu": flops / (promised * step_s) if step_s and promised else None,
                    "peak_bytes": peaks.get(case),
                }


def slowest(times: dict[tuple[str, str], list[float]], pattern: str) -> float:
    """The longest step with this pattern so far, whatever its kernel; 0 before the first."""
    taken = [max(of_case) for (_, of_pattern), of_case in times.items() if of_pattern == pattern]
    return max(taken, default=0.0)


def fits(work, step: Step, device: torch.device) -> float | None:
    """Seconds that `work` takes; None where the GPU's memory is not enough."""
    try:
        return seconds(work, device)
    except torch.OutOfMemoryError:
        step.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return None


def show(results: list[dict]) -> None:
    def of(key: str, one: dict, **other: str) -> str:
        """The figure over that of the case which differs in `other` alone; the plain loop is one for all."""
        wanted = {"plan": one["plan"], "kernel": one["kernel"]} | other
        whole = [r[key] for r in results if all(r[k] == v for k, v in wanted.items())]
        return f"{one[key] / whole[0]:.3f}" if whole and whole[0] and one[key] else "-"

    plain = {"plan": "plain_hf", "kernel": "sdpa"}
    print_table(
        {
            "variant": [one["variant"] for one in results],
            "plan": [one["plan"] for one in results],
            "kernel": [one["kernel"] for one in results],
            "row": [f"{one['row_length']:,}" for one in results],
            "step s": [f"{one['step_s']:.2f}" if one["step_s"] else "-" for one in results],
            "of full's": [of("step_s", one, variant="full") for one in results],
            "tokens/s": [
                f"{one['tokens_per_second']:,.0f}" if one["step_s"] else "-" for one in results
            ],
            "MFU": [f"{one['mfu']:.1%}" if one["mfu"] else "-" for one in results],
            "peak GiB": [gibibytes(one["peak_bytes"]) for one in results],
            "of plain's": [of("peak_bytes", one, **plain) for one in results],
        }
    )


if __name__ == "__main__":
    main()
