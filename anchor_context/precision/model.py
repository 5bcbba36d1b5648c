"""The model in the laboratory: its frequencies, scales, queries and keys, and whether it can be measured.

Guarantees: a model whose attention is not the one of `arithmetic.py` is refused (`check_attention`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anchor_context.integrations.calls import layer_windows, softcap_of
from anchor_context.precision.arithmetic import Rope, attention, eager_arithmetic
from anchor_context.precision.arrangement import arrange
from anchor_context.rope.float32 import rotary_tables, rotating_layers, wrap_rotation


@torch.no_grad()
def visit_layers(
    model: PreTrainedModel,
    input_ids: Tensor,
    visit: Callable[[int, Tensor, Tensor], None],
    *,
    queries: Tensor,
) -> None:
    """Run the base model on input_ids (1, S) and call `visit(layer, query, key)` on every layer's
    unrotated queries (heads, queries, head_dim) and keys (key/value heads, S, head_dim)."""
    layers = itertools.count()

    def record(rotate: Callable) -> Callable:
        layer = next(layers)

        def rotate_and_visit(query: Tensor, key: Tensor, *args, **kwargs):
            visit(layer, query[0][:, queries], key[0])
            return rotate(query, key, *args, **kwargs)

        return rotate_and_visit

    undo = wrap_rotation(model, record)
    try:
        model(input_ids, use_cache=False)
    finally:
        undo()


def rope_of(model: PreTrainedModel) -> Rope:
    """The frequencies of a model, float32 as transformers computes them.

    Raises:
        ValueError: they depend on the row's length, or on the kind of layer.
    """
    table = rotary_tables(model)[0]
    if not hasattr(table, "inv_freq"):
        raise _unlike(model, "each kind of layers has RoPE frequencies of its own")
    if table.rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"{table.rope_type} RoPE has other frequencies at other lengths, so a shift changes it by "
            "intent; measure the model with rope_type default, linear, yarn or llama3"
        )
    return Rope(table.inv_freq, table.attention_scaling)


@dataclass(frozen=True)
class Scoring:
    """How one attention layer scores: `measure_layer`'s `scale` and `window`."""

    scale: float
    window: int | None


def scoring_of(model: PreTrainedModel) -> list[Scoring]:
    """Of every attention layer, in order.

    Raises:
        ValueError: layers that do not rotate, do not say how they scale, or score otherwise.
    """
    config, layers = model.config, rotating_layers(model)
    windows = layer_windows(config)
    if len(layers) != len(windows):
        raise _unlike(model, f"only {len(layers)} of {len(windows)} layers rotate")
    if softcap_of(config) is not None:
        raise _unlike(model, "it caps its scores (attn_logit_softcapping)")
    if any(hasattr(layer, "sinks") for layer in layers):
        raise _unlike(model, "its attention has sinks")
    if not all(hasattr(layer, "scaling") for layer in layers):
        raise _unlike(model, "its layers do not say how they scale")
    return [Scoring(layer.scaling, window) for layer, window in zip(layers, windows, strict=True)]


CHECKED_ROW, CHECKED_WINDOW = 48, 16
"""Tokens of the row on which a model's attention is checked, and of a sliding window there."""
AGREEMENT = 0.02
"""Of two weights, which lie in [0, 1]: above bfloat16's rounding, far below another attention."""


@torch.no_grad()
def check_attention(model: PreTrainedModel) -> None:
    """Raise `ValueError` unless this model's attention is the one that is measured here.

    In one forward of a short row, every layer gets queries and keys drawn at random, so that its
    weights are far from even whatever the model's weights; transformers' eager attention must give
    the weights that we compute.
    """
    drawn, generator = [], torch.Generator().manual_seed(0)

    def draw(rotate: Callable) -> Callable:
        def rotate_drawn(query: Tensor, key: Tensor, *args, **kwargs):
            query, key = (torch.randn(x.shape, generator=generator).to(x) for x in (query, key))
            drawn.append((query[0], key[0]))
            return rotate(query, key, *args, **kwargs)

        return rotate_drawn

    config = model.config
    own_window, own_attention = getattr(config, "sliding_window", None), config._attn_implementation
    undo = wrap_rotation(model, draw)
    try:
        model.set_attn_implementation("eager")
        if own_window:
            config.sliding_window = CHECKED_WINDOW  # masks are made from it
        rope, scoring = rope_of(model), scoring_of(model)
        ids = torch.arange(CHECKED_ROW, device=model.device)[None] % config.vocab_size
        theirs = model(ids, use_cache=False, output_attentions=True).attentions or ()
    finally:
        undo()
        model.set_attn_implementation(own_attention)
        if own_window:
            config.sliding_window = own_window
    if not len(drawn) == len(theirs) == len(scoring):
        raise _unlike(model, f"only {len(drawn)} of {len(scoring)} layers rotate")
    for number, (layer, weights) in enumerate(zip(drawn, theirs, strict=True)):
        ours = _eager_weights(*layer, rope=rope, scoring=scoring[number], dtype=model.dtype)
        if ours.shape != weights[0].shape:
            raise _unlike(model, f"layer {number} rotates a part of its heads")
        error = (ours - weights[0]).abs().max().item()
        if not error < AGREEMENT:
            raise _unlike(model, f"the weights of layer {number} differ by {error:.2g}")


def _eager_weights(
    query: Tensor, key: Tensor, *, rope: Rope, scoring: Scoring, dtype: torch.dtype
) -> Tensor:
    """(heads, S, S) float64 from query (heads, S, D), key (key/value heads, S, D), not rotated; empty
    where the rotation does not fit them."""
    positions, per_head = torch.arange(key.shape[1], device=key.device), len(query) // len(key)
    if query.shape[1:] != key.shape[1:] or query.shape[2] != 2 * len(rope.inv_freq) or not per_head:
        return query.new_empty(0)
    everything = arrange("full", len(positions), 1, positions.device)
    _, visible = everything.seen(positions, scoring.window)
    weights = [
        attention(
            query[head].double()[None],
            key[head // per_head].double(),
            positions=positions,
            queries=positions,
            visible=visible,
            rope=rope,
            scale=scoring.scale,
            arithmetic=eager_arithmetic(dtype),
        )[1]
        for head in range(per_head * len(key))
    ]
    return torch.cat(weights)


def _unlike(model: PreTrainedModel, how: str) -> ValueError:
    return ValueError(
        f"{model.config.model_type}: its attention is not what the precision laboratory computes ({how}):"
        " in every layer all heads rotated whole and by halves, one set of frequencies, scores scaled, "
        "causal, at most a sliding window; measure LLaMA, Mistral, Qwen2, Qwen3 or another such model"
    )
