"""`bash demo_llama.sh` as a user types it: it trains, says later what it found, and goes on if asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, metrics

pytestmark = pytest.mark.slow


def start(output: Path, *flags: str, steps: int = 2) -> subprocess.Popen:
    """Start it in the tests' environment."""
    environment = os.environ | {
        "OUTPUT": str(output),
        "MAX_STEPS": str(steps),
        "SEQ_LENGTH": "256",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        ["bash", "demo_llama.sh", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def demo(output: Path, *flags: str, steps: int = 2, expect: int = 0) -> str:
    """Run it and return what it printed."""
    process = start(output, *flags, steps=steps)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == expect, printed[-6000:]
    return printed


def test_the_demo_trains_keeps_its_run_and_continues_it_when_asked(tmp_path):
    output = tmp_path / "demo"
    first = demo(output)
    assert "Ulysses 2" in first and "all kept" in first
    assert first.count("run      ") == 1 and "WARNING" not in first
    assert f"model    {output / 'step-2'}" in first

    second = demo(output)
    assert "nothing was resumed and nothing overwritten" in second
    assert "--resume auto" in second and "in 2 steps" in second
    refused = demo(output, "--attention_pattern", "full", expect=2)
    assert "error: these flags were not used: --attention_pattern full" in refused
    assert len(metrics(output)) == 2

    third = demo(output, "--resume", "auto", steps=4)
    assert "2 steps, 2 rows done" in third and f"model    {output / 'step-4'}" in third
    assert [record["step"] for record in metrics(output)] == [1, 2, 3, 4]


def test_a_signal_to_the_demo_is_one_to_the_run(tmp_path):
    """A scheduler knows the shell's process alone."""
    output = tmp_path / "demo"
    process = start(output, "--checkpoint_every", "1", steps=1000)
    for _line in process.stdout:
        if (output / "metrics.jsonl").exists() and metrics(output):
            break
    process.terminate()
    process.communicate(timeout=300)
    assert process.returncode == 75
    assert any(output.glob("checkpoints/checkpoint_*"))
