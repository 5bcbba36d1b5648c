"""Runs of `train.py` for tests: what they leave, and runs that are disturbed: watched, signalled, killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 240


@dataclass(frozen=True)
class Tiny:
    """Files for small runs."""

    model: Path
    """A LLaMA with 4 heads over 2 key/value heads, and its tokenizer with BOS."""
    documents: Path
    """`{"text": …}` lines."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in metrics(output)]


@dataclass
class Run:
    """`train.py` under `anchor_context.launch`, running."""

    output: Path
    launcher: subprocess.Popen
    log: Path

    def printed(self) -> str:
        return self.log.read_text()

    def steps(self) -> int:
        """Optimiser steps in its record."""
        record = self.output / "metrics.jsonl"
        return record.read_bytes().count(b"\n") if record.exists() else 0

    def ranks(self) -> list[psutil.Process]:
        """Its rank processes, in their order."""
        children = psutil.Process(self.launcher.pid).children()
        return sorted(children, key=lambda process: int(process.environ()["RANK"]))

    def until(self, happened: Callable[[], object]) -> None:
        """Wait until it happened. Fails where the run ends before."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not happened():
            assert self.launcher.poll() is None and time.monotonic() < deadline, self.printed()
            time.sleep(0.001)

    def finish(self, expect: int, *, seconds: float = LIMIT_SECONDS) -> str:
        """Wait for the end, and return what it printed."""
        assert self.launcher.wait(seconds) == expect, self.printed()[-6000:]
        return self.printed()

    def kill(self) -> None:
        """SIGKILL to the launcher, the ranks, and their data workers."""
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.launcher.pid)
            for process in [*launcher.children(recursive=True), launcher]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self.launcher.wait()


@contextmanager
def started(
    tiny: Tiny,
    processes: int,
    output: Path,
    *flags: str,
    hooks: Path | None = None,
    **environment: str,
) -> Iterator[Run]:
    """Start a run in float32 on rows of 128 tokens; what is left of it at the end is killed.

    hooks: a folder whose `sitecustomize.py` every process runs first.
    """
    log = output.with_name(output.name + ".log")
    command = [
        *(sys.executable, "-m", "anchor_context.launch"),
        *("--config_file", "accelerate_configs/cpu.yaml", "--num_processes", str(processes)),
        *("--main_process_port", str(free_port()), "train.py"),
        *("--model_name_or_path", str(tiny.model), "--dataset", str(tiny.documents)),
        *("--seq-length", "128", "--learning-rate", "1e-3", "--mixed_precision", "no"),
        *("--output-dir", str(output), "--resume", "auto", *flags),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    if hooks is not None:
        environment["PYTHONPATH"] = f"{hooks}:{ROOT}"
    with log.open("w") as stream:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
    run = Run(output, launcher, log)
    try:
        yield run
    finally:
        run.kill()


def weights(model: Path) -> dict[str, torch.Tensor]:
    """Of a saved model."""
    return load_file(model / "model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)
