"""The record of a run: the pattern's own work, files that survive a kill, traces of chosen steps."""

from __future__ import annotations

import gzip
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot

from anchor_context.attention.patterns import attended_pairs
from anchor_context.run.device import peak_flops, peak_memory_bytes
from anchor_context.run.metrics import MetricsFile, read_metrics
from anchor_context.run.plot import plot_loss
from anchor_context.run.profiler import StepProfiler, parse_profile_steps
from anchor_context.run.work import ModelWork


def test_the_pattern_s_own_work_is_less_than_full_causal_work():
    work = ModelWork(matmul_parameters=1_000, attention_width=64)
    lengths = np.array([10, 20, 2])
    own = attended_pairs(lengths, pattern="intra_doc", anchor_placement="none")
    full = attended_pairs(lengths, pattern="full", anchor_placement="none")
    assert (own, full) == (55 + 210 + 3, 528)
    difference = work.flops(tokens=32, pairs=full) - work.flops(tokens=32, pairs=own)
    assert difference == 12 * 64 * (528 - 268)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Some GPU nobody knows", None),
    ],
)
def test_a_gpu_s_ceiling_is_its_own(name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == flops
    assert peak_flops(torch.device("cpu")) is None


def test_peak_memory_is_in_bytes():
    before = peak_memory_bytes(torch.device("cpu"))
    assert before > 50 * 2**20  # a process that holds PyTorch
    block = torch.ones(before // 4 + 2**26)  # float32: more than all that was ever resident
    assert peak_memory_bytes(torch.device("cpu")) > block.nbytes


@pytest.mark.parametrize(
    "torn", ['{"step": 4, "lo', '{"step": 4, "sent": {"ring": 1}', '{"step": 4, "loss": 1.0}']
)
def test_a_torn_last_line_is_left_out_and_written_again(torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, keep_steps=0)
    for step in (1, 2, 3):
        file.append({"step": step, "sent": {"ring": step}})
    with path.open("a") as stream:
        stream.write(torn)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]

    resumed = MetricsFile(path, keep_steps=2)
    resumed.append({"step": 3, "sent": {"ring": 30}})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "sent": {"ring": 1}},
        {"step": 2, "sent": {"ring": 2}},
        {"step": 3, "sent": {"ring": 30}},
    ]


def test_a_broken_line_is_told_and_dropped(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    broken = [b'{"step": 1, "lo{"step": 1, "loss": 2.0}', b"\0\xff", b"[1]", b'{"loss": 1}', b""]
    path.write_bytes(b"\n".join([b'{"step": 1}', *broken, b'{"step": 3, "loss": 4.0}', b""]))
    assert [record["step"] for record in read_metrics(path)] == [1, 3]
    told = capsys.readouterr().err
    assert f"{path}: line 2 and 4 more is no record of a step" in told
    assert [record["step"] for record in read_metrics(path, "loss")] == [3]

    MetricsFile(path, keep_steps=3).append({"step": 4})
    capsys.readouterr()
    assert [record["step"] for record in read_metrics(path)] == [1, 3, 4]
    assert capsys.readouterr().err == "", "the lines are gone"


def test_a_kill_while_rewriting_leaves_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def killed(self, text):
        with self.open("w") as stream:
            stream.write(text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(path, keep_steps=1)
    assert len(read_metrics(path)) == 2


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """A full disk: the byte behind `size` of any file is refused, after those before it were written.

    Messages must not go to a file meanwhile: ask for `capsys`.
    """
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def test_what_a_full_disk_refuses_is_said_once_and_written_later(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, keep_steps=0)
    file.append({"step": 1})
    with files_end_at(path.stat().st_size + 5):
        for step in (2, 3):
            file.append({"step": step})
        assert path.read_text() == '{"step": 1}\n{"ste', "the case is vacuous"
        assert read_metrics(path) == [{"step": 1}]
    told = capsys.readouterr().err
    assert told.count(f"{path} not written: File too large (errno 27)") == 1
    for step in (4, 5):
        file.append({"step": step})
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in range(1, 6))

    with files_end_at(path.stat().st_size):
        file.append({"step": 6})
    assert f"{path} not written" in capsys.readouterr().err, "another time, another message"


def test_a_longer_half_line_is_not_left_behind_a_shorter_whole_one(tmp_path, capsys):
    """Several lines wait, one of them fits, and the run is resumed before the others were written."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, keep_steps=0)
    with files_end_at(40):
        for step in (1, 2, 3, 4):
            file.append({"step": step})
    resumed = MetricsFile(path, keep_steps=2)
    resumed.append({"step": 3})
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3))


def test_keys_are_added_to_the_last_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, keep_steps=0)
    file.add_to_last({"eval_loss": 1.0})
    assert read_metrics(path) == [], "there is none"
    for step in (1, 2):
        file.append({"step": step})
    file.add_to_last({"eval_loss": 1.0})
    file.append({"step": 3})
    expected = [{"step": 1}, {"step": 2, "eval_loss": 1.0}, {"step": 3}]
    assert read_metrics(path) == expected
    again = MetricsFile(path, keep_steps=3)
    again.add_to_last({"eval_loss": 2.0})
    assert read_metrics(path) == [*expected[:2], {"step": 3, "eval_loss": 2.0}]


def test_keys_are_added_where_the_record_waits_for_the_disk(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, keep_steps=0)
    file.append({"step": 1})
    with files_end_at(path.stat().st_size):
        file.add_to_last({"eval_loss": 1.0})
        assert "its last line lacks eval_loss" in capsys.readouterr().err
        file.append({"step": 2})
        file.append({"step": 3})
        file.add_to_last({"eval_loss": 3.0})
    assert read_metrics(path) == [{"step": 1}]
    file.append({"step": 4})
    assert read_metrics(path) == [
        *({"step": 1}, {"step": 2}, {"step": 3, "eval_loss": 3.0}, {"step": 4}),
    ]


def test_a_plot_that_the_disk_refuses_is_a_message(tmp_path, capsys):
    metrics, plot = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    plot_loss(metrics, plot)
    assert not plot.exists(), "there is no step to draw"
    MetricsFile(metrics, keep_steps=0).append(
        {"step": 1, "tokens_seen": 10, "loss": 3.0, "learning_rate": 1e-3}
    )
    plot_loss(metrics, plot)
    with files_end_at(500):
        plot_loss(metrics, plot)
    assert f"{plot} not written: File too large" in capsys.readouterr().err


def test_the_plot_is_a_png(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", keep_steps=0)
    for step in (1, 2):
        file.append(
            {"step": step, "tokens_seen": step * 10, "loss": 3.0 / step, "learning_rate": 1e-3}
        )
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_has_a_second_curve_of_the_validations(tmp_path, monkeypatch):
    file, drawn = MetricsFile(tmp_path / "metrics.jsonl", keep_steps=0), []
    for step in (1, 2, 3, 4):
        record = {"step": step, "tokens_seen": step * 10, "loss": 2.0, "learning_rate": 1e-5}
        validated = {2: {"eval_loss": 3.0}, 3: {"eval_loss": None}, 4: {"eval_loss": 2.5}}
        file.append(record | validated.get(step, {}))
    monkeypatch.setattr(pyplot, "close", drawn.append)
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    training, validation = drawn[0].axes[0].lines
    assert training.get_ydata().tolist() == [2.0] * 4
    assert validation.get_xydata().tolist() == [[20, 3.0], [40, 2.5]]


def test_the_plot_s_tokens_are_readable(tmp_path, monkeypatch):
    file, drawn = MetricsFile(tmp_path / "metrics.jsonl", keep_steps=0), []
    for step in (1, 2, 3):
        record = {"step": step, "tokens_seen": step * 10**9, "loss": 2.0, "learning_rate": 1e-5}
        file.append(record)
    monkeypatch.setattr(pyplot, "close", drawn.append)
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    shown = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert "2,000,000,000" in shown and len(shown) < 9


def run_steps(profiler: StepProfiler, steps: range) -> None:
    for step in steps:
        profiler.before(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(4).sum()
        profiler.after(step, final=step == steps[-1])


@pytest.mark.parametrize(
    ("asked", "steps", "expected"),
    [
        ("3:4", range(1, 7), {3, 4}),
        ("2:9", range(1, 4), {2, 3}),  # the run ends first
        ("2:5", range(4, 8), {4, 5}),  # resumed in between
    ],
)
def test_the_trace_holds_the_steps_asked_for(asked, steps, expected, tmp_path):
    run_steps(StepProfiler(asked, tmp_path / "profile", rank=1), steps)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == f"steps-{asked.replace(':', '-')}.rank-1.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {int(n.split()[1]) for n in names if n and n.startswith("step ")} == expected


def test_nobody_asked_and_nothing_is_traced(tmp_path):
    run_steps(StepProfiler(None, tmp_path / "profile", rank=0), range(1, 4))
    run_steps(StepProfiler("8:9", tmp_path / "profile", rank=0), range(1, 4))
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", ["3", "5:3", "0:2", "a:b", "-1:2", "1:2:3", ""])
def test_other_spellings_are_refused(steps):
    with pytest.raises(ValueError, match="--profile_steps"):
        parse_profile_steps(steps)
