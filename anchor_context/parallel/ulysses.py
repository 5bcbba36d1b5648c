"""Ulysses sequence parallelism: trade a part of the tokens for a part of the heads, attend, trade back.

Between the two all-to-alls every rank sees whole rows for 1/U of the heads, so any engine runs
unchanged under it, with the global layout (DeepSpeed-Ulysses, arXiv 2309.14509; yunchang's
`SeqAllToAll4D` does the exchange and its gradient).
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from yunchang.comm.all_to_all import SeqAllToAll4D

from anchor_context.layout import DocumentLayout

HEADS, TOKENS = 2, 1
"""Dimensions of yunchang's (B, S, H, D) tensors."""


def ulysses(attend: Callable[..., Tensor], group: ProcessGroup) -> Callable[..., Tensor]:
    """`attend` for whole rows -> `attend` for this rank's tokens, (B, H, S/U, D) in and out."""
    degree = dist.get_world_size(group)

    def exchange(x: Tensor, *, scatter: int, gather: int) -> Tensor:
        return SeqAllToAll4D.apply(group, x.transpose(1, 2), scatter, gather).transpose(1, 2)

    def attend_ulysses(
        q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, **settings
    ) -> Tensor:
        repeats = kv_repeats(k.shape[1], degree)
        if repeats > 1:  # fewer key/value heads than ranks: each rank needs a head of its own
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        q, k, v = (exchange(x, scatter=HEADS, gather=TOKENS) for x in (q, k, v))
        out = attend(q, k, v, layout, **settings)
        return exchange(out, scatter=TOKENS, gather=HEADS)

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
