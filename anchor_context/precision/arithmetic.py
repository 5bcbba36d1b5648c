"""RoPE and the scores of attention, with the floating-point type of every step to choose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arithmetic:
    """The floating-point type of each step, in the order of the computation; float64 is exact here."""

    angles: torch.dtype = torch.float64
    """position × frequency, and its cosine and sine"""
    tables: torch.dtype = torch.float64
    """cos and sin as the rotation reads them"""
    rotation: torch.dtype = torch.float64
    """the two products of the rotation"""
    kernel: torch.dtype = torch.float64
    """rotated queries and keys as the attention kernel reads them"""
    score: torch.dtype = torch.float64
    """the score: float32 in a flash kernel, the model's type in transformers' eager attention"""


EXACT = Arithmetic()
STEPS = tuple(field.name for field in fields(Arithmetic))


def model_arithmetic(dtype: torch.dtype) -> Arithmetic:
    """What transformers and a flash kernel do in a model of this type."""
    return Arithmetic(torch.float32, dtype, dtype, dtype, torch.float32)


def float32_rotation(dtype: torch.dtype) -> Arithmetic:
    """What `rotate_in_float32` makes of it: only the rotated queries and keys are rounded to the type."""
    return Arithmetic(torch.float32, torch.float32, torch.float32, dtype, torch.float32)


def eager_arithmetic(dtype: torch.dtype) -> Arithmetic:
    """What transformers' eager attention does: the scores too are of the model's type."""
    return replace(model_arithmetic(dtype), score=dtype)


def each_step(dtype: torch.dtype) -> Iterator[tuple[str, str, Arithmetic]]:
    """(step, "alone" or "up to here", arithmetic) for every step of transformers' eager attention."""
    eager = eager_arithmetic(dtype)
    so_far = EXACT
    for step in STEPS:
        rounded = {step: getattr(eager, step)}
        yield step, "alone", replace(EXACT, **rounded)
        so_far = replace(so_far, **rounded)
        yield step, "up to here", so_far


@dataclass(frozen=True)
class Rope:
    """What a model's rotary table computes from."""

    inv_freq: Tensor
    """(head_dim / 2,) float32"""
    attention_scaling: float

    def tables(self, positions: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
        """cos and sin, each (tokens, head_dim), rounded as told and held in float64."""
        angle = positions.to(arithmetic.angles)[:, None] * self.inv_freq.to(arithmetic.angles)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
        return round_to(cos, arithmetic.tables), round_to(sin, arithmetic.tables)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Rotate x (…, tokens, head_dim) float64, step by step as transformers' `apply_rotary_pos_emb`."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotated = round_to(x * cos, arithmetic.rotation) + round_to(turned * sin, arithmetic.rotation)
    return round_to(rotated, arithmetic.kernel)


def scores(query: Tensor, key: Tensor, *, scale: float, arithmetic: Arithmetic) -> Tensor:
    """(heads, queries, keys) float64 from query (heads, queries, D) and key (keys, D).

    The product is rounded before it is scaled and again after, as transformers' eager attention does.
    """
    if arithmetic.score != torch.float64:  # every kernel accumulates in float32
        query, key = query.float(), key.float()
    return round_to(round_to(query @ key.T, arithmetic.score) * scale, arithmetic.score)


def attention(
    query: Tensor,
    key: Tensor,
    *,
    positions: Tensor,
    queries: Tensor,
    visible: Tensor,
    rope: Rope,
    scale: float,
    arithmetic: Arithmetic,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and weights, each (heads, queries, S), and the rotated keys (S, head_dim), all float64.

    Args:
        query: (heads, queries, head_dim) float64 of one key/value head's queries, not rotated.
        key: (S, head_dim) float64, not rotated.
        positions: (S,) int64. queries: (queries,) int64, their indices in the row.
        visible: (queries, S) bool.
    """
    cos, sin = rope.tables(positions, arithmetic)
    rotated_key = rotate(key, cos, sin, arithmetic)
    rotated = rotate(query, cos[queries], sin[queries], arithmetic)
    logits = scores(rotated, rotated_key, scale=scale, arithmetic=arithmetic)
    return logits, logits.masked_fill(~visible, -math.inf).softmax(dim=-1), rotated_key


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).double()
