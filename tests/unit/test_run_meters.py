"""A step's line in `metrics.jsonl` and the progress bar: figures are what their names say."""

from __future__ import annotations

import json
import math
from datetime import datetime

import pytest
import torch

from anchor_context.run import metrics
from anchor_context.run.metrics import (
    StepLog,
    describe_step,
    finish_record,
    read_metrics,
    time_of_end,
)
from anchor_context.run.work import ModelWork

WORK = ModelWork(matmul_parameters=1_000, attention_width=64)
TOKENS, PAIRS, FULL_PAIRS = 50, 268, 1_275
PEAK, SECONDS = 1e6, 2.0


def record(*, loss: float = 100.0, norm: float = 0.5, peak: float | None = PEAK) -> dict:
    entry = {
        "step": 3,
        "learning_rate": 1e-4,
        "grad_norm": torch.tensor(norm),
        "target_tokens": 40,
        "tokens": TOKENS,
        "pairs": PAIRS,
    }
    return finish_record(
        entry,
        loss=loss,
        step_seconds=SECONDS,
        data_wait_share=0.25,
        work=WORK,
        full_pairs=FULL_PAIRS,
        peak=peak,
        device=torch.device("cpu"),
    )


def test_a_record_holds_the_step_s_figures():
    got = record()
    assert got["mfu"] == pytest.approx((6 * 1_000 * TOKENS + 12 * 64 * PAIRS) / (PEAK * SECONDS))
    assert got["mfu_if_full_causal"] == pytest.approx(
        (6 * 1_000 * TOKENS + 12 * 64 * FULL_PAIRS) / (PEAK * SECONDS)
    )
    assert got["loss"] == 100.0 / 40  # per target, while the rate counts every token
    assert got["tokens_per_second"] == TOKENS / SECONDS
    assert (got["step"], got["grad_norm"], got["target_tokens"]) == (3, 0.5, 40)
    assert (got["step_seconds"], got["data_wait_share"]) == (SECONDS, 0.25)
    assert got["peak_memory_bytes"] > 2**20
    assert not {"tokens", "pairs"} & got.keys()
    assert json.loads(json.dumps(got)) == got


def test_what_is_not_known_or_not_finite_is_null():
    got = record(loss=math.nan, norm=math.inf, peak=None)
    for name in ("loss", "grad_norm", "mfu", "mfu_if_full_causal"):
        assert got[name] is None
    assert got["tokens_per_second"] == TOKENS / SECONDS


def test_the_progress_bar_shows_the_record():
    line = describe_step(record() | {"peak_memory_bytes": 3 * 2**29})
    assert line == ("loss 2.5000, lr 1.00e-04, 25 tokens/s, MFU 25.3%, 1.5 GiB, data wait 25%")
    line = describe_step(record(loss=math.inf, peak=None))
    assert line.startswith("loss not finite,") and "MFU" not in line


# --------------------------------------------------------------------------------------------------
# The log of the steps.


class OneRank:
    """As much of an accelerator as the log looks at."""

    device, num_processes = torch.device("cpu"), 1
    is_local_main_process = True

    def __init__(self, *, is_main_process: bool = True):
        self.is_main_process = is_main_process
        self.reduced, self.tracked = [], []

    def reduce(self, losses: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum" and losses.dtype == torch.float64
        self.reduced.append(len(losses))
        return losses * 2  # another rank has as much

    def log(self, numbers: dict, step: int) -> None:
        self.tracked.append((step, numbers))


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` lets time go by, which otherwise stands still."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def make_log(accelerator, output, *, done: int = 0, logging_steps: int = 1) -> StepLog:
    return StepLog(
        accelerator,
        output,
        work=WORK,
        full_pairs=FULL_PAIRS,
        first_step=done,
        last_step=9,
        logging_steps=logging_steps,
    )


def note(log: StepLog, step: int) -> None:
    log.step(
        step=step,
        loss=torch.tensor(10.0 * step, dtype=torch.float64),
        learning_rate=1e-4,
        grad_norm=torch.tensor(0.5),
        target_tokens=40,
        tokens_seen=TOKENS * step,
        tokens=TOKENS,
        pairs=PAIRS,
        comm_bytes={"ring": 7},
        ring_imbalance=None,
    )


def test_steps_are_logged_together_at_the_interval(tmp_path, clock):
    ranks = OneRank()
    log = make_log(ranks, tmp_path, logging_steps=3)
    for step in range(1, 6):
        clock(step)
        note(log, step)
        assert ranks.reduced == [3] * (step >= 3), "nothing else may wait for the device"
    log.close()
    assert ranks.reduced == [3, 2]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["loss"] for record in records] == [20.0 * n / 40 for n in range(1, 6)]
    assert [record["step_seconds"] for record in records] == [2.0, 2.0, 2.0, 4.5, 4.5]
    assert [step for step, _ in ranks.tracked] == [1, 2, 3, 4, 5]
    assert ranks.tracked[0][1].keys() == records[0].keys() - {
        *("comm_bytes", "ring_imbalance", "mfu", "mfu_if_full_causal"),
    }, "trackers take numbers"
    assert list(records[0])[:8] == [
        *("step", "loss", "learning_rate", "grad_norm", "target_tokens", "tokens_seen"),
        *("comm_bytes", "ring_imbalance"),
    ]


def test_what_a_pause_holds_is_no_steps_time(tmp_path, clock):
    log = make_log(OneRank(), tmp_path, logging_steps=3)
    clock(4)
    note(log, 1)
    with log.pause():
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1, "logged before"
        clock(1000)
    clock(2)
    note(log, 2)
    with log.pause():
        clock(1000)
    with log.pause():
        clock(1000)
    log.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step_seconds"] for record in records] == [4.0, 2.0]


def test_the_bar_says_when_the_run_will_end(tmp_path, clock, monkeypatch):
    """At the pace since the first step was logged, checkpoints included; that step itself compiles."""
    monkeypatch.setattr(metrics, "time_of_end", lambda now, seconds: f"in {seconds:.0f} s")
    log, said = make_log(OneRank(), tmp_path, done=2), []
    clock(1000)
    for step in range(3, 10):
        note(log, step)
        said.append(log.bar.postfix.split(", ")[0])
        with log.pause():
            clock(2)
        clock(1)
    assert said == [
        "loss 1.5000",
        *(f"ends in {3 * left} s" for left in range(5, 0, -1)),
        "loss 4.5000",
    ]


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(60, "23:01"), (3600, "Sat 00:00"), (6 * 86400, "Thu 23:00"), (7 * 86400, "Dec 4 23:00")],
)
def test_the_end_is_a_time_of_day_and_a_day_if_it_is_another(seconds, says):
    friday = datetime(2026, 11, 27, 23, 0)
    assert time_of_end(friday, seconds) == says


def test_waiting_for_data_is_a_share_of_the_steps_time(tmp_path, clock):
    log = make_log(OneRank(), tmp_path)

    def loader():
        for number in range(3):
            clock(1)
            yield {"number": number}

    numbers = []
    for step, batch in enumerate(log.timed(loader()), start=1):
        numbers.append(batch["number"])
        clock(step)
        note(log, step)
    assert numbers == [0, 1, 2]
    shares = [record["data_wait_share"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert shares == [1 / 2, 1 / 3, 1 / 4]


def test_the_main_rank_alone_writes_and_continues_the_files(tmp_path, clock, capsys):
    log = make_log(OneRank(), tmp_path)
    for step in (1, 2, 3):
        clock(1)
        note(log, step)
        log.bad_step(step, rows=[step, -1])
    assert capsys.readouterr().err.count("skipped: its gradient is not finite") == 3
    other = make_log(OneRank(is_main_process=False), tmp_path / "none")
    clock(1)
    note(other, 1)
    other.bad_step(1, rows=[1])
    assert not (tmp_path / "none").exists()

    resumed = make_log(OneRank(), tmp_path, done=2)
    clock(1)
    note(resumed, 3)
    for name in ("metrics.jsonl", "bad_steps.jsonl"):
        steps = [record["step"] for record in read_metrics(tmp_path / name)]
        assert steps == ([1, 2, 3] if name == "metrics.jsonl" else [1, 2])
    assert read_metrics(tmp_path / "bad_steps.jsonl")[0] == {"step": 1, "rows": [1, -1]}


def test_a_validation_is_in_the_record_of_its_step(tmp_path, clock, monkeypatch):
    """And in the trackers, flat, and in the progress bar from then on."""
    ranks, shown, doing = OneRank(), [], []
    log = make_log(ranks, tmp_path, logging_steps=2)
    monkeypatch.setattr(log.bar, "set_postfix_str", shown.append)
    monkeypatch.setattr(log.bar, "set_description", doing.append)
    for step in (1, 2, 3):
        clock(1)
        note(log, step)
    figures = {"eval_loss": 2.5, "eval_perplexity": None, "eval_loss_by_position": {"1": 2.0}}
    with log.pause("validating"):
        assert doing == ["validating"]
        clock(1000)
        log.validation(3, figures)
    assert doing == ["validating", "training"]
    clock(2)
    note(log, 4)
    log.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["step_seconds"] for record in records] == [1.0, 1.0, 1.0, 2.0]
    with_figures = [record for record in records if "eval_loss" in record]
    assert with_figures == [records[2]] and records[2].items() >= figures.items()
    assert list(records[2])[:2] == ["step", "loss"]
    tracked = [numbers for step, numbers in ranks.tracked if step == 3][-1]
    assert tracked == {"eval_loss": 2.5, "eval_loss_by_position/1": 2.0}
    assert "eval" not in shown[0] and "loss 2.0000, lr" in shown[-1]
    assert all(line.endswith(", eval loss 2.5000") for line in shown[-2:])
