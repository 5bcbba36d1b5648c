"""The flash engine: every pattern as variable-length causal attention, one kernel call per layer.

With an anchor at the start of every document, AnchorAttention *is* causal attention inside documents
(see `patterns.py`), so no mask exists at all: the kernel reads document boundaries.
Costs: the pattern's own pairs, no memory beyond the output and its log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anchor_context.attention.kernels import Kernel, Spans
from anchor_context.attention.patterns import attended_boundaries
from anchor_context.layout import DocumentLayout


class VarlenAttention(torch.autograd.Function):
    """Causal attention inside consecutive spans, by one kernel's forward and backward."""

    @staticmethod
    def forward(ctx, q, k, v, spans: Spans, kernel: Kernel, scale: float, window: int | None):
        out, lse = kernel.forward(q, k, v, spans, causal=True, scale=scale, window=window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.spans, ctx.scale, ctx.window = kernel, spans, scale, window
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        gradients = ctx.kernel.backward(
            dout, q, k, v, out, lse, ctx.spans, causal=True, scale=ctx.scale, window=ctx.window
        )
        return *gradients, None, None, None, None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout,
    *,
    scale: float,
    sliding_window: int | None = None,
    kernel: Kernel,
) -> Tensor:
    """Attention by the layout's pattern through a FlashAttention kernel.

    Args:
        q: (B, H, S, D). k, v: (B, Hkv, S, D), Hkv dividing H, kept grouped.

    Returns:
        (B, H, S, D).

    Raises:
        ValueError: a shared anchor, or a sliding window that this kernel or pattern cannot honour.
    """
    cu_seqlens, longest = attended_boundaries(layout)
    window = effective_window(
        sliding_window, pattern=layout.pattern, longest=longest, kernel=kernel
    )
    out = VarlenAttention.apply(
        flatten_rows(q),
        flatten_rows(k),
        flatten_rows(v),
        Spans(cu_seqlens, cu_seqlens, longest, longest),
        kernel,
        scale,
        window,
    )
    return out.unflatten(0, (layout.batch_size, -1)).transpose(1, 2)


def flatten_rows(x: Tensor) -> Tensor:
    """(B, H, S, D) -> (B·S, H, D): the kernels' packed form. A view for transformers' projections."""
    return x.transpose(1, 2).flatten(0, 1)


def effective_window(
    sliding_window: int | None, *, pattern: str, longest: int, kernel: Kernel
) -> int | None:
    """The window to hand to the kernel; None where it hides nothing.

    Args:
        longest: tokens that the pattern attends to as one piece: the longest document, or a row of `full`.

    Raises:
        ValueError: the window would hide something and cannot be honoured.
    """
    if sliding_window is None or sliding_window >= longest:
        return None
    remedy = (
        "use --attn_engine flex, or set the model's config.sliding_window to null "
        f"(a document here has {longest} tokens)"
    )
    if pattern == "anchor":
        raise ValueError(
            f"the model's sliding_window={sliding_window} would hide the anchor from tokens further "
            f"than that into a document, and the flash engine cannot except it: {remedy}"
        )
    if not kernel.honours_window:
        raise ValueError(
            f"the kernel {kernel.name} cannot honour the model's sliding_window={sliding_window}: "
            f"{remedy}"
        )
    return sliding_window
