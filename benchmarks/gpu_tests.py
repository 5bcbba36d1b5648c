"""tests/gpu in parallel processes, counted: what `gpu.sh tests` runs.

    python benchmarks/gpu_tests.py                       # all but the large ones
    python benchmarks/gpu_tests.py --large               # those alone, one after the other

With pytest-xdist in so many processes as asked for, without it in one per file. Tests that have no time left
count as unfinished.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTCOME = re.compile(r"(?:^|\s)(PASSED|FAILED|SKIPPED|ERROR)\b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count()))
    parser.add_argument("--at_most_seconds", type=float, default=600)
    parser.add_argument("--keep", type=Path, help="append the result to this file")
    flags = parser.parse_args()

    started = time.monotonic()
    selection = "large" if flags.large else "not large"
    jobs = [
        Job(words) for words in commands(selection, processes=1 if flags.large else flags.processes)
    ]
    # Imports torch, which takes a while, while the tests run.
    from common import Report, torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report("tests", case=("selection",), device=device, keep=flags.keep)
    for job in jobs:
        job.wait(flags.at_most_seconds - (time.monotonic() - started))
    counts = sum((job.counts for job in jobs), Counter())
    report.add(
        {
            "selection": selection,
            **{word: counts[word.upper()] for word in ("passed", "failed", "skipped", "error")},
            "finished": all(job.finished for job in jobs),
            "seconds": time.monotonic() - started,
            "failures": sorted(name for job in jobs for name in job.failures),
        }
    )
    report.end(ceiling={})


def commands(selection: str, *, processes: int) -> list[list[str]]:
    """Of pytest: one with workers, or one for each file."""
    pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", selection]
    if processes == 1:
        return [[*pytest, "tests/gpu"]]
    if importlib.util.find_spec("xdist") is not None:
        return [[*pytest, "-n", str(processes), "tests/gpu"]]
    return [[*pytest, str(file)] for file in sorted((ROOT / "tests/gpu").glob("test_*.py"))]


class Job:
    """One pytest, read line by line as it runs."""

    def __init__(self, command: list[str]):
        self.counts: Counter[str] = Counter()
        self.failures: set[str] = set()
        self.finished = False
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        told = False  # the details behind the list of tests
        for line in self.process.stdout:
            told |= line.startswith("====") and bool(self.counts)
            outcome = OUTCOME.search(line)
            name = re.search(r"tests/gpu/\S+::.*?(?= PASSED| FAILED| SKIPPED| ERROR|$)", line)
            if outcome and name and not told:
                self.counts[outcome[1]] += 1
                if outcome[1] in ("FAILED", "ERROR"):
                    self.failures.add(name[0].strip())
            if told or "FAILED" in line or "ERROR" in line:
                print(line, end="", flush=True)

    def wait(self, seconds: float) -> None:
        """Until it ends, or its time is over, which ends it with its workers."""
        try:
            self.process.wait(max(0.0, seconds))
            self.finished = True
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.reader.join()


if __name__ == "__main__":
    main()
