"""Attention over parts of the keys, merged by log-sum-exp into attention over all of them.

A softmax over more keys is a mean of softmaxes, weighted by the sums of their exponentials. The way back
needs nothing of it: a kernel's `backward` that is given the *whole* out and lse returns exact summands of the
true gradients. With p = exp(score - lse) the part's weights are already the whole softmax's, and dout · out,
which the softmax's gradient subtracts, is the whole row's too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) over all keys, from those over two parts of them that share no key.

    Args:
        out: (T, H, D), of the type to sum in (`wide`); changed in place. lse: (H, T).
        part_out, part_lse: the same of the other part, or what broadcasts to them; -inf where a query sees
            nothing of this part.
    """
    share = torch.sigmoid(part_lse - lse)  # the other part's, of the whole sum
    change = out - part_out
    change *= share.T[..., None]
    return out.sub_(change), lse - logsigmoid(lse - part_lse)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to sum parts in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
