"""Names -> one `attend(q, k, v, layout)`: the only place that picks engine, kernel and parallel layout.

It chooses once, before training, and keeps the reason for the log and for `args.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from anchor_context.attention import flash, flex, reference
from anchor_context.attention.kernels import choose_kernel
from anchor_context.parallel.account import CommAccount
from anchor_context.parallel.groups import RankGrid
from anchor_context.parallel.hybrid import hybrid
from anchor_context.parallel.ring import check_window as check_window_of_ring
from anchor_context.parallel.ring import ring
from anchor_context.parallel.ulysses import ulysses

ENGINES = ("flash", "flex", "reference")


@dataclass(frozen=True)
class Engine:
    """A chosen engine. `attend(q, k, v, layout, *, scale, sliding_window=None) -> out`."""

    attend: Callable[..., Tensor]
    name: str
    kernel: str
    layout: str
    """The parallel layout, in words."""
    reason: str
    """Why this kernel."""
    account: CommAccount = field(default_factory=CommAccount)
    """What attention sends and receives; stays empty where no rows are shared."""
    check_window: Callable[..., object] = lambda sliding_window, *, pattern, longest: None
    """Raises `ValueError` for a model's sliding window that this engine cannot honour on documents (rows of
    `full`) of up to `longest` tokens: what the first forward would say, before there is a model."""

    def __str__(self) -> str:
        return f"{self.name} engine, kernel {self.kernel} ({self.reason}), {self.layout}"


def default_anchor_placement(pattern: str, engine: str) -> str:
    """Where the packer puts anchors when nobody says: what the engine computes best."""
    if pattern != "anchor":
        return "none"
    return "shared" if engine == "flex" else "per_document"


def make_engine(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernel: str | None = None,
    grid: RankGrid | None = None,
    ring_group: ProcessGroup | None = None,
    ulysses_group: ProcessGroup | None = None,
) -> Engine:
    """Choose engine, kernel and parallel layout. Collective over the ring group, if there is a ring.

    Args:
        name: one of `ENGINES`.
        dtype: of q, k and v.
        kernel: a kernel's name to force it (flash only), or None for the fastest that runs.
        grid: this rank's place, with its `ring_group` and `ulysses_group`; None for one rank.

    Raises:
        ValueError: an unknown name, or a combination that cannot run here.
    """
    grid = grid or RankGrid()
    if name not in ENGINES:
        raise ValueError(f"--attn_engine {name} is unknown; choose from {list(ENGINES)}")
    if kernel is not None and name != "flash":
        raise ValueError(f"--attn_kernel {kernel} belongs to --attn_engine flash, not {name}")

    if name != "flash" and grid.ring_degree > 1:
        raise ValueError(
            f"--attn_engine {name} cannot run on a ring (--ring_degree {grid.ring_degree}): its mask "
            "is of whole rows; use --parallel_mode ulysses_attn, or --attn_engine flash"
        )

    account, check_window = CommAccount(), Engine.check_window
    if name == "flash":
        chosen, reason = choose_kernel(device, dtype, name=kernel)
        check_window = partial(flash.effective_window, kernel=chosen)
        attend, kernel = partial(flash.attend, kernel=chosen), chosen.name
    elif name == "flex":
        attend = flex.make_attend()
        if device.type == "cpu":
            kernel, reason = "dense_mask", "FlexAttention has no backward on the CPU"
        else:
            kernel, reason = "flex_attention", "compiled by PyTorch"
    else:
        attend, kernel, reason = reference.attend, "dense", "every score written out"

    if grid.ring_degree > 1:
        check_window = check_window_of_ring
    if grid.ring_degree > 1 and grid.ulysses_degree > 1:
        attend = hybrid(chosen, ring_group=ring_group, ulysses_group=ulysses_group, account=account)
    elif grid.ring_degree > 1:
        attend = ring(chosen, ring_group, account)
    elif grid.ulysses_degree > 1:
        attend = ulysses(attend, ulysses_group, account)
    return Engine(
        attend=attend,
        name=name,
        kernel=kernel,
        layout=str(grid),
        reason=reason,
        account=account,
        check_window=check_window,
    )
