"""Each benchmark as a command, at its tiniest: it ends in the JSON line that programs read.

Nothing timed is asserted. `paper.py` has a module of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LINE = {"benchmark", "hardware", "versions", "command", "ceiling", "results"}
RING = (
    "layout ranks row_length median sigma imbalance sent_bytes plain_ring_bytes minimum_bytes "
    "plan_s step_s"
)
ATTENTION = "engine kernel pattern row_length documents mask_share forward_s backward_s peak_bytes"

STEP = "variant row_length step_s tokens_per_second peak_bytes"


def run(command: str, folder: Path) -> dict:
    """The last line of what a benchmark prints."""
    script, *flags = command.split()
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *flags],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert len(table) > 1, "no table for people"
    return json.loads(last)


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("sequence_parallel.py --rows 1 --steps 0", RING),
        ("packing.py --megabytes 1 --row_length 1024", "stage tokens_per_second tokens_kept"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("sequence_parallel.py --rows 1 --steps 1 --step_row_length 256", RING),
                ("attention.py --row_lengths 256 --repeats 1", ATTENTION),
                ("train_step.py --row_length 256 --repeats 1", STEP),
                (
                    "memory.py --variants anchor --at_most_seconds 0",
                    "variant row_length peak_bytes",
                ),
            )
        ),
    ],
)
def test_the_last_line_is_json_with_the_agreed_keys(tmp_path, command, keys):
    line = run(command, tmp_path)
    assert line.keys() >= LINE
    assert line["benchmark"] == command.split(".py")[0] and line["command"].endswith(command)
    assert line["results"]
    for result in line["results"]:
        assert result.keys() >= set(keys.split())
    if line["benchmark"] == "memory":
        assert line["exponent"]["anchor"] > 0
    assert not list(tmp_path.iterdir()), "a benchmark leaves files where it is started"
