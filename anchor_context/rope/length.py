"""RoPE frequencies that depend on a length, fixed by the row length for the run and the saved model.

Two types of transformers take their frequencies from the largest position of a call: "dynamic" stretches
beyond the model's own length, "longrope" has one set of factors up to it and another beyond. A rank that
holds half a row, a micro-batch of short documents, positions that restart: each would rotate a token
differently. Here the configuration is rewritten before the model is built, so that every call up to the row
length computes what transformers computes in a call of exactly that length. With an own length of 4,096, in
rows of 16,384:

    dynamic, theta 10,000, factor 2      ->  default, theta 10,000 · (2 · 4 − 1) ^ (D / (D − 2))
    longrope, short and long factors     ->  longrope, the long factors in both places

Guarantees: the saved model has the frequencies that were trained, at every length up to the row's, in any
library. Rows within the model's own length change nothing, so it keeps what it knows of longer ones.
Costs: nothing. The type "default" waits for no device, where "dynamic" does in every forward.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from anchor_context.rope.scaling import rope_settings


def depends_on_calls(config: PretrainedConfig) -> bool:
    """Whether a model of this `config` takes its frequencies from the positions of a call."""
    return any(
        rope["rope_type"] == "dynamic"
        or (rope["rope_type"] == "longrope" and rope["short_factor"] != rope["long_factor"])
        for rope in rope_settings(config).values()
    )


def fix_frequencies(config: PretrainedConfig, *, row_length: int) -> list[str]:
    """Rewrite the RoPE settings of `config` that depend on a call's length, in place.

    Args:
        config: of a language model not built yet, after `apply_rope_settings` where flags change it.
        row_length: tokens per row; no position that training sees is as large.

    Returns:
        What was changed, in words.
    """
    own_length, changes = config.max_position_embeddings, []
    for rope in rope_settings(config).values():
        if rope["rope_type"] == "dynamic" and row_length > own_length:
            theta = _dynamic_theta(rope, config, length=row_length, own_length=own_length)
            changes.append(f"dynamic, theta {rope['rope_theta']:,.0f} -> {theta:,.0f}")
            rope |= {"rope_type": "default", "rope_theta": theta}
            del rope["factor"]
            config.max_position_embeddings = row_length
        elif rope["rope_type"] == "longrope" and (
            row_length > rope["original_max_position_embeddings"]
        ):
            changes.append("longrope, by its long factors")
            rope["short_factor"] = rope["long_factor"]
            if "long_mscale" in rope:  # PhiMoE: what cos and sin are multiplied by
                rope["short_mscale"] = rope["long_mscale"]
    return [f"{change}, in calls of any length" for change in changes]


def _dynamic_theta(rope: dict, config: PretrainedConfig, *, length: int, own_length: int) -> float:
    """The base that transformers' type "dynamic" takes in a call of `length` tokens."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head * rope.get("partial_rotary_factor", 1.0))
    stretch = rope["factor"] * length / own_length - (rope["factor"] - 1)
    return rope["rope_theta"] * stretch ** (rotated / (rotated - 2))
