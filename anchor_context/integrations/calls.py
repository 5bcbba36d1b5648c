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

NOT_COMPUTED = ("position_bias",)
"""Arguments of transformers' attention functions that change the scores in a way that no engine computes."""


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
        settings: the call's further arguments by name; `scaling`, `sliding_window`, `softcap`, `s_aux` (the
            sinks, (H,)), `dropout` and `NOT_COMPUTED` are read.
        remedy: what the user can do about a setting that is refused, for the message.

    Returns:
        (B, S, H, Dv), contiguous.

    Raises:
        ValueError: attention dropout, an argument of `NOT_COMPUTED`, or what `attend` cannot compute.
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
    out = attend(
        query,
        key,
        value,
        layout,
        scale=scale,
        sliding_window=window_of_call(module, settings),
        softcap=settings.get("softcap"),
        sinks=settings.get("s_aux"),
    )
    return out.transpose(1, 2)[..., :value_size].contiguous()


def is_causal_call(module: nn.Module, settings: Mapping[str, Any]) -> bool:
    """Whether no token sees a later one, as transformers tells its own attention functions."""
    causal = settings.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


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


def softcap_of(config) -> float | None:
    """The cap of a transformers model's scores, softcap · tanh(score / softcap); None if they have none."""
    return getattr(config, "attn_logit_softcapping", None)


def layer_windows(config) -> tuple[int | None, ...]:
    """The window of every layer of a transformers model; None where a layer sees everything."""
    window, kinds = sliding_window_of(config), getattr(config, "layer_types", None)
    if not kinds:
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def sliding_window_of(config) -> int | None:
    """Tokens that layers of a transformers model see; None if all see all. Qwen carries a window that it does
    not use, and so does a model whose layers are all of another kind."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    used = getattr(config, "use_sliding_window", True) and "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if used else None
