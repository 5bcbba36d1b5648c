"""What the benchmarks share: rows of log-normal documents, a fresh process per peak, and the report.

A benchmark prints a table for people and, last, one JSON line for programs: `{"benchmark", "hardware",
"versions", "command", "ceiling", "results"}`, times in seconds (medians), sizes in bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from anchor_context.attention.patterns import attended_pairs, make_layout
from anchor_context.layout import DocumentLayout
from anchor_context.metrics import peak_memory_bytes

MEDIAN, SIGMA = 1339, 1.0
"""Tokens in a document: log-normal, as web text is."""
PLACEMENT = {"anchor": "per_document"}
"""Where a pattern has its anchors; others have none."""
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "deepspeed",
    "numpy",
    "liger-kernel",
    "flash-attn",
    "triton",
)


# --- rows -----------------------------------------------------------------------------------------


def document_lengths(row_length: int, *, seed: int) -> np.ndarray:
    """(documents,) int64: one packed row of log-normal documents, the last cut at the row's end."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    left = row_length
    while left:
        lengths.append(min(left, max(2, int(rng.lognormal(np.log(MEDIAN), SIGMA)))))
        left -= lengths[-1]
    return np.array(lengths)


def layout_of(lengths: np.ndarray, *, pattern: str) -> DocumentLayout:
    """One row of these documents; with `anchor`, every document's first token is its anchor."""
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    return make_layout(
        starts,
        batch_size=1,
        row_length=int(lengths.sum()),
        pattern=pattern,
        anchor_placement=PLACEMENT.get(pattern, "none"),
    )


def mask_share(lengths: np.ndarray, *, pattern: str) -> float:
    """The pattern's (query, key) pairs over full causal attention's."""
    placement = PLACEMENT.get(pattern, "none")
    pairs = attended_pairs(lengths, pattern=pattern, anchor_placement=placement)
    return pairs / attended_pairs(lengths, pattern="full", anchor_placement="none")


# --- measuring ------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """What `work` takes, until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_fresh_process(function: Callable, *arguments):
    """`function(*arguments)` in a process of its own; None if it ran out of GPU memory or was killed.

    A process's peak memory is of its whole life, so each peak needs one.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:  # killed
        result = None
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send_result(sender, function: Callable, arguments: tuple) -> None:
    try:
        sender.send(function(*arguments))
    except torch.OutOfMemoryError:
        sender.send(None)
    except Exception as error:
        sender.send(error)


def restart_peak(device: torch.device) -> int:
    """Let the peak memory of this process start anew; returns what is in use now (Linux, or CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes(device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large matrix product, the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: a @ a, device) for _ in range(10))


# --- the report -----------------------------------------------------------------------------------


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)}, {memory / 2**30:.0f} GiB"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Python's and those of the packages that are installed."""
    installed = [name for name in PACKAGES if util.find_spec(name.replace("-", "_"))]
    found = {name: metadata.version(name) for name in installed}
    return {"python": platform.python_version()} | found


def print_table(columns: dict[str, list]) -> None:
    """A column per key, its cells as text, right-aligned."""
    table = [list(columns), *zip(*columns.values(), strict=True)]
    widths = [max(len(str(line[i])) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(str(cell).rjust(width) for cell, width in zip(line, widths, strict=True)))


def print_json(
    benchmark: str, *, device: torch.device, ceiling: dict, results: list[dict], **more
) -> None:
    """The last line."""
    line = {
        "benchmark": benchmark,
        "hardware": hardware(device),
        "versions": versions(),
        "command": shlex.join(["python", *sys.argv]),
        "ceiling": ceiling,
        "results": results,
    }
    print(json.dumps(line | more), flush=True)


def gibibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"
