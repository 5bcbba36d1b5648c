"""Learned sinks: a logit per head that takes part in the softmax and has no value (gpt-oss).

A softmax over more is a merge of softmaxes by their log-sum-exp, and a sink is one more part, whose
log-sum-exp is its logit and whose output is 0. So what any kernel returned becomes attention with sinks; and
its backward, given *that* output and log-sum-exp, returns the exact gradients of queries, keys and values.

Shapes: out, dout (T, H, D); lse (H, T) natural, float32 or wider; sinks (H,) logits, any floating dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def share_of_keys(lse: Tensor, sinks: Tensor) -> Tensor:
    """What the keys keep of each softmax when the sinks come in: of lse's shape, (…, H, T), 0 to 1."""
    return torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) over all keys -> the same with the sinks besides. Each query takes its sink once."""
    share = share_of_keys(lse, sinks)
    whole_lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return (out * share.T[..., None]).to(out.dtype), whole_lse


def gradient_of_sinks(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """(H,) in the sinks' dtype, from `out` and `lse` with the sinks in them.

    The softmax's gradient by a logit is weight · (dweight − dout · out), and nothing is multiplied by a
    sink's weight: dweight is 0.
    """
    weight = (sinks.to(lse.dtype)[:, None] - lse).exp()
    product = (dout.to(lse.dtype) * out).sum(-1).T
    return -(weight * product).sum(1).to(sinks.dtype)
