"""Time and peak memory of attention, forward and backward, for full and anchor, per engine and kernel.

    python benchmarks/attention.py                             # the default for this machine
    python benchmarks/attention.py --row_lengths 4096 --repeats 3

Rows of log-normal documents (median 1,339 tokens, sigma 1.0), one layer: without a GPU 8 heads of 64 over 2
key/value heads in float32, with one 32 heads of 128 over 8 in bfloat16 (LLaMA-3-8B's). Every kernel that
runs here takes part; patterns and kernels take turns, repeat by repeat, each repeat on another row.

`forward_s` and `backward_s` are medians. `mask_share` is the pattern's (query, key) pairs over full causal
attention's: the ceiling, for no kernel can make a pattern cheaper against `full` than its share of the
pairs. `peak_bytes` is the most that forward and backward of the first row add to what q, k, v and the
output's gradient take, measured in a process of its own. On the CPU the flex engine trains through a dense
mask, so it takes part up to rows of 4,096 alone.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from common import (
    document_lengths,
    gibibytes,
    in_fresh_process,
    layout_of,
    mask_share,
    matmul_rate,
    print_json,
    print_table,
    restart_peak,
    seconds,
)

from anchor_context.attention.kernels import KERNELS
from anchor_context.engine import make_engine
from anchor_context.layout import DocumentLayout
from anchor_context.metrics import peak_memory_bytes

PATTERNS = ("full", "anchor")
LONGEST_DENSE_MASK = 4096


@dataclass(frozen=True)
class Setting:
    """What q, k and v are."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int

    def inputs(self, row_length: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """q, k, v as a model's projections give them, (1, heads, S, D) views, and the output's gradient."""
        torch.manual_seed(0)

        def tensor(heads: int) -> torch.Tensor:
            shape = (1, row_length, heads, self.head_dim)
            return torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2)

        qkv = [tensor(n).requires_grad_() for n in (self.heads, self.kv_heads, self.kv_heads)]
        return qkv, tensor(self.heads)


class Attention:
    """One engine and kernel on one pattern."""

    def __init__(self, engine: str, kernel: str | None, pattern: str, setting: Setting):
        self.setting, self.pattern = setting, pattern
        self.engine = make_engine(engine, device=setting.device, dtype=setting.dtype, kernel=kernel)

    def layout(self, lengths: np.ndarray) -> DocumentLayout:
        return layout_of(lengths, pattern=self.pattern).to(self.setting.device)

    def times(self, lengths: np.ndarray) -> tuple[float, float]:
        """(forward, backward) seconds on one row; the layout is made before, as a loader does."""
        qkv, gradient = self.setting.inputs(int(lengths.sum()))
        layout, outputs = self.layout(lengths), []
        scale = self.setting.head_dim**-0.5
        forward = seconds(
            lambda: outputs.append(self.engine.attend(*qkv, layout, scale=scale)),
            self.setting.device,
        )
        backward = seconds(lambda: outputs[0].backward(gradient), self.setting.device)
        return forward, backward


def peak_of(engine, kernel, pattern, setting: Setting, lengths: np.ndarray) -> int:
    """What attention adds to the peak; run it by `in_fresh_process`."""
    attention = Attention(engine, kernel, pattern, setting)
    attention.times(lengths[:1].clip(max=256))  # libraries and compilers take their memory first
    qkv, gradient = setting.inputs(int(lengths.sum()))
    layout = attention.layout(lengths)
    before = restart_peak(setting.device)
    out = attention.engine.attend(*qkv, layout, scale=setting.head_dim**-0.5)
    out.backward(gradient)
    return peak_memory_bytes(setting.device) - before


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [32_768, 131_072] if on_cuda else [4_096, 16_384]
    parser.add_argument("--row_lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--repeats", type=int, default=10 if on_cuda else 5, help="rows, timed")
    flags = parser.parse_args()
    if on_cuda:
        setting = Setting(device, torch.bfloat16, heads=32, kv_heads=8, head_dim=128)
    else:
        setting = Setting(device, torch.float32, heads=8, kv_heads=2, head_dim=64)

    results = []
    for row_length in flags.row_lengths:
        results += measure(setting, row_length, repeats=flags.repeats)
    show(results, setting)
    rate = matmul_rate(device, setting.dtype)
    print(f"one large matrix product: {rate / 1e12:.2f} TFLOP/s")
    ceiling = {"of_full_time": "mask_share of every result", "matmul_flops_per_second": rate}
    print_json("attention", device=device, ceiling=ceiling, results=results)


def measure(setting: Setting, row_length: int, *, repeats: int) -> list[dict]:
    """One result for every engine, kernel and pattern."""
    rows = [document_lengths(row_length, seed=seed) for seed in range(repeats)]
    cases = [
        (engine, kernel, pattern)
        for engine, kernel in engines_here(setting, row_length)
        for pattern in PATTERNS
    ]
    attentions = [Attention(*case, setting) for case in cases]
    times: list[list[tuple[float, float]]] = [[] for _ in cases]
    for attention in attentions:
        attention.times(rows[0])
    for row in rows:
        for attention, taken in zip(attentions, times, strict=True):
            taken.append(attention.times(row))
    results = []
    for case, attention, taken in zip(cases, attentions, times, strict=True):
        shares = [mask_share(row, pattern=attention.pattern) for row in rows]
        forward_s, backward_s = (statistics.median(t) for t in zip(*taken, strict=True))
        results.append(
            {
                "engine": attention.engine.name,
                "kernel": attention.engine.kernel,
                "pattern": attention.pattern,
                "row_length": row_length,
                "documents": int(statistics.median(len(row) for row in rows)),
                "mask_share": statistics.median(shares),
                "forward_s": forward_s,
                "backward_s": backward_s,
                "peak_bytes": in_fresh_process(peak_of, *case, setting, rows[0]),
            }
        )
    return results


def engines_here(setting: Setting, row_length: int) -> list[tuple[str, str | None]]:
    """(engine, kernel) of all that run on this device and row."""
    flash = [
        ("flash", kernel.name)
        for kernel in KERNELS.values()
        if kernel.unavailable(setting.device, setting.dtype) is None
    ]
    dense = setting.device.type == "cpu"
    return flash + [("flex", None)] * (not dense or row_length <= LONGEST_DENSE_MASK)


def show(results: list[dict], setting: Setting) -> None:
    full = {
        (r["kernel"], r["row_length"]): r["forward_s"] + r["backward_s"]
        for r in results
        if r["pattern"] == "full"
    }

    def total(r: dict) -> float:
        return r["forward_s"] + r["backward_s"]

    def rate(r: dict) -> float:
        """TFLOP/s by the pattern's own pairs: the forward has two matrix products, the backward five
        (one makes the scores again), two operations each per pair and head dimension."""
        pairs = r["mask_share"] * r["row_length"] * (r["row_length"] + 1) / 2
        return 14 * pairs * setting.heads * setting.head_dim / total(r) / 1e12

    print_table(
        {
            "engine": [r["engine"] for r in results],
            "kernel": [r["kernel"] for r in results],
            "pattern": [r["pattern"] for r in results],
            "row": [f"{r['row_length']:,}" for r in results],
            "documents": [r["documents"] for r in results],
            "mask share": [f"{r['mask_share']:.3f}" for r in results],
            "of full's time": [
                f"{total(r) / full[r['kernel'], r['row_length']]:.3f}" for r in results
            ],
            "forward ms": [f"{r['forward_s'] * 1e3:.1f}" for r in results],
            "backward ms": [f"{r['backward_s'] * 1e3:.1f}" for r in results],
            "TFLOP/s": [f"{rate(r):.2f}" for r in results],
            "peak GiB": [gibibytes(r["peak_bytes"]) for r in results],
        }
    )


if __name__ == "__main__":
    main()
