"""Whatever the launcher and the environment say: the flags' losses, under every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import metrics

ACCELERATE_CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_accumulation_steps: 1
  gradient_clipping: 0.001
  zero3_init_flag: true
  zero3_save_16bit_model: false
  zero_stage: 3
mixed_precision: bf16
num_machines: 1
num_processes: 2
use_cpu: false
"""
"""What `accelerate config` writes, with answers other than the flags'."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """26 rows: of the eight of a step the last one has two, so that rank 1 has none in its micro-batches."""
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    text = "".join(f"{n} squared is {n * n}, and its cube is {n**3}.\n" for n in range(90))
    path.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text[:900]}) + "\n")
    return path


@pytest.fixture(scope="module")
def flags(corpus) -> tuple[str, ...]:
    return (
        *("--dataset", str(corpus), "--seq-length", "128", "--batch-size", "2"),
        *("--gradient-accumulate-every", "2", "--max_grad_norm", "0.5"),
    )


@pytest.fixture(scope="module")
def undisturbed(launch, flags, tmp_path_factory) -> list[dict]:
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    launch(2, output, *flags)
    return metrics(output)


def test_the_case_has_a_blank_rank_and_clips(undisturbed):
    assert len(undisturbed) == 4 and undisturbed[-1]["target_tokens"] < 2 * 128
    assert all(step["grad_norm"] > 0.5 for step in undisturbed)


def test_the_flags_win_over_yaml_and_environment(undisturbed, launch, flags, tmp_path):
    config = tmp_path / "accelerate.yaml"
    config.write_text(ACCELERATE_CONFIG)
    left_over = {"ACCELERATE_FP8_BACKEND": "TE", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    launcher = ("--config_file", str(config))
    finished = launch(2, tmp_path / "run", *flags, launcher=launcher, **left_over)
    assert finished.stdout.count(" is not used: ") == 6, finished.stdout
    for key in ("loss", "grad_norm"):
        got, expected = (
            [step[key] for step in run] for run in (metrics(tmp_path / "run"), undisturbed)
        )
        assert got == expected, "bit for bit"


@pytest.mark.parametrize("stage", [1, 2])
def test_every_stage_trains_alike(stage, undisturbed, launch, flags, tmp_path):
    launcher = ("--deepspeed_config_file", f"accelerate_configs/zero{stage}.json")
    launch(2, tmp_path / "run", *flags, launcher=launcher)
    for key in ("loss", "grad_norm"):
        got, expected = (
            [step[key] for step in run] for run in (metrics(tmp_path / "run"), undisturbed)
        )
        assert got == pytest.approx(expected, rel=1e-5)
