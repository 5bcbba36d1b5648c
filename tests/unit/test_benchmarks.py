"""Each benchmark as a command, at its tiniest: it ends in the JSON line that programs read.

Nothing timed is asserted. `paper.py` has a module of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from anchor_context.run.metrics import read_metrics

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LINE = {"benchmark", "hardware", "date", "commit", "versions", "command", "ceiling", "results"}
RING = (
    "layout ranks row_length median sigma imbalance sent_bytes plain_ring_bytes minimum_bytes "
    "plan_s step_s"
)
ATTENTION = (
    "engine kernel pattern row_length heads head_dim documents mask_share forward_s backward_s "
    "forward_flops_per_second backward_flops_per_second matmul_flops_per_second peak_bytes"
)
STEP = "variant plan kernel row_length step_s tokens_per_second mfu peak_bytes"


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
                ("attention.py --row_lengths 256 --repeats 1 --engines flash flex", ATTENTION),
                ("train_step.py --row_length 256 --repeats 1", STEP),
                (
                    "memory.py --variants anchor --at_most_seconds 0 --parts growth longest",
                    "variant row_length peak_bytes",
                ),
                (
                    "memory.py --parts micro_batches --row_length 8192 --repeats 1",
                    "variant row_length peak_bytes seconds_per_token",
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
    if "growth" in command:
        assert line["exponent"]["anchor"] > 0
    assert not list(tmp_path.iterdir()), "a benchmark leaves files where it is started"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.mark.parametrize("pattern", ["anchor", "full"])
def test_a_step_in_micro_batches_is_the_whole_row_s(benchmarks, monkeypatch, pattern):
    """The same loss, and the same weights after it; a document longer than a micro-batch is one by itself."""
    import steps

    micro = steps.Plan(steps.Treatment(), micro_batch_tokens=64)
    monkeypatch.setitem(steps.PLANS, "micro_batches", micro)
    lengths = np.array([30, 20, 100, 1, 40, 9])
    assert [piece.tolist() for piece in steps.cut(lengths, at_most=64)] == [
        [30, 20],
        [100],
        [1, 40, 9],
    ]
    losses, weights = [], []
    for plan in ("whole", "micro_batches", "checkpointed"):
        step = steps.Step(plan, steps.TINY, row_length=200, **CPU)
        step.optimizer = torch.optim.SGD(step.model.parameters(), lr=1.0)
        losses.append(step(lengths, pattern).item())
        weights.append(torch.cat([p.detach().flatten() for p in step.model.parameters()]))
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-6)
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-5, atol=1e-6)


def test_the_longest_document_is_sought_in_the_time_there_is(benchmarks):
    from longest import next_length

    best = {"document_tokens": 1000, "step_s": 1.0}
    settings = {"grain": 100, "at_most": 10_000}
    # 0.9 of 100 s are 90 times the work, 9.49 times the tokens.
    assert next_length(best, None, 100.0, **settings) == 9400
    assert next_length(best, None, 1000.0, **settings) == 10_000
    assert next_length(best, 4000, 100.0, **settings) == 2500  # half of the way to what did not fit
    assert next_length(best, 1200, 100.0, **settings) == 0
    assert next_length(best, None, 1.2, **settings) == 0
    assert next_length(best, None, -5.0, **settings) == 0
    assert next_length(None, 1000, 100.0, **settings) == 0


def test_a_document_that_does_not_fit_is_tried_with_leaner_plans(benchmarks, monkeypatch):
    import longest

    tried = []

    def train(self, tokens: int) -> dict:
        tried.append((self.plans[0], tokens))
        if tokens > {"checkpointed": 100, "tiled": 200, "offloaded": 300}[self.plans[0]]:
            raise torch.OutOfMemoryError
        return {"document_tokens": tokens}

    monkeypatch.setattr(longest.Trainer, "_train", train)
    trainer = longest.Trainer(None, **CPU, kernel="torch_cpu")
    fitted = [trainer.train(tokens) is not None for tokens in (100, 250, 400, 300)]
    assert fitted == [True, True, False, True]
    assert tried == [
        ("checkpointed", 100),
        ("checkpointed", 250),
        ("tiled", 250),
        ("offloaded", 250),
        ("offloaded", 400),
        ("offloaded", 300),
    ]


FAKE_RUN = """
import json, os, subprocess, sys, time
subprocess.Popen(["sleep", "60"])
os.mkdir(sys.argv[1])
plan = {"peak": {"moment": "the loss", "parts": {"weights": 3, "logits": 4}}}
json.dump({"kernel": "k", "memory": plan}, open(sys.argv[1] + "/args.json", "w"))
with open(sys.argv[1] + "/metrics.jsonl", "w") as metrics:
    for step, seconds in enumerate((9, 5, 1, 2, 6)):
        record = {"step_seconds": seconds, "tokens_per_second": 60 / seconds, "loss": 3.0, "mfu": None}
        record |= {"step": step + 1, "peak_memory_bytes": 10 - step}
        metrics.write(json.dumps(record) + "\\n")
time.sleep(60)
"""


def test_a_run_that_has_its_time_is_ended_and_what_it_recorded_counts(benchmarks, tmp_path, capsys):
    """After every step a result; the first two, in which it warms up, only until there are others."""
    import train_run

    run = train_run.Run(tmp_path, row_length=60, zero_stage=2)
    run.log.write_text("what train.py said")
    run.started = time.monotonic()
    run.process = subprocess.Popen(
        [sys.executable, "-c", FAKE_RUN, str(run.output)], start_new_session=True
    )
    *_, last = run.results(steps=20, at_most_seconds=5)
    records = read_metrics(run.output / "metrics.jsonl")
    so_far = [run._result(records[: step + 1], start_s=None) for step in range(5)]
    assert [r["steps"] for r in so_far] == [1, 1, 1, 2, 3]
    assert [r["step_s"] for r in so_far] == [9, 5, 1, 1.5, 2]
    assert last["peak_bytes"] == 10 and last["tokens_per_second"] == 30
    assert last["planned_peak_bytes"] == 7 and last["zero_stage"] == 2
    assert train_run.planned_peak({"liger": False}) is None
    printed = capsys.readouterr().out
    assert "5 of 20 steps, then its time was over" in printed and "what train.py said" in printed
    assert not run.failed
    with pytest.raises(ProcessLookupError):  # nor is a process left that the run started
        for _ in range(100):
            os.killpg(run.process.pid, 0)
            time.sleep(0.05)


def test_a_first_step_alone_is_no_result(benchmarks, tmp_path, capsys):
    """It compiles and asks for memory, and would take the place of what a longer run measured."""
    import train_run

    run = train_run.Run(tmp_path, row_length=60, zero_stage=1)
    run.log.write_text("what train.py said")
    run.started = time.monotonic()
    one_step = FAKE_RUN.replace("(9, 5, 1, 2, 6)", "(9,)").replace("sleep(60)", "sleep(0)")
    run.process = subprocess.Popen([sys.executable, "-c", one_step, str(run.output)])
    assert list(run.results(steps=1, at_most_seconds=60)) == []
    assert len(read_metrics(run.output / "metrics.jsonl")) == 1


def test_no_step_is_begun_that_would_end_too_late(benchmarks, monkeypatch):
    """Going by the slowest with the same pattern; what was measured before stays."""
    import train_step

    clock, ran = [0.0], []
    takes = {
        ("fast", "anchor"): 1,
        ("slow", "anchor"): 2,
        ("fast", "full"): 10,
        ("slow", "full"): 20,
    }

    class Step:
        plain, told, model = False, "a plan", None

        def __init__(self, plan, shape, **how):
            pass

        def use_kernel(self, name: str) -> None:
            self.kernel = name

        def __call__(self, row, pattern: str) -> None:
            if row.sum() == 4096:
                ran.append((self.kernel, pattern))
                clock[0] += takes[ran[-1]]

    def seconds(work, device) -> float:
        before = clock[0]
        work()
        return clock[0] - before

    work = train_step.ModelWork(matmul_parameters=1, attention_width=1)
    monkeypatch.setattr(train_step, "Step", Step)
    monkeypatch.setattr(train_step, "seconds", seconds)
    monkeypatch.setattr(train_step.ModelWork, "of", lambda model: work)
    monkeypatch.setattr(train_step, "in_fresh_process", lambda *arguments: 1)
    monkeypatch.setattr(train_step.time, "monotonic", lambda: clock[0])
    how = ["auto", None, *CPU.values(), ["anchor", "full"], ["fast", "slow"]]
    rows = [np.array([4096])] * 2
    *_, last = train_step.measure(*how, rows, deadline=15.0)
    # full takes 10 with the fast kernel, and after 13 no 10 are left for the slow one.
    assert ran == [("fast", "anchor"), ("fast", "full"), ("slow", "anchor"), ("fast", "anchor")]
    assert (last["kernel"], last["variant"], last["step_s"]) == ("fast", "anchor", 1)


def test_a_table_of_attention_may_lack_full(benchmarks, capsys):
    import attention

    row = dict.fromkeys(ATTENTION.split(), 1.0) | {"engine": "flash", "kernel": "k", "kv_heads": 1}
    row |= {"row_length": 100, "pattern": "anchor"}
    attention.show([row])
    line = capsys.readouterr().out.splitlines()[1]
    assert "1.000" in line and "  -  " in line


def test_gpu_tests_are_counted_as_pytest_tells_them(benchmarks):
    """With workers and without; the details behind the list are no tests."""
    from gpu_tests import Job

    told = """\
[gw0] [ 25%] PASSED tests/gpu/test_a.py::test_one[x-y z]
[gw1] [ 50%] FAILED tests/gpu/test_a.py::test_two
tests/gpu/test_a.py::test_three SKIPPED (needs a GPU) [ 75%]
tests/gpu/test_a.py::test_four PASSED [100%]
=================================== FAILURES ===================================
FAILED tests/gpu/test_a.py::test_two - assert 1 == 2
"""
    job = Job([sys.executable, "-c", f"print({told!r}, end='')"])
    job.wait(60)
    assert job.finished
    assert job.counts == {"PASSED": 2, "FAILED": 1, "SKIPPED": 1}
    assert job.failures == {"tests/gpu/test_a.py::test_two"}
    late = Job([sys.executable, "-c", f"import time; print({told!r}, flush=True); time.sleep(60)"])
    late.wait(3)
    assert not late.finished and late.counts["PASSED"] == 2
