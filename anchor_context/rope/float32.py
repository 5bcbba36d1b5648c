"""Rotate queries and keys in float32 and round once: `--rope_precision float32`.

A bfloat16 model of transformers rounds cos and sin to bfloat16, then both products and their sum. Here
the table stays float32, the rotation is computed in float32, and only its result is rounded to the
model's type, which the attention kernel takes.

Guarantees: one model instance changes, no other model and no module of transformers. Weights, saved
models and the float32 result are the same as without it.
Costs: two float32 copies of queries and keys while a layer rotates them, none kept for the backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ROTATION = "apply_rotary_pos_emb"
"""The name under which every modeling file of transformers keeps its rotation."""


def rotate_in_float32(model: PreTrainedModel) -> Callable[[], None]:
    """Make `model` rotate in float32 and round once; a float32 model computes what it did before.

    Only the way from a layer's projections to its attention changes, so it goes with every attention
    implementation, key/value cache and gradient checkpointing.

    Returns:
        A function without arguments that undoes it.

    Raises:
        ValueError: the model's attention does not rotate through transformers' `apply_rotary_pos_emb`.
    """
    restore_rotation = wrap_rotation(model, _rounded_once)
    hooks = [
        table.register_forward_pre_hook(_ask_for_float32, with_kwargs=True)
        for table in rotary_tables(model)
    ]

    def undo() -> None:
        restore_rotation()
        for hook in hooks:
            hook.remove()

    return undo


def wrap_rotation(
    model: PreTrainedModel, wrap: Callable[[Callable], Callable]
) -> Callable[[], None]:
    """Give every attention layer of this one `model`, in order, `wrap(rotate)` for its rotation.

    `rotate(query, key, cos, sin) -> (query, key)` is transformers' function. The layer keeps its own
    forward; only the global name that this forward reads is another one.

    Returns:
        A function without arguments that undoes it.

    Raises:
        ValueError: no layer calls `apply_rotary_pos_emb`.
    """
    layers = rotating_layers(model)
    if not layers or not rotary_tables(model):
        raise ValueError(
            f"cannot reach the rotation of {type(model).__name__} (--rope_precision float32 and the "
            "precision laboratory need it): they are for models whose attention calls "
            "apply_rotary_pos_emb, as LLaMA, Mistral, Qwen2 and Qwen3"
        )
    for layer in layers:
        forward = inspect.unwrap(type(layer).forward)
        own = FunctionType(
            forward.__code__,
            {**forward.__globals__, ROTATION: wrap(forward.__globals__[ROTATION])},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        own.__kwdefaults__ = forward.__kwdefaults__
        layer.forward = MethodType(own, layer)

    def undo() -> None:
        for layer in layers:
            del layer.forward

    return undo


def rotating_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The attention layers that rotate through `apply_rotary_pos_emb`, in order."""
    return [module for module in model.modules() if _rotates(module)]


def rotary_tables(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that compute cos and sin. One may hold frequencies for each kind of layer (Gemma 3)."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "inv_freq")
        or any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]


def _rotates(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return inspect.isfunction(forward) and ROTATION in forward.__code__.co_names


def _ask_for_float32(table: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The table takes its type from the hidden states, of which it reads nothing else but the device."""
    hidden = args[0] if args else kwargs.pop("x")
    return (torch.empty(0, dtype=torch.float32, device=hidden.device), *args[1:]), kwargs


def _rounded_once(rotate: Callable) -> Callable:
    def rotate_and_round(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs):
        # cos and sin are float32, so PyTorch's type promotion computes the products and the sum in it.
        rotated_query, rotated_key = rotate(query, key, cos, sin, *args, **kwargs)
        return rotated_query.to(query.dtype), rotated_key.to(key.dtype)

    return rotate_and_round
