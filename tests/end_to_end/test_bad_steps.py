"""A step without a finite loss or gradient changes nothing, on any rank; many in a row end the run."""

from __future__ import annotations

import json
import resource
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
from runs import metrics, same, started, weights

from anchor_context.checkpoint import verify_checkpoint

HOOK = """\
    import os
    if "RANK" in os.environ:
        from anchor_context.loss import CausalLMWithLoss
        forward, calls = CausalLMWithLoss.forward, []

        def poisoned(self, *args, **kwargs):
            calls.append(1)
            loss, count = forward(self, *args, **kwargs)
            kind = {bad}.get((int(os.environ["RANK"]), len(calls)))
            if kind == "loss":  # its gradient is finite
                loss = loss + float("inf")
            if kind == "gradient":
                loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss, count

        CausalLMWithLoss.forward = poisoned
"""


@pytest.fixture
def poison(tmp_path):
    """poison({(rank, forward): "loss" | "gradient"}) -> the folder of hooks; forwards count from 1."""

    def make(bad: dict[tuple[int, int], str]) -> Path:
        folder = tmp_path / "hooks"
        folder.mkdir(exist_ok=True)
        text = textwrap.dedent(HOOK).replace("{bad}", repr(bad))
        (folder / "sitecustomize.py").write_text(text)
        return folder

    return make


def bad_steps(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "bad_steps.jsonl").read_text().splitlines()]


def test_bad_steps_are_skipped_on_all_ranks_and_counted(tiny, row_cache, poison, tmp_path):
    # Two micro-batches per step: step 3 has a bad loss on rank 1, step 4 a bad gradient on rank 0.
    hooks = poison({(1, 5): "loss", (0, 8): "gradient"})
    output = tmp_path / "run"
    flags = ("--max-train-steps", "6", "--gradient-accumulate-every", "2", "--saving_interval", "1")
    schedule = ("--lr_scheduler_type", "linear", "--max_bad_steps", "3")
    cache = ("--cache_dir", str(row_cache))
    with started(tiny, 2, output, *flags, *schedule, *cache, hooks=hooks) as run:
        printed = run.finish(0)
    bad = bad_steps(output)
    assert [step["step"] for step in bad] == [3, 4]
    rows = [row for step in bad for row in step["rows"]]
    assert len(set(rows)) == 8, "the rows of both ranks and both micro-batches"
    assert "step 3 skipped" in printed and "step 4 skipped" in printed

    # The weights lie in shards on both ranks: equal as a whole, equal on each.
    models = [weights(output / f"step-{step}") for step in range(1, 7)]
    moved = [not same(*pair) for pair in pairwise(models)]
    assert moved == [True, False, False, True, True]
    steps = metrics(output)
    assert [step["loss"] is None for step in steps] == [False, False, True, False, False, False]
    assert [step["grad_norm"] is None for step in steps] == [False, False, True, True, False, False]
    rates = [step["learning_rate"] for step in steps]
    assert rates == pytest.approx([1e-3 * (6 - n) / 6 for n in range(6)]), "the schedule goes on"


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_with_the_last_good_checkpoint(
    tiny, row_cache, poison, tmp_path
):
    output = tmp_path / "run"
    flags = ("--max-train-steps", "9", "--max_bad_steps", "3", "--checkpoint_every", "2")
    cache = ("--cache_dir", str(row_cache))
    hooks = poison({(1, n): "loss" for n in (2, 5, 6, 7)})
    with started(tiny, 2, output, *flags, *cache, hooks=hooks) as run:
        printed = run.finish(1)
    assert [step["step"] for step in bad_steps(output)] == [2, 5, 6, 7]
    good = output / "checkpoints" / "checkpoint_6_12"  # its weights are step 4's
    assert "3 steps in a row had no finite gradient" in printed
    assert f"the last good checkpoint is {good}" in printed
    assert verify_checkpoint(good) == []
    assert metrics(output)[-1]["step"] == 7 and (output / "loss.png").exists()

    # Its cause mended, it continues, and the record of the replayed step is the new one's.
    with started(tiny, 2, output, *flags, *cache, hooks=poison({(0, 2): "gradient"})) as run:
        run.finish(0)
    assert [step["step"] for step in bad_steps(output)] == [2, 5, 6, 8]
    assert [step["step"] for step in metrics(output)] == list(range(1, 10))


@pytest.mark.slow
def test_a_disk_that_refuses_costs_a_checkpoint_not_the_run(tiny, row_cache, poison, tmp_path):
    """No file may grow over the limit: the checkpoints' may not be written, the record may."""
    output = tmp_path / "run"
    folder = tmp_path / "hooks"
    folder.mkdir()
    limit = f"""\
        import os, resource
        if os.environ.get("RANK") == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, {resource.RLIM_INFINITY}))
    """
    (folder / "sitecustomize.py").write_text(textwrap.dedent(limit))
    flags = ("--max-train-steps", "4", "--checkpoint_every", "2")
    cache = ("--cache_dir", str(row_cache))
    with started(tiny, 2, output, *flags, *cache, hooks=folder) as run:
        printed = run.finish(0)
    assert "checkpoint of step 2 not saved" in printed and "File too large" in printed
    assert "Earlier checkpoints are untouched; training goes on" in printed
    assert list((output / "checkpoints").iterdir()) == []
    assert [step["step"] for step in metrics(output)] == [1, 2, 3, 4]
