"""A checkpoint goes on in its own precision, under its own stage, with the model that it is of."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from anchor_context.integrations.adapters import Lora, adapter_origin
from anchor_context.run.origin import (
    changed_flags,
    check_same_base,
    check_same_training,
    training_origin,
)

LORA = Lora(rank=8, alpha=16.0, targets=None, embeddings_and_norms=False)


def origin(name="model", *, precision="bf16", stage=3, lora: Lora | None = None, **changes) -> dict:
    """As a checkpoint gives it back, of a small model."""
    config = LlamaConfig(**{"hidden_size": 64, "num_attention_heads": 4} | changes)
    made = training_origin(
        name,
        config,
        mixed_precision=precision,
        zero_stage=stage,
        adapter=adapter_origin(lora),
    )
    return json.loads(json.dumps(made))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "no"}, "--mixed_precision is no here and was bf16"),
        ({"stage": 1}, "ZeRO's stage is 1 here and was 3"),
        ({"num_hidden_layers": 4}, "the model's num_hidden_layers is 4 here and was 32"),
        ({"vocab_size": 99}, "the model's vocab_size is 99 here and was 32000"),
        ({"rms_norm_eps": 1e-5}, "the model's rms_norm_eps is 1e-05 here and was 1e-06"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "the model's rope_parameters rope_theta is 500000.0 here and was 10000.0",
        ),
    ],
)
def test_what_differs_is_refused_by_name(changes, says):
    with pytest.raises(
        ValueError, match="--resume: .*another training: .*--output-dir$"
    ) as refused:
        check_same_training(origin(**changes), origin())
    assert f": {says}. " in str(refused.value)


@pytest.mark.parametrize(
    ("here", "there", "says"),
    [
        (replace(LORA, rank=4), LORA, "--lora_rank is 4 here and was 8"),
        (replace(LORA, alpha=8.0), LORA, "--lora_alpha is 8.0 here and was 16.0"),
        (
            replace(LORA, targets=("q_proj",)),
            LORA,
            "--lora_targets is q_proj here and was all-linear",
        ),
        (
            replace(LORA, embeddings_and_norms=True),
            LORA,
            "--lora_embeddings_and_norms is True here and was False",
        ),
        (None, LORA, "--lora_rank is 0 here and was 8"),
        (LORA, None, "--lora_rank is 8 here and was 0"),
    ],
)
def test_other_adapters_are_refused_by_name(here, there, says):
    with pytest.raises(ValueError, match="another training") as refused:
        check_same_training(origin(lora=here), origin(lora=there))
    assert f": {says}. " in str(refused.value)
    assert check_same_training(origin(lora=here), origin(lora=here)) == []


def test_a_checkpoint_of_before_there_were_adapters_has_none():
    before = origin()
    del before["--lora_rank"]
    assert check_same_training(origin(), before) == []
    with pytest.raises(ValueError, match="--lora_rank is 8 here and was 0"):
        check_same_training(origin(lora=LORA), before)


def test_adapters_go_on_upon_their_own_weights():
    check_same_base(3, 3, name="model")
    with pytest.raises(
        ValueError, match="--resume: .* than those of model: .*--model_name_or_path"
    ):
        check_same_base(3, 4, name="model")


def test_what_changes_no_output_does_not_count():
    changed = {"max_position_embeddings": 9, "use_cache": False, "pad_token_id": 0}
    assert check_same_training(origin(**changed), origin()) == []


def test_what_another_version_of_transformers_brings_does_not_count():
    newer = origin()
    newer["the model's"]["brought_later"] = True
    newer["the model's"]["rope_parameters"]["attention_factor"] = 1.0
    assert check_same_training(newer, origin()) == check_same_training(origin(), newer) == []


def test_the_same_model_of_another_name_is_named():
    (line,) = check_same_training(origin("here/model"), origin("there/model"))
    assert "began as there/model, not as here/model" in line


def test_a_flag_that_was_forgotten_at_the_resume_is_told():
    there = json.loads(json.dumps({"learning_rate": 1e-3, "weight_decay": 0.1, "gone": 1}))
    here = {"learning_rate": 2e-5, "weight_decay": 0.1, "came_later": True}
    assert changed_flags(here, there) == [
        "resumed with other flags: --learning_rate 2e-05 (was 0.001)"
    ]
    assert changed_flags(there, there) == changed_flags(here, {}) == []
