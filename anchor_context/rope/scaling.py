"""RoPE settings from flags, on a transformers configuration.

Guarantees: what no flag names stays as the model has it. `--rope-theta` changes the base alone,
`--rope_scaling_type` and `--rope_scaling_factor` the stretching alone, and the companions that a type
needs come from the model's own values. `max_position_embeddings` follows the row length, so that the
saved model knows its context.
"""

from __future__ import annotations

from transformers import PretrainedConfig

SCALING_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""LLaMA-3.1's own settings, used where a model that has none is given the type llama3."""

KEPT_BY_EVERY_TYPE = ("rope_theta", "partial_rotary_factor")
"""What describes the rotation itself; everything else in the dictionary belongs to one type."""


def apply_rope_settings(
    config: PretrainedConfig,
    *,
    row_length: int,
    rope_theta: float | None = None,
    rope_scaling_type: str | None = None,
    rope_scaling_factor: float | None = None,
    model_max_position_embeddings: int | None = None,
) -> None:
    """Change `config.rope_parameters` and `config.max_position_embeddings` in place.

    Args:
        config: of a model not built yet: the rotary frequencies are computed from it when it is. A
            `config.json` in the older form (`rope_theta`, `rope_scaling`) is read into the same fields.
        row_length: tokens per row; the model's maximum is raised to it where it is smaller.
        rope_theta: the base of the frequencies.
        rope_scaling_type: one of `SCALING_TYPES`; the original length that yarn and llama3 stretch is
            the model's own.
        rope_scaling_factor: how far the type stretches; "default" stretches nothing and ignores it.
        model_max_position_embeddings: the maximum to record, at least the row length. For "dynamic",
            transformers takes this number as the length beyond which it stretches, so there it
            stays the model's own unless given, and may be less than the row length.

    Raises:
        ValueError: a flag's value that cannot be used.
    """
    if not isinstance(config.rope_parameters.get("rope_type"), str):
        raise ValueError(
            f"{config.model_type} has RoPE settings per kind of layer, which the flags --rope-theta and "
            "--rope_scaling_type cannot change; edit its config.json"
        )
    if rope_theta is not None and not rope_theta > 1:
        raise ValueError(f"--rope-theta {rope_theta} must be greater than 1, for example 500000")
    if rope_scaling_type not in (None, *SCALING_TYPES):
        raise ValueError(
            f"--rope_scaling_type {rope_scaling_type} is unknown; choose from {list(SCALING_TYPES)}"
        )
    if rope_scaling_factor is not None and not rope_scaling_factor >= 1:
        raise ValueError(f"--rope_scaling_factor {rope_scaling_factor} must be at least 1")

    own_length = config.rope_parameters.get(
        "original_max_position_embeddings", config.max_position_embeddings
    )
    rope = _stretched(
        dict(config.rope_parameters),
        rope_type=rope_scaling_type,
        factor=rope_scaling_factor,
        own_length=own_length,
        row_length=row_length,
    )
    if rope_theta is not None:
        rope["rope_theta"] = float(rope_theta)
    config.rope_parameters = rope

    if rope["rope_type"] == "dynamic":
        config.max_position_embeddings = model_max_position_embeddings or own_length
        return
    if model_max_position_embeddings is not None and model_max_position_embeddings < row_length:
        raise ValueError(
            f"--model_max_position_embeddings {model_max_position_embeddings} is less than "
            f"--seq-length {row_length}; raise it or leave it out"
        )
    config.max_position_embeddings = model_max_position_embeddings or max(
        config.max_position_embeddings, row_length
    )


def _stretched(
    rope: dict, *, rope_type: str | None, factor: float | None, own_length: int, row_length: int
) -> dict:
    """The model's settings `rope` with the type and the factor that the flags name."""
    if rope_type is None and factor is None:
        return rope
    if rope_type not in (None, rope["rope_type"]):
        rope = {key: rope[key] for key in KEPT_BY_EVERY_TYPE if key in rope}
        rope["rope_type"] = rope_type
    if rope_type == "default":
        return (
            rope  # the demo's own flags are `--rope_scaling_type default --rope_scaling_factor 16`
        )
    if rope["rope_type"] == "default":
        raise ValueError(
            f"--rope_scaling_factor {factor} needs --rope_scaling_type: the model stretches nothing by "
            f"itself; choose from {list(SCALING_TYPES)}"
        )
    if factor is not None:
        rope["factor"] = float(factor)
    if "factor" not in rope:
        raise ValueError(
            f"--rope_scaling_type {rope_type} needs --rope_scaling_factor, for example "
            f"{max(2, -(-row_length // own_length))}"
        )
    if rope["rope_type"] in ("yarn", "llama3"):
        rope.setdefault("original_max_position_embeddings", own_length)
    if rope["rope_type"] == "llama3":
        rope = LLAMA3_BANDS | rope
    return rope
