"""RoPE settings from flags, on a transformers configuration.

Guarantees: what no flag names stays as the model has it. Upstream replaced the whole dictionary and
always overwrote the base; here `--rope-theta` changes the base alone, `--rope_scaling_type` the type.
`max_position_embeddings` follows the row length, so that the saved model knows its context.
"""

from __future__ import annotations

from transformers import PretrainedConfig

SCALING_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""LLaMA-3.1's own settings, used where a model that has none is given the type llama3."""


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
        row_length: tokens per row; the model's maximum is raised to it where it is smaller.
        rope_theta: the base of the frequencies.
        rope_scaling_type: one of `SCALING_TYPES`; the original length that yarn and llama3 stretch is
            the model's own.
        rope_scaling_factor: how far the type stretches; "default" stretches nothing and ignores it.
        model_max_position_embeddings: the maximum to record, at least the row length.

    Raises:
        ValueError: a flag's value that cannot be used.
    """
    rope = dict(config.rope_parameters)
    if "rope_type" not in rope:
        raise ValueError(
            f"{config.model_type} has RoPE settings per kind of layer, which the flags --rope-theta and "
            "--rope_scaling_type cannot change; edit its config.json"
        )
    if rope_theta is not None:
        if rope_theta <= 1:
            raise ValueError(
                f"--rope-theta {rope_theta} must be greater than 1, for example 500000"
            )
        rope["rope_theta"] = float(rope_theta)

    if rope_scaling_type not in (None, *SCALING_TYPES):
        raise ValueError(
            f"--rope_scaling_type {rope_scaling_type} is unknown; choose from {list(SCALING_TYPES)}"
        )
    if rope_scaling_factor is not None and rope_scaling_factor < 1:
        raise ValueError(f"--rope_scaling_factor {rope_scaling_factor} must be at least 1")
    own_length = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    if rope_scaling_type == "default":
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    elif rope_scaling_type is not None:
        same_type = rope["rope_type"] == rope_scaling_type
        factor = rope_scaling_factor or (rope.get("factor") if same_type else None)
        if factor is None:
            raise ValueError(
                f"--rope_scaling_type {rope_scaling_type} needs --rope_scaling_factor, for example "
                f"{max(2, row_length // own_length)}"
            )
        if not same_type:
            rope = {"rope_type": rope_scaling_type, "rope_theta": rope["rope_theta"]}
        rope["factor"] = float(factor)
        if rope_scaling_type in ("yarn", "llama3"):
            rope["original_max_position_embeddings"] = own_length
        if rope_scaling_type == "llama3":
            rope = LLAMA3_BANDS | rope
    elif rope_scaling_factor is not None:
        if rope["rope_type"] == "default":
            raise ValueError(
                f"--rope_scaling_factor {rope_scaling_factor} needs --rope_scaling_type: "
                "the model scales nothing by itself"
            )
        rope["factor"] = float(rope_scaling_factor)
    config.rope_parameters = rope

    if model_max_position_embeddings is not None and model_max_position_embeddings < row_length:
        raise ValueError(
            f"--model_max_position_embeddings {model_max_position_embeddings} is less than "
            f"--seq-length {row_length}"
        )
    config.max_position_embeddings = model_max_position_embeddings or max(
        config.max_position_embeddings, row_length
    )
