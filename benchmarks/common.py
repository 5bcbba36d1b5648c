"""What the benchmarks share: rows of log-normal documents, a fresh process per peak, and the report.

A benchmark prints a table for people and, last, one JSON line for programs: `{"benchmark", "hardware",
"versions", "command", "ceiling", "results"}`, times in seconds (medians), sizes in bytes. With `--keep FILE`
(`Report`) each result is appended to a file besides, the moment it is measured.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from anchor_context.attention.kernels import KERNELS
from anchor_context.attention.patterns import PATTERNS, attended_pairs, make_layout
from anchor_context.layout import DocumentLayout
from anchor_context.run.device import peak_memory_bytes

MEDIAN, SIGMA = 1339, 1.0
"""Tokens in a document: log-normal, as web text is."""
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "deepspeed",
    "numpy",
    "yunchang",
    "liger-kernel",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "triton",
)


# --- rows -----------------------------------------------------------------------------------------


def document_lengths(row_length: int, *, seed: int, longest: int | None = None) -> np.ndarray:
    """(documents,) int64: one packed row of log-normal documents, the last cut at the row's end.

    Args:
        longest: tokens at which documents are cut, if at all.
    """
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    left = row_length
    while left:
        drawn = max(2, int(rng.lognormal(np.log(MEDIAN), SIGMA)))
        lengths.append(min(left, drawn, longest or left))
        left -= lengths[-1]
    return np.array(lengths)


def layout_of(lengths: np.ndarray, *, pattern: str) -> DocumentLayout:
    """One row of these documents; with anchors, every document's first token is its anchor."""
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    return make_layout(
        starts,
        batch_size=1,
        row_length=int(lengths.sum()),
        pattern=pattern,
        anchor_placement=PATTERNS[pattern].placement("per_document"),
    )


def pairs_of(lengths: np.ndarray, *, pattern: str) -> int:
    """The (query, key) pairs that the pattern attends to in one row; the plain loop's are its documents'."""
    pattern = {"plain_hf": "intra_doc"}.get(pattern, pattern)
    placement = PATTERNS[pattern].placement("per_document")
    return attended_pairs(lengths, pattern=pattern, anchor_placement=placement)


def mask_share(lengths: np.ndarray, *, pattern: str) -> float:
    """The pattern's pairs over full causal attention's."""
    return pairs_of(lengths, pattern=pattern) / pairs_of(lengths, pattern="full")


# --- measuring ------------------------------------------------------------------------------------


def kernels_here(device: torch.device, dtype: torch.dtype, *, head_dim: int) -> list[str]:
    """The flash engine's kernels that run here, the fastest first; prints why the others do not."""
    found = []
    for name, kernel in KERNELS.items():
        reason = kernel.unavailable(device, dtype, head_dim)
        if reason is None:
            found.append(name)
        else:
            print(f"{name} is left out: {reason}", flush=True)
    return found


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


def most_held(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by `work` held at once on the CPU, in all threads.

    PyTorch's allocator reports each piece that it hands out or takes back to the profiler; what was there
    before does not count.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    pieces, events = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            pieces.append(
                (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
            )
    sizes: dict[int, int] = {}
    held = most = 0
    for _, address, size in sorted(pieces):
        if size > 0:
            sizes[address] = size
            held += size
        else:
            held -= sizes.pop(address, 0)
        most = max(most, held)
    return most


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large matrix product, the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: a @ a, device) for _ in range(10))


# --- the report -----------------------------------------------------------------------------------


class Report:
    """The results of one benchmark: each is printed, and kept in a file, the moment it is measured.

    A GPU may be there for minutes only: what was measured before a process is stopped must not be lost. The
    file has one JSON line per result, complete by itself; `collect.py` puts them into the table.
    """

    def __init__(
        self, benchmark: str, *, case: tuple[str, ...], device: torch.device, keep: Path | None
    ):
        """
        Args:
            case: the keys of a result that say what was measured. A later result of the same case, from more
                repeats or another day, takes the place of an earlier one.
            keep: the file to append to; None only prints.
        """
        self.benchmark, self.case, self.device, self.keep = benchmark, case, device, keep
        self._results: dict[tuple, dict] = {}

    @property
    def results(self) -> list[dict]:
        return list(self._results.values())

    def add(self, result: dict) -> None:
        """A result, its case and what was measured in one flat dictionary."""
        self._results[tuple(result[key] for key in self.case)] = result
        figures = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in result.items()}
        told = ", ".join(f"{key} {value}" for key, value in figures.items() if value is not None)
        print(f"{self.benchmark}: {told}", flush=True)
        if self.keep is not None:
            line = heading(self.benchmark, self.device) | {"case": self.case, "result": result}
            with self.keep.open("a") as stream:
                stream.write(json.dumps(line) + "\n")

    def end(self, *, ceiling: dict) -> None:
        """Print the last line."""
        print_json(self.benchmark, device=self.device, ceiling=ceiling, results=self.results)


def heading(benchmark: str, device: torch.device) -> dict:
    """What a result needs beside it to mean something."""
    return {
        "benchmark": benchmark,
        "hardware": hardware(device),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git_commit(),
        "versions": versions(),
        "command": command(),
    }


def git_commit() -> str | None:
    """Of this checkout; None without git or outside a checkout."""
    if shutil.which("git") is None:
        return None
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return asked.stdout.strip() or None


def command() -> str:
    """What was typed to start this process, without the file that keeps the results."""
    words = ["python", *sys.argv]
    if "--keep" in words:
        at = words.index("--keep")
        del words[at : at + 2]
    return shlex.join(words)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)}, {memory / 2**30:.0f} GiB"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {os.cpu_count()} cores, {threads} thread{'s' * (threads != 1)}"


def versions() -> dict[str, str]:
    """Python's and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


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
    line = heading(benchmark, device) | {"ceiling": ceiling, "results": results}
    print(json.dumps(line | more), flush=True)


def gibibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"
