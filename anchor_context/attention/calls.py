"""What a call of a library's attention function needs on its way to an engine.

Both ways into other people's models, `models.py` and the linked library files, come through here, so
that they compute and refuse the same. Imports torch alone: transformers loads it on its own way in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anchor_context.layout import DocumentLayout

NOT_COMPUTED = ("softcap", "s_aux", "position_bias")
"""Arguments of transformers' attention functions that change the scores: a cap, sinks, a bias."""


def attend_call(
    attend: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: DocumentLayout,
    settings: Mapping[str, Any],
    *,
    remedy: str,
) -> Tensor:
    """The engine's answer to a call of transformers' attention function.

    Args:
        query: (B, H, S, D). key: (B, Hkv, S, D). value: (B, Hkv, S, Dv), Dv at most D.
        module: the attention layer; its configuration tells a window that the call does not.
        settings: the call's further arguments by name; `scaling`, `sliding_window`, `dropout` and
            `NOT_COMPUTED` are read.
        remedy: what the user can do about a setting that is refused, for the message.

    Returns:
        (B, S, H, Dv), contiguous.

    Raises:
        ValueError: attention dropout, or an argument of `NOT_COMPUTED`.
    """
    refused = [name for name in NOT_COMPUTED if settings.get(name) is not None]
    refused += ["attention dropout"] * bool(settings.get("dropout"))
    if refused:
        raise ValueError(
            f"{type(module).__name__} asks for {', '.join(refused)}, which the engines do not "
            f"compute; {remedy}"
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary embeddings leave q and k in float32 there
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = settings.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    value_size, short = value.shape[-1], query.shape[-1] - value.shape[-1]
    if short > 0:  # multi-head latent attention: kernels want values as long as keys
        value = nn.functional.pad(value, (0, short))
    window = window_of_call(module, settings)
    out = attend(query, key, value, layout, scale=scale, sliding_window=window)
    return out.transpose(1, 2)[..., :value_size].contiguous()


def window_of_call(module: nn.Module, settings: Mapping[str, Any]) -> int | None:
    """Tokens that a query sees of its piece, itself included; None if all.

    Most families hand their layer's window on with the call. The others (some mixtures of experts) tell it
    to transformers' mask alone, which is not made here, so their configuration is asked.
    """
    config = getattr(module, "config", None)
    if "sliding_window" in settings or config is None:
        return settings.get("sliding_window")
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[module.layer_idx] != "sliding_attention":
        return None
    return sliding_window_of(config)


def sliding_window_of(config) -> int | None:
    """Tokens that layers of a transformers model see; None if all. Qwen carries one that it does not use."""
    used = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if used else None
