"""FlashAttention-2, the package flash-attn (2.7 or newer). See `kernel.py` for shapes."""

from __future__ import annotations

import torch

from anchor_context.attention.kernels.kernel import (
    Kernel,
    always_deterministic,
    caps_scores,
    flash_2_reason,
    version_reason,
    window_sides,
)


def unavailable(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    reason = flash_2_reason(device, dtype, head_dim) or version_reason("flash-attn", "2.7")
    if reason is not None:
        return reason
    try:
        import flash_attn.flash_attn_interface  # noqa: F401
    except ImportError as error:  # built for another torch, for instance
        return f"flash-attn is installed but does not load ({error})"
    return None


def forward(q, k, v, spans, *, causal, scale, window, softcap=None):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(
        q,
        k,
        v,
        spans.cu_seqlens_q,
        spans.cu_seqlens_k,
        spans.max_seqlen_q,
        spans.max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        softcap=softcap or 0.0,
        **window_sides(causal, window),
    )
    return out, lse


def backward(
    dout, q, k, v, out, lse, spans, *, causal, scale, window, softcap=None, deterministic=False
):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        spans.cu_seqlens_q,
        spans.cu_seqlens_k,
        spans.max_seqlen_q,
        spans.max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        softcap=softcap or 0.0,
        alibi_slopes=None,
        deterministic=deterministic,
        **window_sides(causal, window),
    )
    return dq, dk, dv


KERNEL = Kernel(
    name="flash_attn",
    forward=forward,
    backward=backward,
    unavailable=unavailable,
    not_deterministic=always_deterministic,
    no_softcap=caps_scores,
)
