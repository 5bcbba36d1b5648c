"""The flash engine: every pattern as variable-length causal attention, one kernel call per layer.

With an anchor at the start of every document, AnchorAttention *is* causal attention inside documents
(see `patterns.py`), so no mask exists at all: the kernel reads document boundaries.
Costs: the pattern's own pairs, no memory beyond the output and its log-sum-exp.

A sliding window is the kernel's. It hides the anchor from the tokens that stand further than that into a
document. The pattern keeps it visible, so a second call attends to each document's anchor alone, and is
merged in for those tokens (`merge.py`). Costs: that call, of one key, and outputs and dq of both at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anchor_context.attention.kernels import Kernel, Spans
from anchor_context.attention.kernels.merge import merge, wide
from anchor_context.attention.kernels.sinks import add_sinks, gradient_of_sinks
from anchor_context.attention.patterns import PATTERNS, attended_boundaries, effective_window
from anchor_context.layout import DocumentLayout


@dataclass(frozen=True, eq=False)
class HiddenAnchors:
    """The anchors of all documents, each one more key for those tokens from which the window hides it."""

    anchors: Tensor
    """(documents,) int64: the token that is each document's anchor."""
    spans: Spans
    """All tokens of a document against its anchor: to take only those that need it, the host would have to
    wait for the device."""
    visible: Tensor
    """(T,) bool: the tokens that see their anchor through the window, and shall not count it twice."""


def hidden_anchors(layout: DocumentLayout, *, window: int) -> HiddenAnchors:
    """Of a layout with an anchor at the start of each document, and with documents longer than `window`."""
    boundaries, ids = layout.cu_seqlens, layout.document_ids.flatten()
    starts = boundaries[:-1].long()
    anchor = starts[ids.long()]  # of each token
    index = torch.arange(len(ids), device=ids.device)
    one_key_each = torch.arange(len(boundaries), dtype=torch.int32, device=ids.device)
    spans = Spans(boundaries, one_key_each, layout.max_seqlen, 1)
    return HiddenAnchors(anchor[starts], spans, visible=index - anchor < window)


class VarlenAttention(torch.autograd.Function):
    """Causal attention inside consecutive spans, by one kernel's forward and backward."""

    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        sinks,
        spans: Spans,
        kernel: Kernel,
        scale: float,
        window: int | None,
        hidden: HiddenAnchors | None,
    ):
        out, lse = kernel.forward(q, k, v, spans, causal=True, scale=scale, window=window)
        if hidden is not None:
            at = hidden.anchors
            anchor_out, anchor_lse = kernel.forward(
                q, k[at], v[at], hidden.spans, causal=False, scale=scale, window=None
            )
            anchor_lse = anchor_lse.masked_fill(hidden.visible, -torch.inf)
            out = out.to(wide(q.dtype))
            out, lse = merge(out, lse, anchor_out, anchor_lse)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.kernel, ctx.spans, ctx.hidden = kernel, spans, hidden
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, sinks, out, lse = ctx.saved_tensors
        kernel, scale, hidden = ctx.kernel, ctx.scale, ctx.hidden
        dsinks = None if sinks is None else gradient_of_sinks(dout, out, lse, sinks)
        dq, dk, dv = kernel.backward(
            dout, q, k, v, out, lse, ctx.spans, causal=True, scale=scale, window=ctx.window
        )
        if hidden is not None:
            at = hidden.anchors
            # Where dout is 0, so is every gradient: the tokens that see the anchor have theirs already.
            dout = dout.masked_fill(hidden.visible[:, None, None], 0)
            dq_part, dk_part, dv_part = kernel.backward(
                dout,
                q,
                k[at],
                v[at],
                out,
                lse,
                hidden.spans,
                causal=False,
                scale=scale,
                window=None,
            )
            dq += dq_part
            dk.index_add_(0, at, dk_part)
            dv.index_add_(0, at, dv_part)
        return dq, dk, dv, dsinks, None, None, None, None, None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: Kernel,
) -> Tensor:
    """Attention by the layout's pattern through a FlashAttention kernel.

    Args:
        q: (B, H, S, D). k, v: (B, Hkv, S, D), Hkv dividing H, kept grouped.
        sliding_window: tokens that a query sees, itself included, the anchor not counted where it is further.
        softcap: the scores are `softcap · tanh(score / softcap)`; None for the scores as they are.
        sinks: (H,) a logit per head that takes part in the softmax without a value; None for none.

    Returns:
        (B, H, S, D).

    Raises:
        ValueError: a shared anchor, or another pattern that is no causal attention inside segments; a kernel
            without the cap.
    """
    cu_seqlens, longest = attended_boundaries(layout)
    window, hidden = effective_window(layout, sliding_window), None
    if window is not None and PATTERNS[layout.pattern].anchored:
        hidden = hidden_anchors(layout, window=window)
    out = VarlenAttention.apply(
        flatten_rows(q),
        flatten_rows(k),
        flatten_rows(v),
        sinks,
        Spans(cu_seqlens, cu_seqlens, longest, longest),
        kernel.capped(softcap),
        scale,
        window,
        hidden,
    )
    return out.unflatten(0, (layout.batch_size, -1)).transpose(1, 2)


def flatten_rows(x: Tensor) -> Tensor:
    """(B, H, S, D) -> (B·S, H, D): the kernels' packed form. A view for transformers' projections."""
    return x.transpose(1, 2).flatten(0, 1)
