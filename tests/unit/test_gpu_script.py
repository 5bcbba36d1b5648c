"""The benchmarks' way to the GPU tables: `gpu.sh` runs the parts, `collect.py` keeps what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = {
    "benchmark": "attention",
    "hardware": "Some GPU, 80 GiB",
    "date": "2026-11-01",
    "commit": "abc1234",
    "versions": {"torch": "2.11.0"},
    "command": "python benchmarks/attention.py",
}


def kept(
    benchmark: str = "attention", *, kernel: str = "flash_attn", forward_s: float = 1.0, **more
):
    """A line as `Report` writes it."""
    result = {"kernel": kernel, "forward_s": forward_s}
    return LINE | {"benchmark": benchmark, "case": ["kernel"], "result": result} | more


WHOLE = LINE | {"benchmark": "memory", "results": [], "exponent": 1}
"""As `print_json` writes it."""
FAKE_PYTHON = f"""#!/usr/bin/env bash
kept="${{@: -1}}" # the file behind --keep is the last word
case "$*" in
-c*) ;;
*collect.py*) exec {sys.executable} "$@" ;;
*attention.py*) echo "$*"; echo '{json.dumps(kept())}' >>"$kept"; echo '{{"begun' >>"$kept"; exit 1 ;;
*train_step.py*) echo '{json.dumps(kept("train_step"))}' >>"$kept"; exec sleep 60 ;;
*memory.py*) echo a table; echo '{json.dumps(WHOLE)}' ;;
*paper.py*) echo a table; echo "no JSON" ;;
esac
"""


def gpu_sh(tmp_path: Path, *arguments: str, expect: int = 0) -> str:
    """What it prints where every Python but the collector's is a stand-in."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--results", str(tmp_path / "results"), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == expect, run.stdout + run.stderr
    return run.stdout + run.stderr


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "some-gpu.json").read_text())["results"]


def test_what_a_part_measured_is_kept_whatever_becomes_of_it(tmp_path):
    """One fails after a result and begins another, one is ended at its limit, one prints no result."""
    printed = gpu_sh(tmp_path, "--seconds", "2", "attention", "step", "memory", "paper")
    assert "attention.py did not finish (exit 1)" in printed
    assert "train_step.py did not finish (exit 124)" in printed and "(at most 2 s)" in printed
    assert "is left out: it is no result" in printed
    found = results(tmp_path / "results")
    assert [line["benchmark"] for line in found] == ["attention", "train_step", "memory"]
    assert found[2]["result"] == {"results": [], "exponent": 1}
    assert not (tmp_path / "results/kept.jsonl").exists()


def test_parts_run_alone_and_add_up_over_calls(tmp_path):
    gpu_sh(tmp_path, "memory")
    printed = gpu_sh(tmp_path, "attention")
    assert "memory" not in printed
    assert [r["benchmark"] for r in results(tmp_path / "results")] == ["memory", "attention"]
    assert "no part is called atention" in gpu_sh(tmp_path, "atention", expect=2)


def test_a_call_that_was_ended_leaves_its_results_to_the_next(tmp_path):
    left = tmp_path / "results/kept.jsonl"
    left.parent.mkdir()
    left.write_text(json.dumps(kept("longest")) + "\n")
    gpu_sh(tmp_path, "attention")
    assert {r["benchmark"] for r in results(left.parent)} == {"longest", "attention"}


def test_every_part_has_a_limit_and_a_size_for_tests(tmp_path):
    printed = gpu_sh(tmp_path, "--tiny", "--seconds", "40", "attention", "flex")
    assert "== attention.py --row_lengths 256 --repeats 1 (at most 40 s)" in printed
    assert "--engines flex --row_lengths 256 --repeats 1 --at_most_seconds 25" in printed


@pytest.fixture
def collect(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import collect

    return collect


def test_a_newer_result_replaces_that_of_its_case_alone(tmp_path, collect):
    collect.save([kept(), kept(kernel="torch_varlen")], tmp_path)
    collect.save([kept(forward_s=0.5, date="2026-11-02")], tmp_path)
    collect.save([kept("train_step", hardware="Some GPU, 79 GiB")], tmp_path)
    found = [(r["benchmark"], r["result"]["kernel"], r["date"]) for r in results(tmp_path)]
    assert found == [
        ("attention", "flash_attn", "2026-11-02"),
        ("attention", "torch_varlen", "2026-11-01"),
        ("train_step", "flash_attn", "2026-11-01"),
    ]
    assert results(tmp_path)[0]["result"]["forward_s"] == 0.5


def test_a_copy_without_git_can_be_told_its_commit(tmp_path, collect, monkeypatch):
    file = tmp_path / "kept.jsonl"
    lines = [kept(commit=None), kept(kernel="torch_varlen")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["collect.py", str(file), "--results", str(tmp_path), "--commit", "def5678"]
    monkeypatch.setattr(sys, "argv", arguments)
    collect.main()
    assert [line["commit"] for line in results(tmp_path)] == ["def5678", "abc1234"]
    # What another machine collected can be collected here.
    there, here = tmp_path / "some-gpu.json", tmp_path / "here"
    monkeypatch.setattr(sys, "argv", ["collect.py", str(there), "--results", str(here)])
    collect.main()
    assert results(here) == results(tmp_path)


def test_the_tables_are_the_files(collect, tmp_path):
    """README.md shows what the files beside it hold, with date, commit, versions and command."""
    assert collect.tables(tmp_path) == "Any GPU: not yet measured."
    readme = (collect.RESULTS / "README.md").read_text()
    assert collect.tables(collect.RESULTS) in readme
    for words in (
        "| 32/8 × 128 | 131,072 | `anchor` | 0.0299 | `flash_attn_4` | 7.8 (540) | 22.4 (470) | [1] |",
        "`train.py` itself",
        "* [2] 2026-11-26, commit 9003dd4: by hand",
        "torch 2.11.0+cu130",
    ):
        assert words in readme, words


@pytest.mark.slow
def test_every_part_runs_to_its_end_without_a_gpu(tmp_path):
    """At its tiniest, train.py and the GPU tests (which are skipped) too, and the tables are made of it."""
    (tmp_path / "README.md").write_text(
        "<!-- measured on GPUs: written by benchmarks/collect.py --><!-- end -->"
    )
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--tiny", "--results", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "did not finish" not in run.stdout, run.stdout + run.stderr
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    found = {line["benchmark"]: line["result"] for line in record["results"]}
    assert found.keys() == {"attention", "train_step", "train_run", "longest", "tests"}
    assert found["train_run"]["steps"] == 1 and found["train_run"]["zero_stage"] == 1
    assert found["longest"]["document_tokens"] > 256
    assert found["tests"]["skipped"] > 20 and found["tests"]["finished"]
    tables = (tmp_path / "README.md").read_text()
    assert "not yet measured" not in tables and "`torch_cpu`" in tables
