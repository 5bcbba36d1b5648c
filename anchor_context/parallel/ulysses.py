"""Ulysses sequence parallelism: trade a part of the tokens for a part of the heads, attend, trade back.

Between the two all-to-alls every rank sees whole rows for 1/U of the heads, so any engine runs
unchanged under it, with the global layout (DeepSpeed-Ulysses, arXiv 2309.14509; yunchang's
`all_to_all_4D` does the exchange).
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from yunchang.comm.all_to_all import all_to_all_4D

from anchor_context.layout import DocumentLayout
from anchor_context.parallel.traffic import Traffic, size_in_bytes

HEADS, TOKENS = 2, 1
"""Dimensions of yunchang's (B, S, H, D) tensors."""


class AllToAll(torch.autograd.Function):
    """One all-to-all: divides dimension `scatter`, joins dimension `gather`; the gradient goes back.

    yunchang's own autograd class does the same without counting the backward's bytes.
    """

    @staticmethod
    def forward(ctx, x, scatter: int, gather: int, group: ProcessGroup, traffic: Traffic):
        ctx.settings = scatter, gather, group, traffic
        return all_to_all(x, scatter=scatter, gather=gather, group=group, traffic=traffic)

    @staticmethod
    def backward(ctx, gradient):
        scatter, gather, group, traffic = ctx.settings
        gradient = all_to_all(
            gradient, scatter=gather, gather=scatter, group=group, traffic=traffic
        )
        return gradient, None, None, None, None


def all_to_all(
    x: Tensor, *, scatter: int, gather: int, group: ProcessGroup, traffic: Traffic
) -> Tensor:
    """all_to_all_4D of (B, S, H, D), counted: all but this rank's own part travels."""
    degree = dist.get_world_size(group)
    travels = size_in_bytes(x) // degree * (degree - 1)
    traffic.add("ulysses", sent=travels, received=travels)
    return all_to_all_4D(x, scatter, gather, group=group)


def ulysses(
    attend: Callable[..., Tensor], group: ProcessGroup, traffic: Traffic
) -> Callable[..., Tensor]:
    """`attend` for whole rows -> `attend` for this rank's tokens, (B, H, S/U, D) in and out."""
    degree = dist.get_world_size(group)

    def trade(x: Tensor, *, scatter: int, gather: int) -> Tensor:
        return AllToAll.apply(x.transpose(1, 2), scatter, gather, group, traffic).transpose(1, 2)

    def attend_ulysses(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: DocumentLayout,
        *,
        sinks: Tensor | None = None,
        **settings,
    ) -> Tensor:
        repeats = kv_repeats(k.shape[1], degree)
        if repeats > 1:  # fewer key/value heads than ranks: each rank needs a head of its own
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        q, k, v = (trade(x, scatter=HEADS, gather=TOKENS) for x in (q, k, v))
        if sinks is not None:  # of this rank's heads; the others' gradient comes from their ranks
            sinks = sinks.chunk(degree)[dist.get_rank(group)]
        out = attend(q, k, v, layout, sinks=sinks, **settings)
        return trade(out, scatter=TOKENS, gather=HEADS)

    return attend_ulysses


def kv_repeats(kv_heads: int, degree: int) -> int:
    """How often each key/value head is repeated so that the heads divide over the ranks."""
    return degree // gcd(kv_heads, degree)


def check_heads(heads: int, degree: int) -> None:
    """Raise `ValueError` unless the query heads divide over the Ulysses ranks."""
    if heads % degree:
        fitting = [d for d in range(1, heads + 1) if heads % d == 0]
        raise ValueError(
            f"the model's {heads} attention heads do not divide over --ulysses_degree {degree}; "
            f"this model can use {fitting}"
        )
