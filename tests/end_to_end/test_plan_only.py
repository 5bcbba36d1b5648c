"""`--plan_only`: in one process and without weights it prints what a run on several ranks then prints."""

from __future__ import annotations

import re
import shutil

import pytest

DATA_PARALLEL = ("--batch_size", "2", "--micro_batch_tokens", "100", "--eval_documents", "3")
RING = ("--parallel_mode", "ring_attn", "--micro_batch_tokens", "row", "--batch_size", "2")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(DATA_PARALLEL, id="data parallel"),
        pytest.param(RING, id="ring, whole rows", marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_what_the_run_prints(flags, launch, tiny, tmp_path):
    weightless = tmp_path / "weightless"
    shutil.copytree(tiny.model, weightless)
    (weightless / "model.safetensors").unlink()
    flags += ("--max-train-steps", "1", "--memory_gib", "1", "--cache_dir", str(tmp_path / "rows"))
    never = tmp_path / "never"

    planned = lines_of(
        launch(
            1,
            never,
            *flags,
            *("--model_name_or_path", str(weightless), "--plan_only", "--plan_ranks", "2"),
        )
    )
    assert not never.exists()
    ran = lines_of(launch(2, tmp_path / "run", *flags))

    first = next(i for i, line in enumerate(planned) if line.startswith("model "))
    *plan, hours = planned[first:]
    assert "--plan_gpu" in hours  # the CPU has no data sheet
    subjects = {line.split()[0] for line in plan if not line.startswith(" ")}
    told = {"model", "engine", "memory", "pattern", "data", "steps", "work"}
    assert subjects == told | ({"ring"} if "ring_attn" in flags else {"valid"})
    for line in plan:
        assert line.replace(str(weightless), str(tiny.model)) in ran


def lines_of(finished) -> list[str]:
    """What was printed, without the progress bar that shares its lines."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", finished.stdout) if line.strip()]
