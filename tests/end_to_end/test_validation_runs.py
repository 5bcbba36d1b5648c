"""Runs that are validated: training does not notice, and whatever disturbs one leaves the same record."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from runs import Run, metrics, same, started, weights

from anchor_context.evaluate import __main__ as evaluate
from anchor_context.run.folder import summary

TIMES = (
    "step_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "data_wait_share",
    "eval_seconds",
)
STEPS = (
    "--max-train-steps",
    "6",
    "--gradient-accumulate-every",
    "2",
    "--micro_batch_tokens",
    "200",
)
VALIDATED = ("--eval_documents", "3", "--eval_every", "2", "--keep_best")
CHECKPOINTS = ("--checkpoint_every", "2", "--keep_checkpoints", "9")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> tuple[str, str]:
    return "--cache_dir", str(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def validated(tiny, cache, tmp_path_factory) -> tuple[Path, str]:
    """A run on one process, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "validated"
    with started(tiny, 1, output, *STEPS, *VALIDATED, *CHECKPOINTS, *cache) as run:
        return output, run.finish(0)


def record(output: Path) -> list[dict]:
    """Of every step, without what the clock decides."""
    return [{k: v for k, v in step.items() if k not in TIMES} for step in metrics(output)]


def figures(output: Path) -> list[dict]:
    """What the validations found, by step."""
    kept = [{k: v for k, v in step.items() if k.startswith("eval_")} for step in record(output)]
    return [step for step in kept if step]


def held_out(output: Path) -> Path:
    """The file of the documents that the run held out."""
    printed = output.with_name(output.name + ".log").read_text()
    return Path(printed.split(" tokens held out (")[1].split(")")[0])


def test_training_is_that_of_a_run_that_is_not_validated(validated, tiny, cache, tmp_path):
    """On the same rows: losses and weights, bit for bit."""
    output = tmp_path / "run"
    documents = ("--eval_documents", "3")  # validated at the end alone
    with started(tiny, 1, output, *STEPS, *documents, *cache) as run:
        run.finish(0)
    assert len(figures(validated[0])) == 3 and len(figures(output)) == 1
    for with_it, without in zip(record(validated[0]), record(output), strict=True):
        keys = [key for key in with_it if not key.startswith("eval_")]
        assert {k: with_it[k] for k in keys} == {k: without[k] for k in keys}
    assert same(weights(validated[0] / "step-6"), weights(output / "step-6"))
    assert figures(output)[-1] == figures(validated[0])[-1]


def test_the_run_tells_what_it_held_out_and_found(validated):
    output, printed = validated
    arguments = json.loads((output / "args.json").read_text())
    assert arguments["flags"]["eval_documents"] == 3
    assert arguments["data"]["held_out_documents"] == 3
    packed = arguments["validation"]["packed"]
    assert packed["documents"] == 3
    assert len(held_out(output).read_text().splitlines()) == 3
    steps = f"{packed['rows']:,} rows, every 2 steps and at the end"
    assert f"valid    3 documents, {packed['targets']:,} targets in {steps}" in printed
    assert [step["step"] for step in metrics(output) if "eval_loss" in step] == [2, 4, 6]
    assert figures(output)[-1]["eval_loss"] < figures(output)[0]["eval_loss"]
    assert f"eval loss {figures(output)[-1]['eval_loss']:.4f}" in printed
    for plot in ("loss.png", "loss_by_position.png"):
        assert (output / plot).read_bytes().startswith(b"\x89PNG")
    best = min(figures(output), key=lambda found: found["eval_loss"])
    assert best == figures(output)[-1] and same(
        weights(output / "best"), weights(output / "step-6")
    )
    told = summary(output)
    assert f"the lowest {best['eval_loss']:.3f} at step 6\n" in told
    assert f"best     {output / 'best'}, loss {best['eval_loss']:.3f} at step 6\n" in told


def test_evaluate_finds_the_same_on_the_saved_model(validated, tmp_path):
    output, _ = validated
    data = ("--dataset", str(held_out(output)), "--data_format", "tokenized")
    assert_evaluate_finds(figures(output)[-1], output / "step-6", tmp_path, *data)


def assert_evaluate_finds(found: dict, model: Path, folder: Path, *data: str) -> None:
    """On the documents alone."""
    command = ("ppl", "--model", str(model), "--lengths", "128", "--every_document")
    evaluate.main([*command, *data, "--out", str(folder)])
    *by_position, whole = json.loads((folder / "ppl.json").read_text())["results"]
    assert whole["loss"] == pytest.approx(found["eval_loss_alone"], rel=1e-6)
    assert whole["targets"] == found["eval_targets_alone"]
    assert {str(row["first"]): row["loss"] for row in by_position} == pytest.approx(
        found["eval_loss_alone_by_position"], rel=1e-6
    )


SLOW_VALIDATION = """
import os, time
from pathlib import Path
import anchor_context.evaluate.validation as validation
measured = validation.sums_by_position

def slowly(*arguments):
    Path(os.environ["VALIDATING"]).touch()
    time.sleep(0.3)
    return measured(*arguments)

if "RANK" in os.environ:
    validation.sums_by_position = slowly
"""


@pytest.fixture
def slow_validation(tmp_path) -> dict:
    """Arguments of `started`: every micro-batch of a validation takes long enough to be seen."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(SLOW_VALIDATION)
    return {"hooks": hooks, "VALIDATING": str(tmp_path / "validating")}


def validating(run: Run, hook: dict, *, behind: int) -> bool:
    """Whether it validates behind that step, or a later one."""
    mark = Path(hook["VALIDATING"])
    if run.steps() < behind:
        mark.unlink(missing_ok=True)
    return run.steps() >= behind and mark.exists()


@pytest.mark.slow
def test_killed_in_a_validation_and_stopped_in_the_next_one(
    validated, tiny, cache, slow_validation, tmp_path
):
    """The first by SIGKILL, from the checkpoint before it; the other broken off, and made up for."""
    output = tmp_path / "run"
    flags = (*STEPS, *VALIDATED, *CHECKPOINTS, *cache)
    with started(tiny, 1, output, *flags, **slow_validation) as run:
        run.until(lambda: validating(run, slow_validation, behind=4))
        run.kill()
    assert [step["step"] for step in metrics(output) if "eval_loss" in step] == [2]
    Path(slow_validation["VALIDATING"]).unlink()
    with started(tiny, 1, output, *flags, **slow_validation) as run:
        run.until(lambda: validating(run, slow_validation, behind=4))
        os.kill(run.launcher.pid, signal.SIGTERM)
        printed = run.finish(75)
    assert "2 steps, 4 rows done" in printed
    assert [step["step"] for step in metrics(output) if "eval_loss" in step] == [2]
    with started(tiny, 1, output, *flags) as run:
        printed = run.finish(0)
    assert "4 steps, 8 rows done" in printed
    assert record(output) == record(validated[0])
    for model in ("best", "step-6"):
        assert same(weights(output / model), weights(validated[0] / model))


@pytest.mark.slow
def test_stopped_in_the_last_validation_of_a_run_without_checkpoints(
    validated, tiny, cache, slow_validation, tmp_path
):
    """All steps are done and the model is saved, but code 75 promises that the rest can be made up for."""
    output = tmp_path / "run"
    flags = (*STEPS, *VALIDATED, *cache)
    with started(tiny, 1, output, *flags, **slow_validation) as run:
        run.until(lambda: validating(run, slow_validation, behind=6))
        os.kill(run.launcher.pid, signal.SIGTERM)
        run.finish(75)
    with started(tiny, 1, output, *flags) as run:
        assert "6 steps, 12 rows done" in run.finish(0)  # none is trained again
    assert record(output) == record(validated[0])


@pytest.mark.slow
def test_two_ranks_under_zero_3_on_other_data(tiny, cache, tmp_path):
    """Weights are gathered for every forward, whether it is of training or validation."""
    data, output = tmp_path / "eval.jsonl", tmp_path / "run"
    data.write_text("".join(tiny.documents.read_text().splitlines(keepends=True)[-6:]))
    flags = ("--eval_dataset", str(data), "--eval_every", "1", "--max-train-steps", "2")
    with started(tiny, 2, output, *flags, "--micro_batch_tokens", "64", *cache) as run:
        run.finish(0)
    first, last = figures(output)
    assert last["eval_loss"] < first["eval_loss"]
    assert_evaluate_finds(last, output / "step-2", tmp_path, "--dataset", str(data))
