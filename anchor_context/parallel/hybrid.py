"""Ulysses inside, ring outside: yunchang's unified sequence parallelism (arXiv 2405.07719).

The ring places the tokens of a row on R ring ranks; the U Ulysses ranks at one place of the ring hold
a U-th of its tokens each, trade them for a U-th of the heads, and every one runs the ring for its own
heads with the ranks that hold the same heads. Either degree may be 1.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.distributed import ProcessGroup

from anchor_context.attention.kernels import Kernel
from anchor_context.parallel.account import CommAccount
from anchor_context.parallel.ring import ring
from anchor_context.parallel.ulysses import ulysses


def hybrid(
    kernel: Kernel,
    *,
    ring_group: ProcessGroup,
    ulysses_group: ProcessGroup,
    account: CommAccount,
) -> Callable[..., Tensor]:
    """`attend` for this rank's tokens, (B, H, S / (R · U), D) in and out.

    Making it is collective over the ring, every call of it over both groups.
    """
    return ulysses(ring(kernel, ring_group, account), ulysses_group, account)
