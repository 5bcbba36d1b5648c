"""The benchmarks' way to the GPU table: `gpu.sh` runs the parts, `collect.py` keeps what they measured."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULT = '{"benchmark": "NAME", "hardware": "Some GPU, 80 GB", "results": []}'
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
-c*) ;;
*pytest*) echo "2 passed in 1 s"; echo "a late note" >&2 ;;
*collect.py*) cp -r "$2" "$KEPT" ;;
*/attention.py*) echo a table; echo '{RESULT.replace("NAME", "attention")}'; echo "a late warning" >&2 ;;
*/memory.py*) echo a table; exit 1 ;;
*/packing.py*) echo "no JSON" ;;
*) echo '{RESULT.replace("NAME", "train_step")}' ;;
esac
"""


@pytest.fixture
def kept(tmp_path) -> Path:
    """What `gpu.sh` hands to `collect.py` where a part warns late, one fails, one prints no result."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": str(python), "KEPT": str(tmp_path / "kept")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "memory did not finish" in run.stdout
    return tmp_path / "kept"


def test_a_bad_part_is_left_out_and_the_others_are_kept(kept, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import collect

    monkeypatch.setattr(collect, "RESULTS", tmp_path)
    collect.save(kept)
    record = json.loads((tmp_path / "some-gpu.json").read_text())
    assert {line["benchmark"] for line in record["benchmarks"]} == {"attention", "train_step"}
    assert record["tests"] == "2 passed in 1 s"
    assert "packing is left out" in capsys.readouterr().err


def test_tests_that_were_ended_have_no_result(tmp_path, monkeypatch):
    """The last line of pytest is then a row of dots."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import collect

    monkeypatch.setattr(collect, "RESULTS", tmp_path)
    found = tmp_path / "found"
    found.mkdir()
    (found / "attention.json").write_text(RESULT.replace("NAME", "attention"))
    (found / "tests.log").write_text("......s..")
    collect.save(found)
    assert json.loads((tmp_path / "some-gpu.json").read_text())["tests"] == "did not finish"
