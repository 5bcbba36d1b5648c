"""The kernels inside PyTorch: FlashAttention-2 on CUDA, and a flash kernel for the CPU. See `kernel.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from anchor_context.attention.kernels.kernel import (
    Kernel,
    Spans,
    always_deterministic,
    caps_no_scores,
    flash_2_reason,
    window_sides,
)
from anchor_context.attention.kernels.merge import wide

# --------------------------------------------------------------------------------------------------
# FlashAttention-2 on CUDA. torch.nn.attention.varlen.varlen_attn is a wrapper over these two operators. Its
# own signature moved between releases and hides the backward; of theirs, only optional keywords came between
# 2.11 and 2.13.


def cuda_forward(q, k, v, spans, *, causal, scale, window):
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        spans.cu_seqlens_q,
        spans.cu_seqlens_k,
        spans.max_seqlen_q,
        spans.max_seqlen_k,
        0.0,  # dropout
        causal and window is None,  # a window states causality by its right side
        False,  # return_debug_mask
        scale=scale,
        **window_sides(causal, window),
    )
    return out, lse


def cuda_backward(dout, q, k, v, out, lse, spans, *, causal, scale, window, deterministic=False):
    # Deterministic or not, the operator asks PyTorch's own switch.
    return torch.ops.aten._flash_attention_backward(
        dout.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        spans.cu_seqlens_q,
        spans.cu_seqlens_k,
        spans.max_seqlen_q,
        spans.max_seqlen_k,
        0.0,  # dropout
        causal and window is None,
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # random state, unused without dropout
        torch.empty(0, device=q.device),
        scale=scale,
        **window_sides(causal, window),
    )


def cuda_not_deterministic(device: torch.device, head_dim: int | None) -> str | None:
    enabled = torch.are_deterministic_algorithms_enabled()
    if not enabled or torch.is_deterministic_algorithms_warn_only_enabled():
        return (
            "its backward is deterministic after torch.use_deterministic_algorithms(True) alone, which was "
            "not called (nor does warn_only=True count)"
        )
    return None


# --------------------------------------------------------------------------------------------------
# The CPU's. It takes one rectangle at a time, so the spans are a Python loop. Slicing under autograd would
# pad every slice's gradient to the full row; here each span writes its part of one preallocated result. A
# thread computes whole heads, so the bits are the same in every run with as many threads. (With more, the
# libraries of some CPUs take another routine for the products.)
# It knows no window: where one hides something, a span becomes bands of queries, each with the keys that it
# sees and a small mask. That costs (window + BAND) pairs for each query.

BAND = 256
"""Queries of a band: enough to keep the operator busy, few enough for a small mask."""


def cpu_unavailable(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    return None if device.type == "cpu" else f"needs the CPU, not {device.type}"


def cpu_forward(q, k, v, spans, *, causal, scale, window):
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=wide(q.dtype))
    for queries, keys, is_causal, mask in _cpu_calls(spans, causal, window, q.dtype):
        out_HTD, lse_HT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q[queries]),
            _heads_first(k[keys]),
            _heads_first(v[keys]),
            0.0,
            is_causal,
            attn_mask=mask,
            scale=scale,
        )
        out[queries] = out_HTD[0].transpose(0, 1)
        lse[:, queries] = lse_HT[0]
    return out, lse


def cpu_backward(dout, q, k, v, out, lse, spans, *, causal, scale, window, deterministic=False):
    dq = torch.zeros_like(q)
    # Several bands may see a key, and each adds to its gradient.
    dtype = k.dtype if window is None else wide(k.dtype)
    dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for queries, keys, is_causal, mask in _cpu_calls(spans, causal, window, q.dtype):
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(dout[queries]),
            _heads_first(q[queries]),
            _heads_first(k[keys]),
            _heads_first(v[keys]),
            _heads_first(out[queries]),
            lse[None, :, queries],
            0.0,
            is_causal,
            attn_mask=mask,
            scale=scale,
        )
        for whole, part, where in zip((dq, dk, dv), gradients, (queries, keys, keys), strict=True):
            whole[where] += part[0].transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _cpu_calls(
    spans: Spans, causal: bool, window: int | None, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, bool, Tensor | None]]:
    """(query slice, key slice, is_causal, mask) of every call of the operator."""
    assert causal or window is None, "a window goes with causal spans"
    for queries, keys in _rectangles(spans, causal=causal):
        if window is None or window >= queries.stop - queries.start:
            yield queries, keys, causal, None
            continue
        shift = keys.start - queries.start
        for start in range(queries.start, queries.stop, BAND):
            stop = min(start + BAND, queries.stop)
            first = max(start - window + 1, queries.start)  # what the band's first query sees
            distance = torch.arange(start, stop)[:, None] - torch.arange(first, stop)
            hidden = (distance < 0) | (distance >= window)
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            yield slice(start, stop), slice(first + shift, stop + shift), False, mask


def _rectangles(spans: Spans, *, causal: bool):
    """(query slice, key slice) of every span that is not empty."""
    edges_q, edges_k = spans.cu_seqlens_q.tolist(), spans.cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(edges_q, edges_q[1:], edges_k, edges_k[1:], strict=False):
        assert not causal or q1 - q0 == k1 - k0, "a causal span is square"
        # This kernel does not need the maxima, but the CUDA kernels compute nothing beyond them.
        assert q1 - q0 <= spans.max_seqlen_q and k1 - k0 <= spans.max_seqlen_k, "maxima too small"
        if q1 > q0:
            assert k1 > k0, "a span with queries has keys"
            yield slice(q0, q1), slice(k0, k1)


def _heads_first(x: Tensor) -> Tensor:
    """(T, H, D) -> (1, H, T, D), a view, unless the numbers of one head lie apart: the operator would read
    what lies between."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.transpose(0, 1).unsqueeze(0)


CUDA_KERNEL = Kernel(
    name="torch_varlen",
    forward=cuda_forward,
    backward=cuda_backward,
    unavailable=flash_2_reason,
    not_deterministic=cuda_not_deterministic,
    no_softcap=caps_no_scores,
)
CPU_KERNEL = Kernel(
    name="torch_cpu",
    forward=cpu_forward,
    backward=cpu_backward,
    unavailable=cpu_unavailable,
    not_deterministic=always_deterministic,
    no_softcap=caps_no_scores,
)
