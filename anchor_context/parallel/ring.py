"""Ring attention that knows its documents: each rank computes the planned part of every row.

Keys and values travel, queries stay (Ring Attention, arXiv 2310.01889; parts are merged by log-sum-exp
as in FlashAttention). Unlike a plain ring, which passes every key round, a rank sends straight to
the ranks that hold a query which sees the key, and only those keys (`plan.py`, `schedule.py`).

    forward   post all messages -> causal part and own rectangles -> rectangles of each source as it
              arrives, merged into (out, lse)
    backward  rectangles of each source with the *global* out and lse, which makes every part's
              gradient exact -> post their dk, dv to the owner -> causal part and own rectangles
              meanwhile -> add what arrives

Guarantees: any document lengths, grouped-query heads, any B; outputs and gradients equal those of one
rank up to the order of summation. Each needed range of keys and values is sent once per receiver
and layer, and its gradient once back. Costs: the received ranges are kept for the backward (sending
them again would cost bytes); out is merged in float32.

yunchang's `RingComm` sends to the next rank and receives from the one before, nothing else, so the
messages go through `batch_isend_irecv` on yunchang's ring group; merging is yunchang's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from yunchang.ring.utils import update_out_and_lse

from anchor_context.attention.flash import flatten_rows
from anchor_context.attention.kernels import Kernel
from anchor_context.layout import DocumentLayout
from anchor_context.parallel.account import CommAccount, size_in_bytes
from anchor_context.parallel.schedule import RingSchedule, ShardedLayout

Message = tuple[Tensor, list]
"""A received tensor and the requests to wait for before it is read."""


def ring(kernel: Kernel, group: ProcessGroup, account: CommAccount) -> Callable[..., Tensor]:
    """`attend(q, k, v, layout, *, scale, sliding_window=None)` across the ranks of `group`.

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
    ) -> Tensor:
        assert isinstance(layout, ShardedLayout), "a ring takes the layout that shard_batch made"
        longest = layout.row_length if layout.pattern == "full" else layout.max_seqlen
        check_window(sliding_window, pattern=layout.pattern, longest=longest)
        out = RingAttention.apply(
            flatten_rows(q),
            flatten_rows(k),
            flatten_rows(v),
            layout.schedule,
            kernel,
            group,
            account,
            scale,
        )
        return out.unflatten(0, (layout.batch_size, -1)).transpose(1, 2)

    return attend


def check_window(sliding_window: int | None, *, pattern: str, longest: int) -> None:
    """Raise `ValueError` if a sliding window would hide anything: the ring sends what the pattern sees.

    Args:
        longest: tokens of the longest document, or of a row under `full`.
    """
    if sliding_window is not None and sliding_window < longest:
        raise ValueError(
            f"the model's sliding_window={sliding_window} is shorter than the {longest} tokens that "
            f"{pattern} attends to as one piece, and the ring cannot honour it: use --parallel_mode "
            "ulysses_attn, or set the model's config.sliding_window to null"
        )


class RingAttention(torch.autograd.Function):
    """`ring_forward` and `ring_backward` for autograd."""

    @staticmethod
    def forward(ctx, q, k, v, schedule, kernel, group, account, scale):
        out, lse, received = ring_forward(
            q, k, v, schedule, kernel=kernel, group=group, account=account, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse, *received)
        ctx.schedule, ctx.settings = schedule, (kernel, group, account, scale)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, *received = ctx.saved_tensors
        kernel, group, account, scale = ctx.settings
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
            account=account,
            scale=scale,
        )
        return *gradients, None, None, None, None, None


def ring_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: RingSchedule,
    *,
    kernel: Kernel,
    group: ProcessGroup,
    account: CommAccount,
    scale: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Attention of this rank's queries to all they see.

    Args:
        q: (T, H, D); k, v: (T, Hkv, D): the local tokens of all rows, one row after the other.

    Returns:
        out (T, H, D) in q's dtype; lse (H, T), over everything a query sees; and what each step
        received, (2, tokens, Hkv, D): keys and values.
    """
    outgoing = [torch.stack((k[step.send], v[step.send])) for step in schedule.steps]
    incoming = [k.new_empty(2, step.receive, *k.shape[1:]) for step in schedule.steps]
    messages = [
        _exchange(*tensors, step=number, group=group)
        for number, tensors in enumerate(zip(outgoing, incoming, strict=True))
    ]
    _count(account, "ring_kv", outgoing, incoming)

    out, lse = kernel.forward(q, k, v, schedule.causal, causal=True, scale=scale, window=None)
    out, lse = update_out_and_lse(None, None, out, lse)  # float32; lse as (T, H, 1)
    for step, (received, requests) in zip(schedule.steps, messages, strict=True):
        _wait(requests)
        part = step.rectangles
        if part is None:
            continue
        keys, values = (k, v) if step is schedule.steps[0] else received
        part_out, part_lse = kernel.forward(
            q[part.queries],
            keys[part.keys],
            values[part.keys],
            part.spans,
            causal=False,
            scale=scale,
            window=None,
        )
        out, lse = update_out_and_lse(out, lse, part_out, part_lse, slice_=part.queries)
    return out.to(q.dtype), lse.squeeze(-1).transpose(0, 1).contiguous(), incoming


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
    account: CommAccount,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of this rank's queries, keys and values.

    With p = exp(score - lse) and lse over *all* a query sees, a part's weights are already the
    softmax's, and dout · out, which the softmax's gradient subtracts, is the whole row's too. So each
    part's dq, dk, dv are summands of the true ones.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    dout = dout.contiguous()

    def part_backward(part, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds to dq; returns dk, dv of `part.keys`."""
        dq_part, *dkv = kernel.backward(
            dout[part.queries],
            q[part.queries],
            keys[part.keys],
            values[part.keys],
            out[part.queries],
            lse[:, part.queries],
            part.spans,
            causal=False,
            scale=scale,
            window=None,
        )
        dq.index_add_(0, part.queries, dq_part.to(wide))
        return dkv

    own, *others = schedule.steps
    outgoing, incoming, messages = [], [], []
    for number, (step, key_value) in enumerate(zip(others, received[1:], strict=True), start=1):
        gradients = torch.zeros_like(key_value, dtype=wide)
        if step.rectangles is not None:
            for gradient, part in zip(
                gradients, part_backward(step.rectangles, *key_value), strict=True
            ):
                gradient.index_add_(0, step.rectangles.keys, part.to(wide))
        # The way back: to the rank the keys came from, from the rank that this one sent keys to.
        outgoing.append(gradients.to(k.dtype))
        incoming.append(k.new_empty(2, step.send.numel(), *k.shape[1:]))
        messages.append(_exchange(outgoing[-1], incoming[-1], step=-number, group=group))
    _count(account, "ring_grad", outgoing, incoming)

    if own.rectangles is not None:
        for gradient, part in zip((dk, dv), part_backward(own.rectangles, k, v), strict=True):
            gradient.index_add_(0, own.rectangles.keys, part.to(wide))
    local = kernel.backward(
        dout, q, k, v, out, lse, schedule.causal, causal=True, scale=scale, window=None
    )
    for gradient, part in zip((dq, dk, dv), local, strict=True):
        gradient += part
    for step, (arrived, requests) in zip(others, messages, strict=True):
        _wait(requests)
        for gradient, part in zip((dk, dv), arrived, strict=True):
            gradient.index_add_(0, step.send, part.to(wide))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _exchange(outgoing: Tensor, incoming: Tensor, *, step: int, group: ProcessGroup) -> Message:
    """Post `outgoing` to the rank `step` places on and `incoming` from the one `step` places back.

    Both ends know from the plan whether a message is empty, and skip it.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    operations = []
    if outgoing.numel():
        target = dist.get_global_rank(group, (rank + step) % ranks)
        operations.append(dist.P2POp(dist.isend, outgoing, target, group))
    if incoming.numel():
        source = dist.get_global_rank(group, (rank - step) % ranks)
        operations.append(dist.P2POp(dist.irecv, incoming, source, group))
    return incoming, dist.batch_isend_irecv(operations) if operations else []


def _wait(requests: list) -> None:
    for request in requests:
        request.wait()


def _count(account: CommAccount, kind: str, outgoing: list[Tensor], incoming: list[Tensor]) -> None:
    account.add(
        kind,
        sent=sum(size_in_bytes(tensor) for tensor in outgoing),
        received=sum(size_in_bytes(tensor) for tensor in incoming),
    )
