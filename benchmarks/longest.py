"""The longest single document that trains, and how fast: a whole row that is one document.

    python benchmarks/longest.py                          # the default for this machine
    python benchmarks/longest.py --at_most_seconds 600 --kernel torch_varlen

No document boundary can save anything here, so it is the longest row of `full`, too. With a GPU:
LLaMA-3.2-1B's sizes, bfloat16; without one: a tiny LLaMA, float32. An optimiser step each (`steps.py`), with
the first of the plans, each leaner than the one before, that fits.

Attention's work grows with the square of the length. The longest document that the time left allows, going by
the step before, comes next; where it does not fit, half of the way back is tried. `out_of_memory_at` is the
last that did not fit with any plan; null where the time was over before.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import numpy as np
import torch
from common import Report, gibibytes, kernels_here, pairs_of, print_table, restart_peak, seconds
from steps import ONE_BILLION, TINY, Shape, Step

from anchor_context.run.device import peak_flops, peak_memory_bytes
from anchor_context.run.work import ModelWork

PLANS = ("checkpointed", "tiled", "offloaded")


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    first = 32_768 if on_cuda else 1_024
    parser.add_argument("--first", type=int, default=first, help="tokens; others are multiples")
    parser.add_argument("--at_most_seconds", type=float, default=120, help="of all steps")
    parser.add_argument("--at_most_tokens", type=int, default=2**24, help="try none longer")
    parser.add_argument("--kernel", help="of the flash engine; default: the fastest here")
    parser.add_argument("--keep", type=Path, help="append every result to this file at once")
    flags = parser.parse_args()
    deadline = time.monotonic() + flags.at_most_seconds
    shape, dtype = (ONE_BILLION, torch.bfloat16) if on_cuda else (TINY, torch.float32)
    kernel = flags.kernel or kernels_here(device, dtype, head_dim=shape.head_dim)[0]

    report = Report("longest", case=("kernel",), device=device, keep=flags.keep)
    trainer = Trainer(shape, device, dtype, kernel=kernel)
    best, failing, tokens = None, None, flags.first
    while tokens:
        result = trainer.train(tokens)
        if result is None:
            failing = tokens
            print(f"{tokens:,} tokens: out of memory", flush=True)
        else:
            best = result
        if best is not None:
            report.add(best | {"out_of_memory_at": failing})
        seconds_left = deadline - time.monotonic()
        tokens = next_length(
            best, failing, seconds_left, grain=flags.first, at_most=flags.at_most_tokens
        )
    show(report.results)
    report.end(ceiling={"mfu": 1.0})


def next_length(
    best: dict | None, failing: int | None, seconds_left: float, *, grain: int, at_most: int
) -> int:
    """The document to try next, in tokens; 0 where none is left that is worth the time."""
    if best is None or seconds_left <= 0:
        return 0
    trained = best["document_tokens"]
    # Twice the tokens cost at most four times the seconds.
    longest = min(at_most, int(trained * (0.9 * seconds_left / best["step_s"]) ** 0.5))
    if failing is not None:
        longest = min(longest, (trained + failing) // 2)
    longest -= longest % grain
    return longest if longest >= 1.125 * trained else 0


class Trainer:
    """Takes steps on single documents, with the first plan that fits, and that one from then on."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, *, kernel: str):
        self.shape, self.device, self.dtype, self.kernel = shape, device, dtype, kernel
        self.plans = list(PLANS)
        self.step: Step | None = None

    def train(self, tokens: int) -> dict | None:
        """A step on a document of so many tokens, as a result; None where no plan fits."""
        while self.plans:
            try:
                return self._train(tokens)
            except torch.OutOfMemoryError:
                pass  # here the exception still holds the step's tensors
            self.step = None
            gc.collect()
            torch.cuda.empty_cache()
            if len(self.plans) == 1:  # the leanest stays, for a shorter document
                return None
            self.plans.pop(0)

    def _train(self, tokens: int) -> dict:
        document = np.array([tokens])
        if self.step is None:
            sizes = {"device": self.device, "dtype": self.dtype, "row_length": tokens}
            self.step = Step(self.plans[0], self.shape, **sizes)
            self.step.use_kernel(self.kernel)
            # What compiles, and the optimiser's states.
            self.step(np.array([min(tokens, 8_192)]), "anchor")
        restart_peak(self.device)
        step_s = seconds(lambda: self.step(document, "anchor"), self.device)
        work, promised = ModelWork.of(self.step.model), peak_flops(self.device)
        flops = work.flops(tokens=tokens, pairs=pairs_of(document, pattern="anchor"))
        return {
            "kernel": self.kernel,
            "plan": self.step.told,
            "document_tokens": tokens,
            "step_s": step_s,
            "tokens_per_second": tokens / step_s,
            "mfu": flops / (promised * step_s) if promised else None,
            "peak_bytes": peak_memory_bytes(self.device),
        }


def show(results: list[dict]) -> None:
    print_table(
        {
            "kernel": [r["kernel"] for r in results],
            "plan": [r["plan"] for r in results],
            "document": [f"{r['document_tokens']:,}" for r in results],
            "step s": [f"{r['step_s']:.2f}" for r in results],
            "tokens/s": [f"{r['tokens_per_second']:,.0f}" for r in results],
            "MFU": ["-" if r["mfu"] is None else f"{r['mfu']:.1%}" for r in results],
            "peak GiB": [gibibytes(r["peak_bytes"]) for r in results],
        }
    )


if __name__ == "__main__":
    main()
