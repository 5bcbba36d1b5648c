"""A step without a finite loss or gradient changes nothing, on any rank; many in a row end the run."""

from __future__ import annotations

import json
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
from runs import metrics, same, started, weights

from anchor_context.run.checkpoint import verify_checkpoint

HOOK = """\
    import os
    if os.environ.get("RANK") == "1":  # its clock stands still; for train.py alone, others wait by it
        import sys, time
        monotonic = time.monotonic
        time.monotonic = lambda: (
            0.0 if sys._getframe(1).f_globals["__name__"] == "__main__" else monotonic()
        )
    if "RANK" in os.environ:
        from anchor_context.loss import CausalLMWithLoss
        init, forward, calls = CausalLMWithLoss.__init__, CausalLMWithLoss.forward, []
        parameters = []

        def remembered(self, *args):
            init(self, *args)
            parameters.extend(self.parameters())  # asked for in a forward, ZeRO-3 would gather them

        def poisoned(self, *args, **kwargs):
            calls.append(1)
            shards = [p.ds_tensor.double().sum().item() for p in parameters]
            with open(__file__ + os.environ["RANK"], "a") as stream:
                stream.write(repr(shards) + "\\n")  # before every forward
            loss, count = forward(self, *args, **kwargs)
            kind = {bad}.get((int(os.environ["RANK"]), len(calls)))
            if kind == "loss":  # its gradient is finite
                loss = loss + float("inf")
            if kind == "gradient":
                loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss, count

        CausalLMWithLoss.__init__, CausalLMWithLoss.forward = remembered, poisoned
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
    every_few_microseconds = ("--save_per_hours", "1e-9")
    cache = ("--cache_dir", str(row_cache))
    flags = (*flags, *schedule, *every_few_microseconds, *cache)
    with started(tiny, 2, output, *flags, hooks=hooks) as run:
        printed = run.finish(0)
    assert {path.name for path in (output / "checkpoints").iterdir()} == {
        "checkpoint_2_8",
        "checkpoint_5_20",
        "checkpoint_6_24",
    }, (
        "every step took longer by the main rank's clock, none is saved of a bad one, two are kept beside "
        "the one that no step has shown to be good"
    )
    bad = bad_steps(output)
    assert [step["step"] for step in bad] == [3, 4]
    rows = [row for step in bad for row in step["rows"]]
    assert len(set(rows)) == 8, "the rows of both ranks and both micro-batches"
    assert "step 3 skipped" in printed and "step 4 skipped" in printed

    # The weights lie in shards on both ranks: each rank's stay, and what is saved has moved.
    for rank in (0, 1):
        shards = (hooks / f"sitecustomize.py{rank}").read_text().splitlines()[::2]
        moved = [before != after for before, after in pairwise(shards)]
        assert moved == [True, True, False, False, True]
    assert not any((output / f"step-{step}").exists() for step in (3, 4)), "in a bad series"
    models = [weights(output / f"step-{step}") for step in (1, 2, 5, 6)]
    assert not any(same(*pair) for pair in pairwise(models))
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
    flags = ("--max-train-steps", "9", "--max_bad_steps", "3", "--checkpoint_every", "1")
    cache = ("--cache_dir", str(row_cache))
    hooks = poison({(1, n): "loss" for n in (2, 5, 6, 7)})
    with started(tiny, 2, output, *flags, *cache, hooks=hooks) as run:
        printed = run.finish(1)
    assert [step["step"] for step in bad_steps(output)] == [2, 5, 6, 7]
    good = output / "checkpoints" / "checkpoint_3_6"
    in_doubt = output / "checkpoints" / "checkpoint_4_8"  # only bad steps have followed it
    assert "3 steps in a row had no finite gradient" in printed
    assert f"the last good checkpoint is {good}" in printed
    assert verify_checkpoint(good) == [] and verify_checkpoint(in_doubt) == []
    assert metrics(output)[-1]["step"] == 7 and (output / "loss.png").exists()

    # Its cause mended, it continues, and the record of the replayed step is the new one's. The checkpoint
    # that was due at the bad one comes with the next.
    flags += ("--checkpoint_every", "5")
    with started(tiny, 2, output, *flags, *cache, hooks=poison({(0, 2): "gradient"})) as run:
        printed = run.finish(0)
    assert verify_checkpoint(output / "checkpoints" / "checkpoint_6_12") == []
    assert f"resumed  {good}: 3 steps" in printed
    assert [step["step"] for step in bad_steps(output)] == [2, 5]
    assert [step["step"] for step in metrics(output)] == list(range(1, 10))


FULL_DISK = """\
    import os, resource
    if "RANK" in os.environ:
        from anchor_context.loss import CausalLMWithLoss
        from anchor_context.run.metrics import MetricsFile
        append, forward, calls = MetricsFile.append, CausalLMWithLoss.forward, []
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

        def four_full_steps(self, *args, **kwargs):
            calls.append(1)
            full = (20_000, unlimited[1]) if len(calls) <= 4 else unlimited
            resource.setrlimit(resource.RLIMIT_FSIZE, full)
            return forward(self, *args, **kwargs)

        def append_much(self, record):
            append(self, record | {"filler": "x" * 8_000})

        CausalLMWithLoss.forward, MetricsFile.append = four_full_steps, append_much
"""


@pytest.mark.slow
def test_a_disk_that_refuses_costs_a_checkpoint_not_the_run(tiny, row_cache, tmp_path):
    """For four steps no file may grow over a limit, on any rank. The log stays below it; checkpoints and
    models do not, nor does the record, whose third line is cut off."""
    output = tmp_path / "run"
    folder = tmp_path / "hooks"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(FULL_DISK))
    flags = ("--max-train-steps", "6", "--checkpoint_every", "2", "--saving_interval", "2")
    cache = ("--cache_dir", str(row_cache))
    with started(tiny, 2, output, *flags, *cache, hooks=folder) as run:
        printed = run.finish(0)
    for step in (2, 4):
        assert f"checkpoint of step {step} not saved" in printed
        assert f"the model of step-{step} was not saved: [Errno 27] File too large" in printed
    assert "Earlier checkpoints are untouched; training goes on" in printed
    assert printed.count("metrics.jsonl not written: File too large") == 1
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["checkpoint_6_12"]
    names = {path.name for path in output.iterdir()}
    assert {name for name in names if "step-" in name} == {"step-6"}, "nothing half is left"
    assert [step["step"] for step in metrics(output)] == list(range(1, 7))
