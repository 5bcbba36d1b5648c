"""`bash demo_llama.sh` as a user types it: it trains, says later what it found, and goes on if asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, metrics

pytestmark = pytest.mark.slow


def demo(output: Path, *flags: str, steps: int = 2) -> str:
    """Run it in the tests' environment and return what it printed."""
    environment = os.environ | {
        "OUTPUT": str(output),
        "MAX_STEPS": str(steps),
        "SEQ_LENGTH": "256",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    finished = subprocess.run(
        ["bash", "demo_llama.sh", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout[-6000:]
    return finished.stdout


def test_the_demo_trains_keeps_its_run_and_continues_it_when_asked(tmp_path):
    output = tmp_path / "demo"
    first = demo(output)
    assert "Ulysses 2" in first and "all kept" in first
    assert f"model    {output / 'step-2'}" in first

    second = demo(output)
    assert "nothing was resumed and nothing overwritten" in second
    assert "--resume auto" in second and "in 2 steps" in second
    assert len(metrics(output)) == 2

    third = demo(output, "--resume", "auto", steps=4)
    assert "2 steps, 2 rows done" in third and f"model    {output / 'step-4'}" in third
    assert [record["step"] for record in metrics(output)] == [1, 2, 3, 4]
