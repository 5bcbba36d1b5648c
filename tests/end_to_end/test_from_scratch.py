"""From random weights, on a context that grows: the same numbers on every layout and after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runs import ROOT, losses, metrics, same, weights
from safetensors.torch import load_file

WSD = ("--lr_scheduler_type", "wsd", "--decay_steps", "2", "--warmup_steps", "2")
FLAGS = ("--from_scratch", *WSD, "--context_schedule", "32:4", "--micro_batch_tokens", "200")
CONTEXT = [32, 88, 144, 200, None, None]  # of 256 tokens

WATCHED = """\
import atexit, gc, os

if "RANK" in os.environ:
    from anchor_context.run import patience

    minutes, change = [], patience.set_timeout
    patience.set_timeout = lambda time: (minutes.append(time.total_seconds() / 60), change(time))

    def tell():
        with open(os.environ["TOLD"] + os.environ["RANK"], "w") as stream:
            print(gc.get_freeze_count(), *minutes, file=stream)

    atexit.register(tell)
"""


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A configuration and a tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("scratch") / "model"
    shutil.copytree(tiny.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def two_ranks(launch, model, tmp_path_factory):
    """Under ZeRO-3, which partitions the weights while they are loaded; and what its ranks tell."""
    output, hooks = tmp_path_factory.mktemp("runs") / "two", tmp_path_factory.mktemp("hooks")
    (hooks / "sitecustomize.py").write_text(WATCHED)
    flags = ("--max-train-steps", "6", "--checkpoint_every", "3", "--keep_checkpoints", "3")
    environment = {"PYTHONPATH": f"{hooks}:{ROOT}", "TOLD": str(output) + ".told"}
    finished = launch(2, output, "--model_name_or_path", str(model), *FLAGS, *flags, **environment)
    assert "weights  random (--from_scratch)" in finished.stdout
    return output


def test_after_the_first_step_objects_are_frozen_and_ranks_wait_less(two_ranks):
    """And longer again for what comes between steps: all else would be a long checkpoint's end."""
    for rank in "01":
        frozen, *minutes = Path(f"{two_ranks}.told{rank}").read_text().split()
        assert int(frozen) > 100_000
        assert minutes == ["30.0", "30.0", *["10.0", "30.0"] * 5]


ROW = ("--gradient-accumulate-every", "2", "--micro_batch_tokens", "150")
LAYOUTS = {
    "one rank, ZeRO-1": (1, "zero1", ()),
    "ring, ZeRO-3": (2, "zero3", ("--parallel_mode", "ring_attn")),
    "Ulysses, ZeRO-2": (2, "zero2", ("--parallel_mode", "ulysses_attn")),
}


@pytest.mark.parametrize(
    "name",
    [name if "one" in name else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_every_layout_and_zero_stage_gives_the_same_numbers(
    name, two_ranks, launch, model, tmp_path
):
    (processes, stage, flags), output = LAYOUTS[name], tmp_path / "run"
    flags = (*FLAGS, *ROW, *flags, "--max-train-steps", "6", "--model_name_or_path", str(model))
    stage = ("--deepspeed_config_file", f"accelerate_configs/{stage}.json")
    launch(processes, output, *flags, launcher=stage)
    for ours, theirs in zip(metrics(output), metrics(two_ranks), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for key in ("step", "learning_rate", "target_tokens", "tokens_seen", "context_length"):
            assert ours[key] == theirs[key]
    assert not list(output.glob(".unfinished*")), "the random weights are gone when they are loaded"


def test_random_weights_are_trained(two_ranks, tiny):
    assert [step["context_length"] for step in metrics(two_ranks)] == CONTEXT
    assert losses(two_ranks)[-1] < losses(two_ranks)[0]
    trained = weights(two_ranks / "step-6")
    given = load_file(tiny.model / "model.safetensors")
    assert trained.keys() == given.keys() and not same(trained, given)


@pytest.mark.slow
def test_a_run_from_scratch_is_lengthened_before_its_decay(two_ranks, launch, model, tmp_path):
    """At step 3 the rate has not begun to fall: with eight steps it falls at the end of those."""
    output = tmp_path / "run"
    shutil.copytree(two_ranks, output)
    resume = ("--resume", str(output / "checkpoints/checkpoint_3_6"), "--max-train-steps", "8")
    finished = launch(2, output, "--model_name_or_path", str(model), *FLAGS, *resume)
    assert "3 steps, 6 rows done" in finished.stdout
    assert losses(output)[:4] == losses(two_ranks)[:4]
    assert [step["context_length"] for step in metrics(output)] == [*CONTEXT, None, None]
    peak = 1e-3
    assert [step["learning_rate"] for step in metrics(two_ranks)] == pytest.approx(
        [0, peak / 2, peak, peak, peak, peak * (1 - 0.5**0.5)]
    )
    assert [step["learning_rate"] for step in metrics(output)] == pytest.approx(
        [0, peak / 2, peak, peak, peak, peak, peak, peak * (1 - 0.5**0.5)]
    )
