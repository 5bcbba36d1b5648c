"""The folder of a run: whose it is, and the lines that a run ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anchor_context.files import UNFINISHED
from anchor_context.run import folder
from anchor_context.run.folder import (
    LOCK,
    VALIDATION,
    check_nobody_writes,
    check_output_is_free,
    claim_output,
    record_run,
    sees_claim,
    summary,
)
from anchor_context.run.metrics import MetricsFile
from anchor_context.run.plot import plot_loss


def write_run(output: Path, losses: list[float | None]) -> None:
    data = {"documents": 3, "document_tokens": 1000, "rows": 9}
    data |= {"documents_left_out": 0, "skipped_documents": 1}
    record = {"flags": {"attention_pattern": "anchor"}, "layout": "data 1", "data": data}
    (output / "args.json").write_text(json.dumps(record))
    lines = [
        json.dumps({"step": number, "loss": loss, "tokens_per_second": 10.0 * number})
        for number, loss in enumerate(losses, start=1)
    ]
    (output / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ([7.0, 3.0], "7.000 -> 3.000 in 2 steps\n"),
        ([7.0] * 10 + [1.0] * 9 + [3.0], "7.000 -> 1.200 in 20 steps (the last 10's mean)\n"),
        ([7.0] * 19 + [None], "7.000 -> 7.000 in 20 steps (the last 10's mean)\n"),
        ([None], "not finite -> not finite in 1 steps\n"),
    ],
)
def test_the_loss_at_the_end_is_not_one_rows_alone(tmp_path, losses, says):
    write_run(tmp_path, losses)
    assert f"loss     {says}" in summary(tmp_path)


def test_it_tells_what_became_of_the_data_and_the_newest_model(tmp_path):
    write_run(tmp_path, [7.0, 6.0, 5.0])
    for step in (3, 20, 100, "100.bak", "120 (copy)"):  # a person's copies are not the run's
        (tmp_path / f"step-{step}").mkdir()
    told = summary(tmp_path)
    assert f"model    {tmp_path / 'step-100'}" in told and "20 tokens/s (median)" in told
    assert "3 documents, 1,000 tokens in 9 rows, all kept (1 bad documents skipped)" in told
    assert "plot     none yet" in told


def test_it_tells_which_model_is_kept_as_the_best(tmp_path):
    """Of a run that went back behind the one of the lowest loss, that is another."""
    write_run(tmp_path, [7.0, 6.0, 5.0])
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for record, loss in zip(records, [6.5, 6.9, 6.7], strict=True):
        record["eval_loss"] = loss
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    told = summary(tmp_path)
    assert "valid    loss 6.500 -> 6.700, the lowest 6.500 at step 1\n" in told
    assert "best " not in told
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / VALIDATION).write_text('{"step": 3, "eval_loss": 6.7}')
    assert f"best     {tmp_path / 'best'}, loss 6.700 at step 3\n" in summary(tmp_path)


def test_an_output_folder_with_another_run_is_refused(tmp_path):
    check_output_is_free(tmp_path, resume="never")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(
        ValueError, match=r"holds another run \(metrics.jsonl\); name another folder$"
    ):
        check_output_is_free(tmp_path, resume="never")
    check_output_is_free(tmp_path, resume="auto")
    (tmp_path / "checkpoints/checkpoint_100_400").mkdir(parents=True)
    with pytest.raises(ValueError, match="folder, or pass --resume auto to continue it$"):
        check_output_is_free(tmp_path, resume="never")


def test_a_models_folder_alone_is_another_run(tmp_path):
    (tmp_path / "step-120").mkdir()
    with pytest.raises(ValueError, match=r"holds another run \(step-120\); name another folder$"):
        check_output_is_free(tmp_path, resume="never")


def test_another_runs_record_is_not_cut_to_a_checkpoint_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours, theirs = Path("ours"), Path("theirs")
    for run in (ours, theirs):
        (run / "checkpoints/checkpoint_2_8").mkdir(parents=True)
        (run / "args.json").touch()
    for path in (ours / "checkpoints/checkpoint_2_8", tmp_path / "ours/checkpoints/abandoned-1/x"):
        check_output_is_free(ours, resume=str(path))
        check_output_is_free(tmp_path / "ours", resume=str(path))
        check_output_is_free(tmp_path / "new", resume=str(path))
        with pytest.raises(
            ValueError, match=f"theirs holds another run than that of .*{path.name}"
        ):
            check_output_is_free(theirs, resume=str(path))


def test_a_finished_run_without_checkpoints_is_not_started_over(tmp_path):
    """`--resume auto` would find nothing to continue, and overwrite it from step 1 on."""
    (tmp_path / "step-120").mkdir()
    with pytest.raises(ValueError, match="models \\(step-120\\) but no checkpoint"):
        check_output_is_free(tmp_path, resume="auto")
    (tmp_path / "checkpoints/checkpoint_100_400").mkdir(parents=True)
    check_output_is_free(tmp_path, resume="auto")


def test_the_record_holds_the_settings_and_what_took_part(tmp_path):
    for layout in ("data 1", "data 2"):  # a resumed run writes it again
        record_run(tmp_path, flags={"seed": 42}, layout=layout, kernel=None)
    record = json.loads((tmp_path / "args.json").read_text())
    assert list(record) == ["flags", "layout", "kernel", "versions", "git_commit"]
    assert (record["flags"], record["layout"]) == ({"seed": 42}, "data 2")
    assert record["versions"]["torch"] == torch.__version__
    assert list(tmp_path.iterdir()) == [tmp_path / "args.json"]


# --------------------------------------------------------------------------------------------------
# One process writes into the folder.

HOLD = """
import os, sys, time
from pathlib import Path
from anchor_context.run.folder import claim_output, sees_claim
output = Path(sys.argv[1])
assert sees_claim(output, claim_output(output, resume="auto"))  # and keeps the lock
if os.fork() == 0:  # as a data worker, which may live on for a while
    time.sleep(60)
print("mine", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path / "run", and has a forked child."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"mine\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_gone(holder, tmp_path):
    output = tmp_path / "run"
    refused = rf"--output-dir {output}: process {holder.pid} on .* writes there; wait for its end"
    for look in (check_nobody_writes, lambda path: claim_output(path, resume="auto")):
        with pytest.raises(ValueError, match=refused):
            look(output)
    holder.kill()
    holder.wait()
    check_nobody_writes(output)
    claim_output(output, resume="auto")
    assert f"process {os.getpid()} on " in (output / LOCK).read_text()


def test_a_folder_that_was_filled_meanwhile_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds another run"):
        claim_output(tmp_path, resume="never")


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def unsupported(descriptor, kind):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folder.fcntl, "lockf", unsupported)
    claim_output(tmp_path, resume="auto")
    check_nobody_writes(tmp_path)
    assert capsys.readouterr().err.count("No locks available; start no second run") == 1


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    output = tmp_path / "run"
    output.mkdir()
    (output / LOCK).symlink_to(tmp_path / "mine")
    check_nobody_writes(output)
    with pytest.raises(OSError, match="--output-dir"):
        claim_output(output, resume="auto")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_that_cannot_be_made_names_the_flag(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match="Not a directory; .* --output-dir|File exists; .* --output-dir"
    ) as refused:
        claim_output(tmp_path / "file/run", resume="auto")
    assert refused.value.filename == str(tmp_path / "file/run")


def test_what_is_no_record_of_a_run_is_named(tmp_path):
    for text in ('{"flags"', "[1]", "{}"):
        (tmp_path / "args.json").write_text(text)
        with pytest.raises(ValueError, match="args.json is not what a run wrote"):
            summary(tmp_path)
        assert folder.recorded_memory_plan(tmp_path / "checkpoints/checkpoint_1_4") is None


# --------------------------------------------------------------------------------------------------
# A full disk.


def test_a_last_save_waits_for_the_disk(monkeypatch, capsys):
    tries = []

    def full_twice() -> None:
        tries.append(1)
        if len(tries) <= 2:
            raise OSError(28, "No space left on device", "step-9")

    monkeypatch.setattr(folder, "PAUSE_SECONDS", 0.0)
    folder._patiently(full_twice)
    assert len(tries) == 3
    assert capsys.readouterr().err.count("step-9'; trying again for 30 minutes") == 1

    monkeypatch.setattr(folder, "WAIT_SECONDS", 0.0)
    tries.clear()
    with pytest.raises(OSError, match="No space left"):
        folder._patiently(full_twice)
    assert len(tries) == 1


def test_what_is_planted_is_not_written_through(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    output = tmp_path / "run"
    output.mkdir()
    names = ("args.json", "metrics.jsonl", "loss.png")
    for name in names:
        for planted in (output / name, output / f"{UNFINISHED}{name}"):
            planted.symlink_to(mine)
    record_run(output, flags={})
    file = MetricsFile(output / "metrics.jsonl", keep_steps=0)
    record = {"step": 1, "tokens_seen": 1, "loss": 1.0, "learning_rate": 1.0}
    file.append(record)
    plot_loss(output / "metrics.jsonl", output / "loss.png")
    assert sorted(path.name for path in output.iterdir()) == sorted(names)
    assert not any(path.is_symlink() for path in output.iterdir())

    (output / "metrics.jsonl").unlink()
    (output / "metrics.jsonl").symlink_to(mine)  # while the run goes on
    file.append(record)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("write", ["record", "metrics"])
def test_a_folder_that_cannot_be_written_names_path_and_flag(write, tmp_path):
    output = tmp_path / "gone"
    with pytest.raises(OSError, match=r"No such file .* --output-dir.*gone/"):
        if write == "record":
            record_run(output, flags={})
        else:
            MetricsFile(output / "metrics.jsonl", keep_steps=0)


def test_a_machine_that_does_not_see_the_output_folder_is_found_out(tmp_path, monkeypatch):
    claim = "process 7 on the first host"
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / LOCK).write_text(claim)
    assert sees_claim(tmp_path / "here", claim)
    monkeypatch.setattr(folder, "SEE_SECONDS", 0.0)
    assert not sees_claim(tmp_path / "elsewhere", claim)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / LOCK).write_text("process 1 on an earlier host")
    assert not sees_claim(tmp_path / "elsewhere", claim)

    waits = []  # a network file system shows it after a while
    monkeypatch.setattr(folder, "SEE_SECONDS", 1e9)
    monkeypatch.setattr(folder.time, "sleep", lambda _: waits.append(1) or late.write_text(claim))
    late = tmp_path / "elsewhere" / LOCK
    assert sees_claim(tmp_path / "elsewhere", claim) and waits == [1]
