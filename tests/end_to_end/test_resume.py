"""A run that was killed, and resumed, is the run that was not: the same losses, rates, rows and weights."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from runs import Run, metrics, same, started, weights

from anchor_context.run.checkpoint import find_checkpoint

ROWS_PER_STEP = 4
EVERY_3 = ("--checkpoint_every", "3")
SCHEDULE = ("--lr_scheduler_type", "cosine", "--warmup_steps", "5")


def split(processes: int) -> tuple[str, ...]:
    """The flags that make a step `ROWS_PER_STEP` rows of so many data-parallel ranks."""
    return ("--gradient-accumulate-every", str(ROWS_PER_STEP // processes), *SCHEDULE)


@pytest.fixture(scope="module")
def corpus(tiny, tmp_path_factory):
    """Documents for one epoch of about 30 steps."""
    folder = tmp_path_factory.mktemp("corpus")
    lines, characters = [], 0
    for line in tiny.documents.open():
        if characters < 25_000:
            lines.append(line)
            characters += len(line)
    (folder / "documents.jsonl").write_text("".join(lines))
    return type(tiny)(model=tiny.model, documents=folder / "documents.jsonl")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> tuple[str, str]:
    return "--cache_dir", str(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def undisturbed(corpus, cache, tmp_path_factory) -> Path:
    """An epoch, with the checkpoints of every tenth step."""
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    flags = ("--checkpoint_every", "10", "--keep_checkpoints", "9")
    with started(corpus, 2, output, *split(2), *flags, *cache) as run:
        run.finish(0)
    return output


def results(output: Path) -> list[tuple]:
    keys = ("step", "loss", "learning_rate", "grad_norm", "target_tokens", "tokens_seen")
    return [tuple(record[key] for key in keys) for record in metrics(output)]


def assert_same_run(output: Path, undisturbed: Path) -> None:
    """Bit for bit."""
    assert results(output) == results(undisturbed)
    last = f"step-{len(results(undisturbed))}"
    assert same(weights(output / last), weights(undisturbed / last))


def complete(output: Path) -> list[Path]:
    """The checkpoints that have their name, oldest first."""
    found = (output / "checkpoints").glob("checkpoint_*")
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def memory_plan(output: Path) -> dict:
    return json.loads((output / "args.json").read_text())["memory"]


def is_saving(output: Path) -> bool:
    return any((output / "checkpoints").glob(".unfinished-checkpoint_*"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def test_the_undisturbed_run_trains_every_token_once(undisturbed):
    data = json.loads((undisturbed / "args.json").read_text())["data"]
    steps = metrics(undisturbed)
    assert 25 <= len(steps) <= 35
    assert sum(step["target_tokens"] for step in steps) == data["document_tokens"]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1, "the case is vacuous"


def test_killed_while_saving_and_the_last_checkpoint_damaged(undisturbed, corpus, cache, tmp_path):
    output = tmp_path / "run"
    with started(corpus, 2, output, *split(2), *EVERY_3, *cache) as run:
        run.until(lambda: len(complete(output)) == 2)
        run.until(lambda: is_saving(output))
        run.kill()
    last = complete(output)[-1]
    flip(last / "rank_1.pt")
    planned = memory_plan(output)
    with started(corpus, 2, output, *split(2), *EVERY_3, *cache) as run:
        printed = run.finish(0)
    assert memory_plan(output) == planned  # for the bytes that were free then
    assert f"{last} is damaged and skipped: rank_1.pt: its contents have changed" in printed
    assert f"resumed  {complete(output)[0].parent}/checkpoint_" in printed
    assert not is_saving(output)
    assert_same_run(output, undisturbed)


def test_a_run_taken_back_goes_on_from_there_and_stays_there(undisturbed, corpus, cache, tmp_path):
    """Another rate from step 10 to 20, where the first course has left a checkpoint of its own."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    old = complete(output)
    assert [path.name for path in old] == [f"checkpoint_{n}_{4 * n}" for n in (10, 20)]
    back = ("--resume", str(old[0]), "--learning-rate", "1e-6")
    flags = ("--max-train-steps", "20", "--checkpoint_every", "10", "--keep_checkpoints", "2")
    manifest = (old[1] / "manifest.json").read_bytes()
    with started(corpus, 2, output, *split(2), *back, *flags, *cache) as run:
        printed = run.finish(0)
    assert f"resumed  {old[0]}: 10 steps, 40 rows done" in printed
    assert complete(output) == old
    assert (old[1] / "manifest.json").read_bytes() != manifest
    assert find_checkpoint(output, "auto") == old[1]
    aside = output / "checkpoints/abandoned-1"
    assert [path.name for path in aside.iterdir()] == [old[1].name]
    assert (aside / old[1].name / "manifest.json").read_bytes() == manifest
    ours, first = results(output), results(undisturbed)
    assert len(ours) == 20 and ours[:10] == first[:10] and ours[11:] != first[11:20]


def test_another_precision_or_model_is_refused(undisturbed, corpus, cache, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    other = ("--mixed_precision", "bf16", "--rope-theta", "70000")
    with started(corpus, 2, output, *split(2), *other, *cache) as run:
        printed = run.finish(2)
    assert printed.count("error: --resume: the checkpoint is of another training") == 1
    assert "--mixed_precision is bf16 here and was no" in printed
    assert "the model's rope_parameters rope_theta is 70000.0 here and was " in printed
    assert_same_run(output, undisturbed)


# --------------------------------------------------------------------------------------------------
# What else a run survives, in one: its folder's name is a pattern.

DIVERGES = """\
import os
if "RANK" in os.environ:
    import torch

    step, calls = torch.optim.AdamW.step, []

    def broken(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 14:  # two groups of parameters: from step 8 on
            for group in self.param_groups:
                group["lr"] = 1e30
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = broken
"""


@pytest.mark.slow
def test_a_run_that_diverged_goes_on_from_its_last_good_checkpoint(
    undisturbed, corpus, cache, tmp_path
):
    output, hooks = tmp_path / "sweep_lr=[1e-3,2e-3]", tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(DIVERGES)
    flags = (*split(2), "--checkpoint_every", "1", "--max_bad_steps", "3", *cache)
    with started(corpus, 2, output, *flags, hooks=hooks) as run:
        printed = run.finish(1)
    good = output / "checkpoints/checkpoint_7_28"
    assert "3 steps in a row had no finite gradient" in printed
    assert f"the last good checkpoint is {good}" in printed
    assert [path.name for path in complete(output)] == [
        f"checkpoint_{n}_{4 * n}" for n in (6, 7, 8)
    ]
    assert metrics(output)[-1]["step"] == 11 and not list(output.glob("step-*"))

    # Somebody else wrote into the record, and an old checkpoint became a link.
    with (output / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 1, "lo{"step": 1}\n')
    (tmp_path / "moved").mkdir()
    (output / "checkpoints/.unfinished-deleted-checkpoint_1_4").symlink_to(tmp_path / "moved")

    with started(corpus, 2, output, *flags) as run:
        run.until(lambda: (output / "checkpoints/checkpoint_9_36").exists())
        main = run.ranks()[0]
        main.suspend()  # or it would end before the second has started
        with started(corpus, 1, tmp_path / "second", *flags, "--output-dir", str(output)) as second:
            refused = second.finish(2)
        main.resume()
        printed = run.finish(0)
    assert f"--output-dir {output}: process " in refused and " writes there; wait" in refused
    assert f"resumed  {good}: 7 steps" in printed and "is no record of a step" in printed
    assert (output / "checkpoints/abandoned-1/checkpoint_8_32").is_dir()
    assert not is_saving(output) and not list((output / "checkpoints").glob(".unfinished*"))
    assert (tmp_path / "moved").is_dir()
    assert_same_run(output, undisturbed)


# --------------------------------------------------------------------------------------------------
# Ten kills in one run. Each waits for its moment, then up to `DELAY_SECONDS` at random.

DELAY_SECONDS = 0.3


def in_preparation(run: Run, cache: Path) -> None:
    run.until(lambda: any(cache.rglob("*")))


def in_steps(run: Run, cache: Path) -> None:
    resumed = run.steps()
    # The record is first cut back to the checkpoint, and then grows.
    run.until(lambda: "training:" in run.printed() and run.steps() != resumed)
    time.sleep(random.SystemRandom().uniform(0, DELAY_SECONDS))


def in_saving(run: Run, cache: Path) -> None:
    run.until(lambda: is_saving(run.output) and "training:" in run.printed())
    time.sleep(random.SystemRandom().choice([0, 0.01, 0.03]))


def at_any_time(run: Run, cache: Path) -> None:
    """Within 15 seconds; sooner where that would be many steps, for ten kills must fit into the run."""
    moment = time.monotonic() + random.SystemRandom().uniform(0, 15)
    enough = run.steps() + 3
    run.until(lambda: time.monotonic() > moment or run.steps() > enough)


MOMENTS = (in_preparation, in_saving, in_steps, in_saving, at_any_time)
DAMAGES = {4: flip, 6: Path.unlink, 8: truncate}


@pytest.mark.slow
def test_ten_kills(undisturbed, corpus, tmp_path):
    output, cache = tmp_path / "run", tmp_path / "cache"
    cache.mkdir()
    flags = (
        *split(2),
        "--checkpoint_every",
        "2",
        "--keep_checkpoints",
        "3",
        "--cache_dir",
        str(cache),
    )
    reached = 0
    for kill, moment in enumerate(MOMENTS * 2):
        with started(corpus, 2, output, *flags) as run:
            if moment is in_preparation and kill:
                shutil.rmtree(cache)
                cache.mkdir()
            moment(run, cache)
            run.kill()
        if kill in DAMAGES and len(complete(output)) > 1:
            DAMAGES[kill](
                complete(output)[-1] / "model" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
            )
        reached = max(reached, run.steps())
    assert 0 < reached < len(results(undisturbed))
    with started(corpus, 2, output, *flags) as run:
        run.finish(0)
    assert_same_run(output, undisturbed)


# --------------------------------------------------------------------------------------------------
# Other ranks, other seeds.

ULYSSES = ("--parallel_mode", "ulysses_attn", "--gradient-accumulate-every", str(ROWS_PER_STEP))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (1, ("--micro_batch_tokens", "50")),
        (4, ("--micro_batch_tokens", "row")),
        (4, (*ULYSSES, "--micro_batch_tokens", "300")),
    ],
    ids=["1", "4", "4 Ulysses"],
)
def test_another_number_of_ranks_and_other_micro_batches_continue_the_same_run(
    processes, flags, undisturbed, corpus, cache, tmp_path
):
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    for path in complete(output)[1:]:
        shutil.rmtree(path)
    with started(corpus, processes, output, *split(processes), *flags, *cache) as run:
        printed = run.finish(0)
    assert "checkpoint_10_40: 10 steps, 40 rows done" in printed
    ours, theirs = metrics(output), metrics(undisturbed)
    assert len(ours) == len(theirs)
    for got, expected in zip(ours, theirs, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for key in ("step", "learning_rate", "target_tokens", "tokens_seen"):
            assert got[key] == expected[key]


@pytest.mark.slow
def test_another_batch_gives_the_schedule_other_steps(undisturbed, corpus, cache, tmp_path):
    """An epoch goes on with half the rows in a step: more steps are left, and the rate still falls to 0."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    for path in complete(output)[1:]:
        shutil.rmtree(path)
    half = ("--gradient-accumulate-every", "1", *SCHEDULE)
    with started(corpus, 2, output, *half, *cache) as run:
        printed = run.finish(0)
    assert "resumed with other flags: --gradient_accumulate_every 1 (was " in printed
    steps, before = metrics(output), metrics(undisturbed)
    assert sum(step["target_tokens"] for step in steps) == sum(s["target_tokens"] for s in before)
    assert len(steps) > len(before)
    rates = [step["learning_rate"] for step in steps[10:]]
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.02 * rates[0]


@pytest.mark.slow
def test_a_model_that_a_kill_prevented_is_saved_by_the_resume(corpus, cache, tmp_path):
    """Between the last checkpoint and the model of the same step."""
    output = tmp_path / "run"
    flags = ("--max-train-steps", "2", "--checkpoint_every", "2", *cache)
    with started(corpus, 2, output, *flags) as run:
        run.finish(0)
    saved = weights(output / "step-2")
    shutil.rmtree(output / "step-2")
    with started(corpus, 2, output, *flags) as run:
        run.finish(0)
    assert same(weights(output / "step-2"), saved)


@pytest.mark.slow
def test_a_place_among_other_rows_is_refused(undisturbed, corpus, cache, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    other = ("--seed", "43", "--seq-length", "64")
    with started(corpus, 2, output, *split(2), *other, *cache) as run:
        printed = run.finish(2)
    assert printed.count("error: --resume: the checkpoint stands at a place in other rows") == 1
    assert "--seed is 43 here and was 42" in printed
    assert "--seq-length is 64 here and was 128" in printed
    assert_same_run(output, undisturbed)


@pytest.mark.slow
def test_another_seed_is_another_run(undisturbed, corpus, cache, tmp_path):
    flags = ("--seed", "43", "--max-train-steps", "6")
    with started(corpus, 2, tmp_path / "run", *split(2), *flags, *cache) as run:
        run.finish(0)
    for got, same_seed in zip(metrics(tmp_path / "run"), metrics(undisturbed), strict=False):
        assert got["loss"] != same_seed["loss"]


@pytest.mark.slow
def test_blank_rows_that_fill_an_epochs_last_step_are_no_rows_done(corpus, cache, tmp_path):
    """A run that goes on into the next epoch would leave out so many of its rows."""
    output = tmp_path / "run"
    flags = ("--gradient-accumulate-every", "7", "--checkpoint_every", "1", *cache)
    with started(corpus, 2, output, *flags) as run:
        run.finish(0)
    rows = json.loads((output / "args.json").read_text())["data"]["rows"]
    steps = len(metrics(output))
    assert rows % 14 > 0 and steps == rows // 14 + 1
    assert complete(output)[-1].name == f"checkpoint_{steps}_{rows}"
