"""FlashAttention-3 for Hopper, where somebody built it (flash-attention's folder `hopper`; no wheel exists).

Its module is `flash_attn_interface` or `flash_attn_3.flash_attn_interface`. See `kernel.py` for shapes.
"""

from __future__ import annotations

import inspect
from types import ModuleType

import torch

from anchor_context.attention.kernels.kernel import (
    Kernel,
    caps_scores,
    cuda_reason,
    head_dim_reason,
    window_sides,
)


def _interface() -> ModuleType:
    try:
        import flash_attn_interface as interface
    except ModuleNotFoundError:
        import flash_attn_3.flash_attn_interface as interface
    return interface


def unavailable(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    if reason := cuda_reason(device, dtype):
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"is for Hopper, compute capability 9.x, not {major}.{minor}"
    try:
        interface = _interface()
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("flash_attn"):
            return (
                "FlashAttention-3 is not installed (its source is flash-attention's folder hopper)"
            )
        return f"FlashAttention-3 is installed but does not load ({error})"
    except ImportError as error:
        return f"FlashAttention-3 is installed but does not load ({error})"
    # A custom operator shows no parameters of its own; the plain functions of early builds do.
    takes = inspect.signature(interface._flash_attn_backward).parameters.values()
    if not any(p.name == "is_causal" or p.kind is p.VAR_KEYWORD for p in takes):
        return (
            "this build of FlashAttention-3 is an early one, whose functions take other arguments"
        )
    return head_dim_reason(head_dim)


def not_deterministic(device: torch.device, head_dim: int | None) -> str | None:
    if head_dim is not None and head_dim > 192:
        return (
            f"has no deterministic backward for heads of more than 192, and these have {head_dim}"
        )
    return None


def forward(q, k, v, spans, *, causal, scale, window, softcap=None):
    out, lse, *_ = _interface()._flash_attn_forward(
        q,
        k,
        v,
        cu_seqlens_q=spans.cu_seqlens_q,
        cu_seqlens_k=spans.cu_seqlens_k,
        max_seqlen_q=spans.max_seqlen_q,
        max_seqlen_k=spans.max_seqlen_k,
        softmax_scale=scale,
        causal=causal,
        softcap=softcap or 0.0,
        num_splits=1,
        **window_sides(causal, window),
    )
    return out, lse


def backward(
    dout, q, k, v, out, lse, spans, *, causal, scale, window, softcap=None, deterministic=False
):
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _interface()._flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q=spans.cu_seqlens_q,
        cu_seqlens_k=spans.cu_seqlens_k,
        max_seqlen_q=spans.max_seqlen_q,
        max_seqlen_k=spans.max_seqlen_k,
        dq=dq,
        dk=dk,
        dv=dv,
        softmax_scale=scale,
        is_causal=causal,
        softcap=softcap or 0.0,
        deterministic=deterministic,
        **window_sides(causal, window),
    )
    return dq, dk, dv


KERNEL = Kernel(
    name="flash_attn_3",
    forward=forward,
    backward=backward,
    unavailable=unavailable,
    not_deterministic=not_deterministic,
    no_softcap=caps_scores,
)
