"""The recipes: their flags exist and go together, their numbers say where they are from, and what they expect
is what the plan says.

In the place of `python` stands a script that writes down what a recipe would have started.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

import train
from anchor_context.launch import plan_in_one_process
from anchor_context.run.deepspeed_settings import FILE_VARIABLE
from examples.recipes import expectations

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples/recipes").glob("*.sh"))
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


@pytest.fixture
def launch_of(tmp_path):
    """launch_of(recipe, *flags, **environment) -> the launch that it would start."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    path = {"PATH": f"{python.parent}:{os.environ['PATH']}"}

    def launch(recipe: Path, *flags: str, **environment: str):
        environment = os.environ | path | environment
        asked = subprocess.run(
            ["bash", str(recipe), *flags], env=environment, check=True, stdout=subprocess.PIPE
        )
        module, launcher, *words = asked.stdout.decode().splitlines()
        assert (module, launcher) == ("-m", "anchor_context.launch")
        return launch_command_parser().parse_args(words)

    return launch


def as_launched(monkeypatch, *, processes: int) -> None:
    """The environment of the first rank."""
    for name, value in {"WORLD_SIZE": processes, "RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


@each_recipe
def test_a_recipe_passes_the_checks(recipe, launch_of, monkeypatch):
    settings = launch_of(recipe, "--seed", "3", DATASET="data/*.jsonl")
    assert settings.training_script == "train.py"
    flags = train.parse_flags(settings.training_script_args)
    train.check_flags(flags)
    assert flags.seed == 3  # what stands behind a recipe is handed on
    config = load_config_from_file(str(ROOT / settings.config_file))
    as_launched(monkeypatch, processes=config.num_processes)
    grid = train.plan_grid(flags)
    assert flags.seq_length % grid.sequence_degree == 0


@pytest.mark.parametrize("name", ["llama31_8b_512k", "prolong_8b_512k_two_nodes"])
def test_the_rate_of_prolong_s_recipes_falls_to_its_minimum(name, launch_of):
    recipe = ROOT / f"examples/recipes/{name}.sh"
    flags = train.parse_flags(launch_of(recipe, DATASET="d").training_script_args)
    steps = flags.max_train_steps
    factors = [
        train.learning_rate_factor(flags, step, max_steps=steps) for step in (steps // 10, steps)
    ]
    assert factors == [1.0, pytest.approx(0.1)]


@each_recipe
def test_every_number_says_where_it_is_from(recipe):
    _, _, flags = recipe.read_text().partition("FLAGS=(\n")
    lines = [line.strip() for line in flags.partition("\n)\n")[0].splitlines()]
    numbers = [line for line in lines if re.search(r" \d", line.partition("#")[0])]
    assert numbers and [line for line in numbers if "#" not in line] == []


def test_every_recipe_says_what_to_expect():
    assert [recipe.stem for recipe in RECIPES] == sorted(expectations.STAND_INS)
    for recipe in RECIPES:
        text = recipe.read_text()
        expected = text.partition(expectations.START)[2].partition(expectations.END)[0]
        told = {line.split()[1] for line in expected.splitlines()[1:] if not line.startswith("#  ")}
        assert {"engine", "memory", "steps", "work", "hours"} <= told


@pytest.mark.slow
@each_recipe
@pytest.mark.skipif(torch.cuda.is_available(), reason="the recipes plan for a GPU elsewhere")
def test_the_plan_says_what_the_recipe_says(recipe, launch_of, tmp_path, capsys, monkeypatch):
    def run_here(recipe: Path, *flags: str, **environment: str) -> str:
        settings = launch_of(recipe, *flags, **environment)
        plan_in_one_process(settings)
        deepspeed = load_config_from_file(str(ROOT / settings.config_file)).deepspeed_config
        as_launched(monkeypatch, processes=1)
        monkeypatch.setenv(FILE_VARIABLE, deepspeed["deepspeed_config_file"])
        capsys.readouterr()
        train.main(train.parse_flags(settings.training_script_args))
        return capsys.readouterr().out

    text = recipe.read_text()
    lines = expectations.plan(recipe.stem, tmp_path, run=run_here)
    assert expectations.with_expectation(text, lines) == text
