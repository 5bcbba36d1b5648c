"""Whole runs with LoRA adapters: peft in a plain loop, on every ZeRO stage, and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from runs import ROOT, metrics, same, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROWS, ROW_TOKENS, SEED, RATE, RANK, ALPHA = 4, 64, 5, 1e-2, 4, 6
ALONE = ("--batch-size", str(ROWS))
ULYSSES = ("--parallel_mode", "ulysses_attn", *ALONE)
RING = ("--parallel_mode", "ring_attn", *ALONE)
LEAN = ("--gradient_checkpointing", "full", "--tiled_mlp", "yes")
SMALL_TILES = """
import os
if "RANK" in os.environ:
    from anchor_context.memory import treatments
    treatments.TILE_TOKENS = 20
"""
"""What every process of a run runs first."""


@dataclass(frozen=True)
class Adapters:
    """What trains: as flags, and as peft says it."""

    flags: tuple[str, ...]
    targets: tuple[str, ...]
    whole: tuple[str, ...] = ()


ALL_LINEAR = Adapters(
    flags=(),
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
LONG_LORA = Adapters(
    flags=("--lora_targets", "q_proj,v_proj,down_proj", "--lora_embeddings_and_norms"),
    targets=("q_proj", "v_proj", "down_proj"),
    whole=("embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"),
)


@dataclass(frozen=True)
class Steps:
    """Ten steps of a run."""

    losses: list[float]
    norms: list[float]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Each is one document, and all of them make a step."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    ids = np.random.default_rng(0).integers(2, 512, (ROWS, ROW_TOKENS))
    line = '{{"input_ids": {}, "source": [{{"end": {}}}]}}\n'
    path.write_text("".join(line.format(row, ROW_TOKENS) for row in ids.tolist()))
    return path


@pytest.fixture(scope="module")
def plain(tiny, rows) -> Callable[[Adapters], Steps]:
    """Ten steps of peft, without code of this project or DeepSpeed, all rows in one forward."""

    @cache
    def train(adapters: Adapters) -> Steps:
        torch.manual_seed(SEED)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny.model),
            LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                target_modules=list(adapters.targets),
                modules_to_save=list(adapters.whole) or None,
            ),
        ).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
        ids = torch.tensor([json.loads(line)["input_ids"] for line in rows.open()])
        steps = Steps([], [])
        for _ in range(10):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            steps.norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
            optimizer.step()
            steps.losses.append(loss.item())
        assert steps.losses[-1] < steps.losses[0] - 0.02, "the case is vacuous"
        return steps

    return train


@pytest.fixture(scope="module")
def run(launch, rows, tmp_path_factory):
    """run(processes, adapters, output, *flags, …) -> what `launch` gives: ten steps, a checkpoint at five.

    Layers are recomputed, and MLPs computed in several tiles.
    """
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(SMALL_TILES)

    def launched(processes: int, adapters: Adapters, output: Path, *flags: str, **how):
        return launch(
            processes,
            output,
            *(
                "--dataset",
                str(rows),
                "--data-format",
                "tokenized",
                "--seq-length",
                str(ROW_TOKENS),
            ),
            *("--max-train-steps", "10", "--learning-rate", str(RATE), "--seed", str(SEED)),
            *("--attention_pattern", "full", "--micro_batch_tokens", "100", *LEAN),
            *("--checkpoint_every", "5", "--keep_checkpoints", "9"),
            *("--lora_rank", str(RANK), "--lora_alpha", str(ALPHA), *adapters.flags),
            *flags,
            PYTHONPATH=f"{hook}:{ROOT}",
            **how,
        )

    return launched


@pytest.fixture(scope="module")
def zero3(run, tmp_path_factory) -> Path:
    """On two ranks, each with half of the heads and of every weight."""
    output = tmp_path_factory.mktemp("runs") / "zero3"
    run(2, LONG_LORA, output, *ULYSSES)
    return output


def assert_same_steps(output: Path, plain: Steps, *, first: int = 1) -> None:
    got = metrics(output)
    assert [record["step"] for record in got] == list(range(first, 11))
    for record in got:
        index = record["step"] - 1
        assert record["loss"] == pytest.approx(plain.losses[index], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(plain.norms[index], rel=1e-4)


def assert_merged(output: Path, base: Path, adapters: Adapters) -> None:
    """The saved model is the base bit for bit, but for what the adapter adds, or has in its place."""
    expected = weights(base)
    adapter = {
        name.removeprefix("base_model.model."): weight
        for name, weight in load_file(output / "step-10/adapter/adapter_model.safetensors").items()
    }
    adapted = set()
    for name in [name for name in adapter if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        change = adapter.pop(f"{layer}.lora_B.weight") @ adapter.pop(name)
        assert change.abs().max() > 0.001, "the case is vacuous"
        expected[f"{layer}.weight"] += ALPHA / RANK * change
        adapted.add(layer.rpartition(".")[-1])
    assert adapted == set(adapters.targets)
    assert {name.split(".")[-2] for name in adapter} == set(adapters.whole)
    assert same(weights(output / "step-10"), expected | adapter)


def checkpoint(output: Path, step: int) -> str:
    (found,) = (output / "checkpoints").glob(f"checkpoint_{step}_*")
    return str(found)


def test_ten_steps_are_those_of_peft_in_a_plain_loop(zero3, plain, tiny):
    assert_same_steps(zero3, plain(LONG_LORA))
    assert_merged(zero3, tiny.model, LONG_LORA)
    tokens = torch.arange(60)[None]
    merged = AutoModelForCausalLM.from_pretrained(zero3 / "step-10")
    base = AutoModelForCausalLM.from_pretrained(tiny.model)
    adapted = PeftModel.from_pretrained(base, str(zero3 / "step-10/adapter"))
    assert (merged(tokens).logits - adapted(tokens).logits).abs().max() < 1e-5


def test_a_resumed_run_goes_on_bit_for_bit_and_upon_its_own_weights_alone(
    run, zero3, tiny, tmp_path
):
    """The checkpoint has no weight that is not trained, so another model would go unseen."""
    resumed = (*ULYSSES, "--resume", checkpoint(zero3, 5))
    run(2, LONG_LORA, tmp_path / "run", *resumed)
    keys = ("step", "loss", "grad_norm", "learning_rate")
    undisturbed = [[record[key] for key in keys] for record in metrics(zero3)]
    assert [[record[key] for key in keys] for record in metrics(tmp_path / "run")] == undisturbed[
        5:
    ]
    assert same(weights(tmp_path / "run/step-10"), weights(zero3 / "step-10"))

    other = str(shutil.copytree(tiny.model, tmp_path / "other"))
    changed = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        changed.lm_head.weight[7, 7] += 1e-6
    changed.save_pretrained(other)
    refused = run(
        2, LONG_LORA, tmp_path / "no", *resumed, "--model_name_or_path", other, expect=None
    )
    errors = [line for line in refused.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1 and "were trained on other weights than those of" in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "layout", "adapters"),
    [(1, RING, ALL_LINEAR), (2, ULYSSES, LONG_LORA)],
    ids=["ZeRO-1 ring", "ZeRO-2 Ulysses"],
)
def test_every_stage_gives_the_same_steps_and_goes_on_with_other_ranks(
    run, plain, tiny, stage, layout, adapters, tmp_path
):
    launcher = ("--deepspeed_config_file", f"accelerate_configs/zero{stage}.json")
    run(2, adapters, tmp_path / "run", *layout, launcher=launcher)
    assert_same_steps(tmp_path / "run", plain(adapters))
    assert_merged(tmp_path / "run", tiny.model, adapters)
    resumed = (*ALONE, "--resume", checkpoint(tmp_path / "run", 5))
    run(1, adapters, tmp_path / "resumed", *resumed, launcher=launcher)
    assert_same_steps(tmp_path / "resumed", plain(adapters), first=6)
    assert_merged(tmp_path / "resumed", tiny.model, adapters)


@pytest.mark.slow
def test_zero3_goes_on_with_another_number_of_ranks(run, zero3, plain, tiny, tmp_path):
    run(1, LONG_LORA, tmp_path / "run", *ALONE, "--resume", checkpoint(zero3, 5))
    assert_same_steps(tmp_path / "run", plain(LONG_LORA), first=6)
    assert_merged(tmp_path / "run", tiny.model, LONG_LORA)
