"""RoPE settings from flags, on a transformers configuration.

Guarantees: what no flag names stays as the model has it. `--rope-theta` changes the base alone,
`--rope_scaling_type` and `--rope_scaling_factor` the stretching alone, and the companions that a type
needs come from the model's own values. `max_position_embeddings` follows the row length, so that the
saved model knows its context, and nothing else follows `max_position_embeddings`. Where kinds of layers have
settings of their own (Gemma 3, OLMo 3), flags change those of the layers that see everything: a window hides
from the others what lies further than they were trained for.
"""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FULL = "full_attention"
"""The kind of layers that see everything, in transformers' words."""
SCALING_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""LLaMA-3.1's own settings, used where a model that has none is given the type llama3."""

KEPT_BY_EVERY_TYPE = ("rope_theta", "partial_rotary_factor")
"""What describes the rotation itself; everything else in the dictionary belongs to one type."""


def rope_settings(config: PretrainedConfig) -> dict[str | None, dict]:
    """The RoPE settings of a language model's `config`, to be read and changed in place.

    `{None: settings}`, or settings for each kind of layer (Gemma 3, OLMo 3); empty where positions are no
    RoPE (GPT-2).
    """
    settings = getattr(config, "rope_parameters", None) or {}
    if isinstance(settings.get("rope_type"), str):
        return {None: settings}
    return {kind: own for kind, own in settings.items() if isinstance(own, dict)}


def apply_rope_settings(
    config: PretrainedConfig,
    *,
    row_length: int,
    rope_theta: float | None = None,
    rope_scaling_type: str | None = None,
    rope_scaling_factor: float | None = None,
    model_max_position_embeddings: int | None = None,
) -> list[str]:
    """Change `config.rope_parameters` and `config.max_position_embeddings` in place.

    Args:
        config: of a language model not built yet: the rotary frequencies are computed from it when it is. A
            `config.json` in the older form (`rope_theta`, `rope_scaling`) is read into the same fields.
        row_length: tokens per row; the model's maximum is raised to it where it is smaller.
        rope_theta: the base of the frequencies.
        rope_scaling_type: one of `SCALING_TYPES`; the original length that yarn and llama3 stretch is
            the model's own.
        rope_scaling_factor: how far the type stretches; "default" stretches nothing and ignores it.
        model_max_position_embeddings: the maximum to record, at least the row length. For "dynamic",
            transformers takes this number as the length beyond which it stretches, so there it
            stays the model's own unless given, and may be less than the row length.

    Returns:
        What the flags leave as it was, in words.

    Raises:
        ValueError: a flag's value that cannot be used, or a model that it cannot be used on.
    """
    if rope_theta is not None and not rope_theta > 1:
        raise ValueError(f"--rope-theta {rope_theta} must be greater than 1, for example 500000")
    if rope_scaling_type not in (None, *SCALING_TYPES):
        raise ValueError(
            f"--rope_scaling_type {rope_scaling_type} is unknown; choose from {list(SCALING_TYPES)}"
        )
    if rope_scaling_factor is not None and not rope_scaling_factor >= 1:
        raise ValueError(f"--rope_scaling_factor {rope_scaling_factor} must be at least 1")

    settings, own_length, notes = rope_settings(config), config.max_position_embeddings, []
    if (rope_theta, rope_scaling_type, rope_scaling_factor) != (None, None, None):
        kind = None if None in settings else FULL
        if kind not in settings:
            where = " in layers that see everything" if settings else ""
            raise ValueError(
                f"{config.model_type} has no RoPE{where}, which "
                "--rope-theta, --rope_scaling_type and --rope_scaling_factor would change: leave them out"
            )
        before = settings[kind]
        original = before.get("original_max_position_embeddings", own_length)
        rope = _stretched(
            dict(before),
            rope_type=rope_scaling_type,
            factor=rope_scaling_factor,
            own_length=original,
            row_length=row_length,
        )
        if rope_theta is not None:
            rope["rope_theta"] = float(rope_theta)
        if rope["rope_type"] == "dynamic" and before["rope_type"] != "dynamic":
            own_length = original
        config.rope_parameters = rope if kind is None else config.rope_parameters | {kind: rope}
        others = sorted(set(settings) - {kind})
        notes = [f"{kind} as the flags say; {', '.join(others)} as the model has it"] * bool(others)

    types = {rope["rope_type"] for rope in rope_settings(config).values()}
    maximum = model_max_position_embeddings or own_length
    if "dynamic" not in types:
        if maximum < row_length and model_max_position_embeddings is not None:
            raise ValueError(
                f"--model_max_position_embeddings {model_max_position_embeddings} is less than "
                f"--seq-length {row_length}; raise it or leave it out"
            )
        maximum = max(maximum, row_length)
    if not types and maximum > own_length:
        raise ValueError(
            f"{config.model_type} has no RoPE, its positions end at {own_length}: a --seq-length (or "
            f"--model_max_position_embeddings) of {maximum} needs another model"
        )
    if maximum != config.max_position_embeddings or rope_scaling_factor is not None:
        _state_what_the_maximum_implies(config)
    config.max_position_embeddings = maximum
    return notes


def _state_what_the_maximum_implies(config: PretrainedConfig) -> None:
    """Write into the settings what transformers would else take from `max_position_embeddings` once it is
    raised: the attention factor of longrope, the factor of a yarn that has none."""
    for kind, rope in rope_settings(config).items():
        if rope["rope_type"] == "yarn" and rope.get("factor") is None:
            own_length = rope["original_max_position_embeddings"]
            rope["factor"] = config.max_position_embeddings / own_length
        if rope["rope_type"] == "longrope" and rope.get("attention_factor") is None:
            computed = ROPE_INIT_FUNCTIONS["longrope"](config, layer_type=kind)
            rope["attention_factor"] = float(computed[1])


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
        # The demo's own flags are `--rope_scaling_type default --rope_scaling_factor 16`.
        return rope
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
