"""What a run's weights are of: its model, precision and ZeRO stage, recorded with every checkpoint.

A checkpoint brings its own weights and optimiser states. Under another configuration they would be another
function, or fit into no tensor; in another precision the losses would take another course. Both are said
before the model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from transformers import PretrainedConfig

NOT_COMPUTED = {
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "auto_map",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "id2label",
    "label2id",
    "problem_type",
}
"""Entries of a model's configuration that change no output of it."""


NO_ADAPTER = {"--lora_rank": 0}
"""What checkpoints of before there were adapters do not say."""


def training_origin(
    name: str,
    config: PretrainedConfig,
    *,
    mixed_precision: str,
    zero_stage: int,
    adapter: dict[str, object] = NO_ADAPTER,
) -> dict[str, object]:
    """As JSON holds it, for `check_same_training`.

    Args:
        name: the model's, as the user gave it.
        config: the model's, with the RoPE settings that the flags ask for.
        adapter: the flags that say what is trained instead of all weights.
    """
    model = {key: value for key, value in config.to_dict().items() if key not in NOT_COMPUTED}
    return {
        "--model_name_or_path": name,
        "--mixed_precision": mixed_precision,
        "ZeRO's stage": zero_stage,
        **adapter,
        "the model's": json.loads(json.dumps(model, default=str)),
    }


def check_same_training(here: dict[str, object], there: dict[str, object]) -> list[str]:
    """Of two `training_origin`s: the run's, and its checkpoint's.

    Returns:
        Lines to print: what is another name for what may well be the same, as a folder that has moved.

    Raises:
        ValueError: they differ in precision, stage, or what the model computes. What only one of them has
            does not count: another version of transformers may have brought it.
    """
    name = "--model_name_or_path"
    different = [
        f"{what} is {ours} here and was {theirs}"
        for what, ours, theirs in _differences(here, NO_ADAPTER | there)
        if what != name
    ]
    if different:
        raise ValueError(
            f"--resume: the checkpoint is of another training: {'; '.join(different)}. Resume with what it "
            f"was saved with, or train a saved model ({name} …/step-N) in another --output-dir"
        )
    if here[name] == there[name]:
        return []
    return [f"the weights are the checkpoint's, which began as {there[name]}, not as {here[name]}"]


def changed_flags(here: dict[str, object], there: dict[str, object]) -> list[str]:
    """A line to print where flags that steer the training have other values than the checkpoint's run had.

    Nothing forbids that, but a flag that was forgotten is at its default. What only one of them has does not
    count: another version of this project brought it.
    """
    changed = [
        f"--{name} {here[name]} (was {there[name]})"
        for name in here
        if name in there and json.loads(json.dumps(here[name])) != there[name]
    ]
    return [f"resumed with other flags: {', '.join(changed)}"] * bool(changed)


def check_same_base(here: int, there: int | None, *, name: str) -> None:
    """Raise `ValueError` where the weights that adapters belong to are not those of the checkpoint's run.

    Args:
        here, there: checksums of the weights that are not trained, which no checkpoint holds.
        name: of the model that was loaded.
    """
    if here != there:
        raise ValueError(
            f"--resume: the adapters in the checkpoint were trained on other weights than those of {name}: "
            "name the model that they were trained on (--model_name_or_path)"
        )


def _differences(here: dict, there: dict, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """(path, ours, theirs) of every entry that both have, with other values."""
    for key in here.keys() & there.keys():
        ours, theirs = here[key], there[key]
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differences(ours, theirs, f"{prefix}{key} ")
        elif ours != theirs:
            yield f"{prefix}{key}", ours, theirs
