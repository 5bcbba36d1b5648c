"""Calls of more than 2³¹ elements, in pieces below it: whole spans, or heads where one span is too large.

A kernel that counts elements in 32 bits crashes above that, or is silently wrong: 1,048,576 tokens × 32 heads
× 64, or 524,288 × 32 × 128. Several did (FlashAttention in its accumulator of dq and in its tile schedulers),
and it changes with every release which do, so no kernel is trusted above it.

Guarantees: the numbers of one call; a query's, a key's and a head's lie where they would.
Costs: nothing below the limit, where shapes alone decide. Above it the boundaries come to the host, one wait
for the device per call, and what belongs to a piece of heads is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anchor_context.attention.kernels.kernel import Kernel, Spans
from anchor_context.attention.kernels.merge import wide

LIMIT = 2**31 - 1
"""Elements of the largest tensor of a call."""
TILE = 128
"""The kernels round every span up to whole tiles of so many tokens in what they make for themselves."""


@dataclass(frozen=True)
class Piece:
    """A call of its own: spans `first` … `last` - 1 for some heads."""

    first: int
    last: int
    heads: slice
    kv_heads: slice
    """The keys and values of `heads`. Two pieces share one where a single group of heads is too large."""


def elements(*, tokens: int, spans: int, heads: int, head_dim: int) -> int:
    """Of the largest tensor of a call, those that the kernel makes for itself included.

    dq is summed in float32, each span rounded up to whole tiles and the head size too, and FlashAttention-2
    gives every query head a dk and dv of its own: keys count with as many heads as queries.
    """
    return (tokens + TILE * (spans + 1)) * heads * (-(-head_dim // 64) * 64)


def pieces(
    edges_q: Sequence[int],
    edges_k: Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    limit: int,
) -> Iterator[Piece]:
    """As few consecutive pieces as stay below `limit`.

    Args:
        edges_q, edges_k: (spans + 1,) the boundaries, of cu_seqlens.

    Raises:
        ValueError: one head of one span is too large.
    """
    group = heads // kv_heads

    def size(first: int, last: int, heads: int) -> int:
        tokens = max(edges_q[last] - edges_q[first], edges_k[last] - edges_k[first])
        return elements(tokens=tokens, spans=last - first, heads=heads, head_dim=head_dim)

    first, spans = 0, len(edges_q) - 1
    while first < spans:
        last = first + 1
        while last < spans and size(first, last + 1, heads) <= limit:
            last += 1
        count = min(heads, limit // size(first, last, 1))
        if count == 0:
            raise ValueError(
                f"a document of {edges_q[last] - edges_q[first]:,} tokens has more than {limit:,} elements "
                f"in one attention head of {head_dim}, beyond what kernels can count: share the row among "
                "ranks (--parallel_mode ring_attn), or cut the document"
            )
        if count >= group:
            count -= count % group
        else:
            count = max(n for n in range(1, count + 1) if group % n == 0)
        for head in range(0, heads, count):
            end = min(head + count, heads)
            yield Piece(first, last, slice(head, end), slice(head // group, -(-end // group)))
        first = last


def in_pieces(kernel: Kernel) -> Kernel:
    """`kernel`, but calls above `LIMIT` are made in pieces."""

    def forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, **settings):
        if _fits(spans, q, k, v):
            return kernel.forward(q, k, v, spans, **settings)
        out, lse = q.new_empty(q.shape), None
        for heads, kv_heads, queries, keys, part in _parts(q, k, spans):
            part_out, part_lse = kernel.forward(
                _cut(q, queries, heads),
                _cut(k, keys, kv_heads),
                _cut(v, keys, kv_heads),
                part,
                **settings,
            )
            lse = part_lse.new_empty(q.shape[1], q.shape[0]) if lse is None else lse
            out[queries, heads], lse[heads, queries] = part_out, part_lse
        return out, lse

    def backward(dout, q, k, v, out, lse, spans: Spans, **settings):
        if _fits(spans, dout, q, k, v, out):
            return kernel.backward(dout, q, k, v, out, lse, spans, **settings)
        parts = list(_parts(q, k, spans))
        group = q.shape[1] // k.shape[1]
        cuts_groups = any(heads.stop - heads.start < group for heads, *_ in parts)
        dtype = wide(k.dtype) if cuts_groups else k.dtype  # then several pieces add to one dk
        dq = q.new_empty(q.shape)
        dk, dv = (torch.zeros(k.shape, dtype=dtype, device=k.device) for _ in range(2))
        for heads, kv_heads, queries, keys, part in parts:
            dq_part, dk_part, dv_part = kernel.backward(
                _cut(dout, queries, heads),
                _cut(q, queries, heads),
                _cut(k, keys, kv_heads),
                _cut(v, keys, kv_heads),
                _cut(out, queries, heads),
                lse[heads, queries].contiguous(),
                part,
                **settings,
            )
            dq[queries, heads] = dq_part
            dk[keys, kv_heads] += dk_part
            dv[keys, kv_heads] += dv_part
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    return replace(kernel, forward=forward, backward=backward)


def _fits(spans: Spans, *tensors: Tensor) -> bool:
    """By shapes and strides alone: nothing waits for the device."""
    if any(_reach(tensor) > LIMIT for tensor in tensors):
        return False
    tokens = max(len(tensor) for tensor in tensors)
    heads = max(tensor.shape[1] for tensor in tensors)
    number, head_dim = spans.cu_seqlens_q.numel() - 1, tensors[0].shape[-1]
    return elements(tokens=tokens, spans=number, heads=heads, head_dim=head_dim) <= LIMIT


def _reach(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last, those between that are not its own included."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _parts(
    q: Tensor, k: Tensor, spans: Spans
) -> Iterator[tuple[slice, slice, slice, slice, Spans]]:
    """(heads, key/value heads, queries, keys, the piece's own spans) of every piece with queries."""
    edges_q, edges_k = spans.cu_seqlens_q.tolist(), spans.cu_seqlens_k.tolist()
    settings = {"heads": q.shape[1], "kv_heads": k.shape[1], "head_dim": q.shape[2]}
    for piece in pieces(edges_q, edges_k, limit=LIMIT, **settings):
        own = slice(piece.first, piece.last + 1)
        queries = slice(edges_q[piece.first], edges_q[piece.last])
        keys = slice(edges_k[piece.first], edges_k[piece.last])
        if queries.start == queries.stop:
            continue
        part = Spans(
            spans.cu_seqlens_q[own] - queries.start,
            spans.cu_seqlens_k[own] - keys.start,
            min(spans.max_seqlen_q, queries.stop - queries.start),
            min(spans.max_seqlen_k, keys.stop - keys.start),
        )
        yield piece.heads, piece.kv_heads, queries, keys, part


def _cut(x: Tensor, tokens: slice, heads: slice) -> Tensor:
    """Without gaps: what lies between the heads of a piece would be counted too."""
    return x[tokens, heads].contiguous()
