"""Time and rate of attention, forward and backward, for anchor and full, per kernel.

    python benchmarks/attention.py                             # the default for this machine
    python benchmarks/attention.py --row_lengths 4096 --repeats 3 --engines flash flex

One row of log-normal documents (median 1,339 tokens, sigma 1.0), one layer. With a GPU: 32 heads over 8
key/value heads, of 128 (LLaMA-3-8B's) and of 64 (LLaMA-3.2-1B's), in bfloat16; without one: 8 heads of 64
over 2 in float32. Every kernel of `KERNELS` that runs here takes part, and the others say why not. The flex
engine, which compiles for a while, takes part where it is asked for; on the CPU it trains through a dense
mask, and is left out of rows longer than 4,096.

`forward_s` and `backward_s` are medians, through the engine as a model calls it; `bare_*` are the kernel's
own two functions on the same row, of `anchor` alone. `mask_share` is the pattern's (query, key) pairs over
full causal attention's: the ceiling, for no kernel can make a pattern cheaper against `full` than its share
of the pairs. Rates count the pattern's own pairs: two matrix products forward and five backward (one makes
the scores again), two operations each per pair and entry of a head; beside them stands the rate of one large
matrix product on this device. `peak_bytes` is the most that forward and backward add to what q, k, v and the
output's gradient take. `first_s` is the first call, with what it compiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import (
    Report,
    document_lengths,
    kernels_here,
    layout_of,
    mask_share,
    matmul_rate,
    print_table,
    restart_peak,
    seconds,
)

from anchor_context.attention.flash import flatten_rows
from anchor_context.attention.kernels import KERNELS, Spans
from anchor_context.attention.patterns import attended_boundaries
from anchor_context.engine import Engine, make_engine
from anchor_context.layout import DocumentLayout
from anchor_context.run.device import peak_memory_bytes

CASE = ("engine", "kernel", "pattern", "row_length", "heads", "kv_heads", "head_dim")
PATTERNS = ("anchor", "full")
LONGEST_DENSE_MASK = 4096
ENOUGH_SECONDS = 2.0
"""Of repeats of one case: `full` on a long row is exact enough after two."""


@dataclass(frozen=True)
class Heads:
    """What q, k and v are."""

    heads: int
    kv_heads: int
    head_dim: int

    def inputs(self, row_length: int, *, device, dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
        """q, k, v as a model's projections give them, (1, heads, S, D) views, and the output's gradient."""
        torch.manual_seed(0)

        def tensor(heads: int) -> torch.Tensor:
            shape = (1, row_length, heads, self.head_dim)
            return torch.randn(shape, device=device, dtype=dtype).transpose(1, 2)

        qkv = [tensor(n).requires_grad_() for n in (self.heads, self.kv_heads, self.kv_heads)]
        return qkv, tensor(self.heads)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # The longest first: should the time run out, the short rows are what is missed least.
    lengths = [131_072, 32_768] if on_cuda else [16_384, 4_096]
    parser.add_argument("--row_lengths", type=int, nargs="+", default=lengths)
    dims = [128, 64] if on_cuda else [64]
    parser.add_argument("--head_dims", type=int, nargs="+", default=dims)
    parser.add_argument("--repeats", type=int, default=7, help="calls, timed, at most")
    parser.add_argument("--engines", nargs="+", default=["flash"], choices=("flash", "flex"))
    parser.add_argument(
        "--at_most_seconds", type=float, default=3600, help="start no case after so long"
    )
    parser.add_argument("--keep", type=Path, help="append every result to this file at once")
    flags = parser.parse_args()
    deadline = time.monotonic() + flags.at_most_seconds

    dtype = torch.bfloat16 if on_cuda else torch.float32
    heads, kv_heads = (32, 8) if on_cuda else (8, 2)
    report = Report("attention", case=CASE, device=device, keep=flags.keep)
    rate = matmul_rate(device, dtype)
    print(f"one large matrix product: {rate / 1e12:.4g} TFLOP/s", flush=True)
    kernels = {}
    if "flash" in flags.engines:
        kernels = {d: kernels_here(device, dtype, head_dim=d) for d in flags.head_dims}
    for row_length in flags.row_lengths:
        for head_dim in flags.head_dims:
            shape = Heads(heads, kv_heads, head_dim)
            engines = [("flash", name) for name in kernels.get(head_dim, ())]
            if "flex" in flags.engines and (on_cuda or row_length <= LONGEST_DENSE_MASK):
                engines.append(("flex", None))
            for name, kernel in engines:
                engine = make_engine(
                    name, device=device, dtype=dtype, head_dim=head_dim, kernel=kernel
                )
                for pattern in PATTERNS:
                    if time.monotonic() > deadline:
                        print(f"no time is left for {name} {kernel}, {pattern}, {row_length:,}")
                        continue
                    found = measure(
                        engine, pattern, shape, row_length, device, dtype, repeats=flags.repeats
                    )
                    report.add(found | {"matmul_flops_per_second": rate})
    show(report.results)
    ceiling = {"of_full_time": "mask_share of every result", "matmul_flops_per_second": rate}
    report.end(ceiling=ceiling)


def measure(
    engine: Engine, pattern: str, shape: Heads, row_length: int, device, dtype, *, repeats: int
) -> dict:
    """One engine on one pattern of one row."""
    lengths = document_lengths(row_length, seed=0)
    layout = layout_of(lengths, pattern=pattern).to(device)
    qkv, gradient = shape.inputs(row_length, device=device, dtype=dtype)
    scale = shape.head_dim**-0.5

    def forward() -> torch.Tensor:
        return engine.attend(*qkv, layout, scale=scale)

    def backward(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, qkv, gradient)  # fresh gradients: none are added up

    first_s = sum(times(forward, backward, device))
    before = restart_peak(device)
    forward_s, backward_s = median_times(forward, backward, device, repeats=repeats)
    found = {
        "engine": engine.name,
        "kernel": engine.kernel,
        "pattern": pattern,
        "row_length": row_length,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "documents": len(lengths),
        "mask_share": mask_share(lengths, pattern=pattern),
        "forward_s": forward_s,
        "backward_s": backward_s,
        "peak_bytes": peak_memory_bytes(device) - before,
        "first_s": first_s,
    }
    if engine.name == "flash" and pattern == "anchor":
        bare = bare_kernel(engine.kernel, qkv, gradient, layout, scale=scale)
        bare_s = median_times(*bare, device, repeats=repeats)
        found |= dict(zip(("bare_forward_s", "bare_backward_s"), bare_s, strict=True))
    pairs = found["mask_share"] * row_length * (row_length + 1) / 2
    operations = 2 * pairs * shape.heads * shape.head_dim
    return found | {
        "forward_flops_per_second": 2 * operations / forward_s,
        "backward_flops_per_second": 5 * operations / backward_s,
    }


def bare_kernel(
    name: str, qkv: list[torch.Tensor], gradient: torch.Tensor, layout: DocumentLayout, *, scale
) -> tuple[Callable, Callable]:
    """The kernel's own (forward, backward), for tensors that lie as it wants them."""
    kernel = KERNELS[name]
    q, k, v, dout = (flatten_rows(x.detach()).contiguous() for x in (*qkv, gradient))
    cu_seqlens, longest = attended_boundaries(layout)
    spans = Spans(cu_seqlens, cu_seqlens, longest, longest)
    settings = {"causal": True, "scale": scale, "window": None}
    return (
        lambda: kernel.forward(q, k, v, spans, **settings),
        lambda out: kernel.backward(dout, q, k, v, *out, spans, **settings),
    )


def median_times(
    forward: Callable, backward: Callable, device, *, repeats: int
) -> tuple[float, float]:
    """Of so many repeats, or of fewer where they take long."""
    taken = []
    while len(taken) < repeats and sum(map(sum, taken)) < ENOUGH_SECONDS:
        taken.append(times(forward, backward, device))
    return tuple(statistics.median(one) for one in zip(*taken, strict=True))


def times(forward: Callable, backward: Callable, device) -> tuple[float, float]:
    """(forward, backward) seconds; the layout was made before, as a loader does."""
    outputs = []
    return (
        seconds(lambda: outputs.append(forward()), device),
        seconds(lambda: backward(outputs[0]), device),
    )


def show(results: list[dict]) -> None:
    def case(r: dict, pattern: str) -> tuple:
        return (r["engine"], r["kernel"], r["head_dim"], r["row_length"], pattern)

    def total(r: dict) -> float:
        return r["forward_s"] + r["backward_s"]

    full = {case(r, "full"): total(r) for r in results if r["pattern"] == "full"}

    def of_full(r: dict) -> str:
        whole = full.get(case(r, "full"))  # none where its time was over
        return f"{total(r) / whole:.3f}" if whole else "-"

    def cell(r: dict, way: str) -> str:
        return f"{r[f'{way}_s'] * 1e3:.1f} ({r[f'{way}_flops_per_second'] / 1e12:.3g})"

    print_table(
        {
            "engine": [r["engine"] for r in results],
            "kernel": [r["kernel"] for r in results],
            "heads": [f"{r['heads']}/{r['kv_heads']} × {r['head_dim']}" for r in results],
            "pattern": [r["pattern"] for r in results],
            "row": [f"{r['row_length']:,}" for r in results],
            "documents": [r["documents"] for r in results],
            "mask share": [f"{r['mask_share']:.3f}" for r in results],
            "of full's time": [of_full(r) for r in results],
            "forward ms (TFLOP/s)": [cell(r, "forward") for r in results],
            "backward ms (TFLOP/s)": [cell(r, "backward") for r in results],
            "peak GiB": [f"{r['peak_bytes'] / 2**30:.2f}" for r in results],
        }
    )


if __name__ == "__main__":
    main()
