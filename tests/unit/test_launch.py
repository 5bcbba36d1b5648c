"""What starts a run: launch configs, and a launcher whose exit code tells a scheduler what to do.

(Whole runs: tests/end_to_end/test_signals.py.)
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers.integrations import HfDeepSpeedConfig

from anchor_context.launch import exit_code, plan_in_one_process

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("first_failure", "asked", "code"),
    [
        (75, [15], 75),  # saved, after a signal to all
        (75, [], 75),  # the ranks alone were signalled
        (-15, [15], 75),  # asked before the first step: nothing to save
        (-2, [15], 75),  # a scheduler's SIGINT to the rank itself came first
        (-15, [], 143),  # somebody else's signal
        (143, [15, 15], 143),  # a second one, in the middle of a step
        (-9, [15], 137),  # out of memory, or of patience
        (2, [], 2),
        (1, [15], 1),
    ],
)
def test_a_ranks_code_becomes_the_launchers(first_failure, asked, code):
    assert exit_code(first_failure, asked) == code


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_launch_config_parses_and_names_a_deepspeed_file(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type == "DEEPSPEED"
    deepspeed = config.deepspeed_config
    assert deepspeed["zero3_init_flag"], "every rank would load the whole model"
    settings = json.loads((ROOT / deepspeed["deepspeed_config_file"]).read_text())
    assert HfDeepSpeedConfig(settings).is_zero3()
    assert config.num_processes % config.num_machines == 0


def test_there_is_a_launch_config_for_every_kind_of_machine():
    processes = {path.stem: load_config_from_file(str(path)).num_processes for path in CONFIGS}
    assert processes == {
        "cpu": 2,
        "single_gpu": 1,
        "single_node_4gpu": 4,
        "single_node": 8,
        "two_node": 16,
    }


TWO_NODES = "--config_file accelerate_configs/two_node.yaml --machine_rank 1"


@pytest.mark.parametrize(
    ("words", "processes", "flags"),
    [
        (f"{TWO_NODES} train.py --plan_only", 1, "--plan_only --plan_ranks 16"),
        (f"{TWO_NODES} --num_processes 4 train.py --plan-only", 1, "--plan-only --plan_ranks 4"),
        (f"{TWO_NODES} train.py --plan-ranks=2 --plan_only", 1, "--plan-ranks=2 --plan_only"),
        ("train.py --plan_only", 1, "--plan_only"),  # as many as launched: who knows
        (f"{TWO_NODES} train.py --seed 1", None, "--seed 1"),
    ],
)
def test_a_plan_takes_one_process_which_is_told_of_all(words, processes, flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = launch_command_parser().parse_args(words.split())
    plan_in_one_process(settings)
    machines = (settings.num_machines, settings.machine_rank)
    assert (settings.num_processes, settings.training_script_args) == (processes, flags.split())
    assert machines == ((1, 0) if processes else (None, 1))
