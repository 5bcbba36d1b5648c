"""Asked to stop, a run finishes its step, saves, and says so by its exit code; a rank that dies ends all."""

from __future__ import annotations

import re
import signal
import textwrap
from itertools import pairwise

import psutil
import pytest
from runs import metrics, same, started, weights

A_MINUTE = 60
ENDLESS = ("--max-train-steps", "100000")


@pytest.fixture
def cache(row_cache) -> tuple[str, str]:
    return "--cache_dir", str(row_cache)


def test_sigterm_to_everyone_saves_and_the_next_start_continues(tiny, cache, tmp_path):
    """As Slurm does it: launcher, ranks and data workers all get the signal."""
    output = tmp_path / "run"
    with started(tiny, 2, output, *ENDLESS, *cache) as run:
        run.until(lambda: run.steps() >= 3)
        everyone = psutil.Process(run.launcher.pid).children(recursive=True)
        assert len(everyone) >= 4, "two ranks and two data workers"
        for process in [psutil.Process(run.launcher.pid), *everyone]:
            process.send_signal(signal.SIGTERM)
        printed = run.finish(75, seconds=A_MINUTE)
    assert "SIGTERM: finishing the step, then saving a checkpoint" in printed
    assert "stopped; --resume auto continues" in printed
    (checkpoint,) = (output / "checkpoints").iterdir()
    done = int(checkpoint.name.split("_")[1])
    assert [record["step"] for record in metrics(output)] == list(range(1, done + 1))

    with started(tiny, 2, output, "--max-train-steps", str(done + 2), *cache) as run:
        printed = run.finish(0)
    assert f"{checkpoint}: {done} steps" in printed
    steps = metrics(output)
    assert [record["step"] for record in steps] == list(range(1, done + 3))
    for before, after in pairwise(steps):  # no row was left out or taken twice
        assert after["tokens_seen"] > before["tokens_seen"]


def test_one_signal_to_the_launcher_before_the_first_step_is_try_again(tiny, tmp_path):
    with started(tiny, 2, tmp_path / "run", *ENDLESS, "--cache_dir", str(tmp_path / "rows")) as run:
        run.until(lambda: len(psutil.Process(run.launcher.pid).children()) == 2)
        run.launcher.send_signal(signal.SIGINT)
        run.finish(75, seconds=A_MINUTE)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_killed_rank_ends_all_within_a_minute(tiny, cache, tmp_path):
    with started(tiny, 2, tmp_path / "run", *ENDLESS, *cache) as run:
        run.until(lambda: run.steps() >= 2)
        everyone = psutil.Process(run.launcher.pid).children(recursive=True)
        run.ranks()[1].kill()
        code = run.launcher.wait(A_MINUTE)
        # The other may notice first that its neighbour is gone.
        assert code in (1, 128 + signal.SIGKILL), run.printed()
        assert "Signal 9 (SIGKILL)" in run.printed()
        _, alive = psutil.wait_procs(everyone, timeout=10)
        assert not alive


def test_a_rank_that_raises_ends_all_with_its_traceback_first(tiny, cache, tmp_path):
    hook = """\
        import os
        if os.environ.get("RANK") == "1":
            from anchor_context.loss import CausalLMWithLoss
            forward, calls = CausalLMWithLoss.forward, []

            def failing(self, *args, **kwargs):
                calls.append(1)
                if len(calls) == 3:
                    raise ValueError("the third step's trouble")
                return forward(self, *args, **kwargs)

            CausalLMWithLoss.forward = failing
    """
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(textwrap.dedent(hook))
    with started(tiny, 2, tmp_path / "run", *ENDLESS, *cache, hooks=tmp_path / "hooks") as run:
        everyone = []

        def gone() -> bool:
            if run.steps() >= 1:
                everyone[:] = everyone or psutil.Process(run.launcher.pid).children(recursive=True)
            return "Traceback" in run.printed()

        run.until(gone)
        code = run.launcher.wait(A_MINUTE)
        printed = run.printed()
        assert code == 1, printed
        first = printed[printed.index("Traceback") :]
        errors = [line for line in first.splitlines() if "Error: " in line]
        assert errors[0].endswith("ValueError: the third step's trouble"), printed
        _, alive = psutil.wait_procs(everyone, timeout=10)
        assert not alive


@pytest.mark.slow  # four runs
def test_a_killed_launcher_and_a_closed_terminal_change_nothing_of_what_is_learnt(
    tiny, cache, tmp_path
):
    flags = ("--max-train-steps", "60", "--checkpoint_every", "2", *cache)
    with started(tiny, 2, tmp_path / "undisturbed", *flags) as run:
        run.finish(0)

    output = tmp_path / "run"
    with started(tiny, 2, output, *flags) as run:
        run.until(lambda: run.steps() >= 5)
        everyone = psutil.Process(run.launcher.pid).children(recursive=True)
        run.launcher.kill()
        _, alive = psutil.wait_procs(everyone, timeout=A_MINUTE)
        assert len(everyone) >= 4 and not alive
    with started(tiny, 2, output, *flags) as run:
        before = run.steps()
        run.until(lambda: run.steps() >= before + 3)
        launcher = psutil.Process(run.launcher.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.send_signal(signal.SIGHUP)
        # The launcher, told first, may be faster with its SIGTERM than this test with the ranks' SIGHUP.
        assert re.search("SIG(HUP|TERM): finishing the step", run.finish(75, seconds=A_MINUTE))
    with started(tiny, 2, output, *flags) as run:
        run.finish(0)

    names = ("step", "loss", "grad_norm", "tokens_seen")
    there, here = (
        [[record[name] for name in names] for record in metrics(folder)]
        for folder in (tmp_path / "undisturbed", output)
    )
    assert here == there
    assert same(*(weights(folder / "step-60") for folder in (tmp_path / "undisturbed", output)))
