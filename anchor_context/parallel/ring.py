"""Ring attention that knows its documents: each rank computes the planned part of every row.

Keys and values travel, queries stay (Ring Attention, arXiv 2310.01889; parts are merged by log-sum-exp
as in FlashAttention). Unlike a plain ring, which passes every key round, a rank sends straight to
the ranks that hold a query which sees the key, and only those keys (`plan.py`, `schedule.py`).

    forward   post all messages -> causal spans and own parts -> parts of each source as it arrives,
              merged into (out, lse)
    backward  parts of each source with the *global* out and lse, which makes every part's gradient
              exact -> post their dk, dv to the owner -> causal spans and own parts meanwhile -> add
              what arrives

Guarantees: any document lengths, grouped-query heads, any B, a sliding window of each layer's own; outputs
and gradients equal those of one rank up to the order of summation. Each needed range of keys and values is
sent once per receiver and layer, and its gradient once back. Costs: the received ranges are kept for the
backward (sending them again would cost bytes); out is merged in float32.

yunchang's `RingComm` sends to the next rank and receives from the one before, nothing else, so the
messages go through `batch_isend_irecv` on yunchang's ring group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from anchor_context.attention.flash import flatten_rows
from anchor_context.attention.kernels import Kernel
from anchor_context.attention.kernels.merge import merge, wide
from anchor_context.attention.kernels.sinks import add_sinks, gradient_of_sinks
from anchor_context.layout import DocumentLayout
from anchor_context.parallel.schedule import Part, RingSchedule, ShardedLayout
from anchor_context.parallel.traffic import Traffic, size_in_bytes

Message = tuple[Tensor, list]
"""A received tensor and the requests to wait for before it is read."""


def ring(kernel: Kernel, group: ProcessGroup, traffic: Traffic) -> Callable[..., Tensor]:
    """`attend(q, k, v, layout, *, scale, …)`, as `flash.attend`, across the ranks of `group`.

    q: (B, H, L, D); k, v: (B, Hkv, L, D): this rank's tokens as `shard_batch` placed them, with the
    `ShardedLayout` it made. Returns (B, H, L, D).

    Collective: every rank of the group calls it once (NCCL wants all ranks in a group's first
    exchange, and a plan may let some rank send nothing).
    """
    dist.barrier(group)

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
    ) -> Tensor:
        assert isinstance(layout, ShardedLayout), "a ring takes the layout that shard_batch made"
        out = RingAttention.apply(
            flatten_rows(q),
            flatten_rows(k),
            flatten_rows(v),
            sinks,
            layout.schedule_of(sliding_window),
            kernel.capped(softcap),
            group,
            traffic,
            scale,
        )
        return out.unflatten(0, (layout.batch_size, -1)).transpose(1, 2)

    return attend


class RingAttention(torch.autograd.Function):
    """`ring_forward` and `ring_backward` for autograd."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, schedule, kernel, group, traffic, scale):
        out, lse, received = ring_forward(
            q, k, v, schedule, sinks, kernel=kernel, group=group, traffic=traffic, scale=scale
        )
        ctx.save_for_backward(q, k, v, sinks, out, lse, *received)
        ctx.schedule, ctx.settings = schedule, (kernel, group, traffic, scale)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, sinks, out, lse, *received = ctx.saved_tensors
        kernel, group, traffic, scale = ctx.settings
        gradients = ring_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            received,
            ctx.schedule,
            kernel=kernel,
            group=group,
            traffic=traffic,
            scale=scale,
        )
        dsinks = None if sinks is None else gradient_of_sinks(dout, out, lse, sinks)
        return *gradients, dsinks, None, None, None, None, None


def ring_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: RingSchedule,
    sinks: Tensor | None = None,
    *,
    kernel: Kernel,
    group: ProcessGroup,
    traffic: Traffic,
    scale: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Attention of this rank's queries to all they see.

    Args:
        q: (T, H, D); k, v: (T, Hkv, D): the local tokens of all rows, one row after the other.
        sinks: (H,) or None, taken once by each query, behind all parts.

    Returns:
        out (T, H, D) in q's dtype; lse (H, T), over everything a query sees and its sink; and what each
        exchange received, (2, tokens, Hkv, D): keys and values.
    """
    exchanges = schedule.exchanges
    outgoing = [torch.stack((k[exchange.send], v[exchange.send])) for exchange in exchanges]
    incoming = [k.new_empty(2, exchange.receive, *k.shape[1:]) for exchange in exchanges]
    messages = [
        _post(*tensors, distance=distance, group=group)
        for distance, tensors in enumerate(zip(outgoing, incoming, strict=True))
    ]
    _count(traffic, "ring_kv", outgoing, incoming)

    out, lse = kernel.forward(
        q, k, v, schedule.causal, causal=True, scale=scale, window=schedule.window
    )
    out = out.to(wide(q.dtype))
    for exchange, (received, requests) in zip(exchanges, messages, strict=True):
        _wait(requests)
        keys, values = (k, v) if exchange is exchanges[0] else received
        for part in exchange.parts:
            part_out, part_lse = kernel.forward(
                q[part.queries],
                keys[part.keys],
                values[part.keys],
                part.spans,
                causal=part.causal,
                scale=scale,
                window=None,
            )
            where = part.queries
            out[where], lse[:, where] = merge(out[where], lse[:, where], part_out, part_lse)
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks)
    return out.to(q.dtype), lse, incoming


def ring_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    received: list[Tensor],
    schedule: RingSchedule,
    *,
    kernel: Kernel,
    group: ProcessGroup,
    traffic: Traffic,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of this rank's queries, keys and values.

    `out` and `lse` are over *all* a query sees, so each part's are summands of the true ones (`merge.py`).
    """
    dtype = wide(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
    dout = dout.contiguous()

    def parts_backward(parts: tuple[Part, ...], keys: Tensor, values: Tensor, *, into) -> None:
        """Adds to dq, and to `into`: dk, dv of the source's tokens."""
        for part in parts:
            dq_part, *dkv = kernel.backward(
                dout[part.queries],
                q[part.queries],
                keys[part.keys],
                values[part.keys],
                out[part.queries],
                lse[:, part.queries],
                part.spans,
                causal=part.causal,
                scale=scale,
                window=None,
            )
            dq.index_add_(0, part.queries, dq_part.to(dtype))
            for gradient, summand in zip(into, dkv, strict=True):
                gradient.index_add_(0, part.keys, summand.to(dtype))

    own, *others = schedule.exchanges
    outgoing, incoming, messages = [], [], []
    pairs = zip(others, received[1:], strict=True)
    for distance, (exchange, key_value) in enumerate(pairs, start=1):
        gradients = torch.zeros_like(key_value, dtype=dtype)
        parts_backward(exchange.parts, *key_value, into=gradients)
        # The way back: to the rank the keys came from, from the rank that this one sent keys to.
        outgoing.append(gradients.to(k.dtype))
        incoming.append(k.new_empty(2, exchange.send.numel(), *k.shape[1:]))
        messages.append(_post(outgoing[-1], incoming[-1], distance=-distance, group=group))
    _count(traffic, "ring_grad", outgoing, incoming)

    parts_backward(own.parts, k, v, into=(dk, dv))
    local = kernel.backward(
        dout, q, k, v, out, lse, schedule.causal, causal=True, scale=scale, window=schedule.window
    )
    for gradient, part in zip((dq, dk, dv), local, strict=True):
        gradient += part
    for exchange, (arrived, requests) in zip(others, messages, strict=True):
        _wait(requests)
        for gradient, part in zip((dk, dv), arrived, strict=True):
            gradient.index_add_(0, exchange.send, part.to(dtype))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _post(outgoing: Tensor, incoming: Tensor, *, distance: int, group: ProcessGroup) -> Message:
    """Post `outgoing` to the rank `distance` places on, `incoming` from the one as many places back.

    Both ends know from the plan whether a message is empty, and skip it.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    operations = []
    if outgoing.numel():
        target = dist.get_global_rank(group, (rank + distance) % ranks)
        operations.append(dist.P2POp(dist.isend, outgoing, target, group))
    if incoming.numel():
        source = dist.get_global_rank(group, (rank - distance) % ranks)
        operations.append(dist.P2POp(dist.irecv, incoming, source, group))
    return incoming, dist.batch_isend_irecv(operations) if operations else []


def _wait(requests: list) -> None:
    for request in requests:
        request.wait()


def _count(traffic: Traffic, kind: str, outgoing: list[Tensor], incoming: list[Tensor]) -> None:
    traffic.add(
        kind,
        sent=sum(size_in_bytes(tensor) for tensor in outgoing),
        received=sum(size_in_bytes(tensor) for tensor in incoming),
    )
