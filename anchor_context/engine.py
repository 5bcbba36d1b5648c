"""Names -> one `attend(q, k, v, layout)`: the only place that picks engine, kernel and rank grid.

It chooses once, before training, and keeps the reason for the log and for `args.json`. What cannot go
together is said here too, by `check_combination`, before there is a device.

Costs nothing to import where nothing is shared between ranks: yunchang is loaded for a ring or Ulysses alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from anchor_context.attention import flash, flex, reference
from anchor_context.attention.kernels import KERNELS, Kernel, choose_kernel
from anchor_context.attention.kernels import warm_up as warm_up_kernel
from anchor_context.attention.patterns import check_pattern, check_segments, pattern_named
from anchor_context.layout import DocumentLayout
from anchor_context.parallel.groups import RankGrid
from anchor_context.parallel.traffic import Traffic

logger = logging.getLogger(__name__)

ENGINES = ("flash", "flex", "reference")


@dataclass(frozen=True)
class Engine:
    """A chosen engine. `attend(q, k, v, layout, *, scale, …) -> out` takes what `reference.attend` takes."""

    attend: Callable[..., Tensor]
    name: str
    kernel: str
    grid: RankGrid
    reason: str
    """Why this kernel."""
    traffic: Traffic = field(default_factory=Traffic)
    """What attention sends and receives; stays empty where no rows are shared."""
    warm_up: Callable[..., None] = lambda **call: None
    """`warm_up(heads=…, kv_heads=…, head_dim=…, window=…, tell=…)`, the whole model's, before the first step:
    compiles what training will call, and tells it. Does nothing where nothing is compiled."""

    def __str__(self) -> str:
        return f"{self.name} engine, kernel {self.kernel} ({self.reason}), {self.grid}"

    def check(self, **what) -> None:
        """`check_combination` of this engine, its kernel and its ranks with `what` is known of the data: what
        the first forward would say, before there is a model."""
        kernel = self.kernel if self.name == "flash" else None
        check_combination(self.name, kernel=kernel, ring=self.grid.ring_degree > 1, **what)


def choose_anchor_placement(pattern: str, engine: str, *, wanted: str = "auto") -> str:
    """Where the packer puts anchors: as `wanted`, or "auto": what the engine computes best.

    Returns:
        "per_document", "shared", or "none" for a pattern without anchors.

    Raises:
        ValueError: an unknown pattern, or a placement wanted of one that has no anchors.
    """
    if wanted == "auto":
        best = "shared" if engine == "flex" else "per_document"
        return pattern_named(pattern).placement(best)
    check_pattern(pattern, wanted)
    return wanted


def check_combination(
    engine: str,
    *,
    kernel: str | None = None,
    ring: bool = False,
    pattern: str | None = None,
    anchor_placement: str = "none",
    interleaved: bool = False,
    softcap: float | None = None,
) -> None:
    """Raise `ValueError` for what cannot go together, whatever the device. What is not known yet is left out.

    Args:
        engine: one of `ENGINES`.
        kernel: a kernel's name, if it was named or is chosen already.
        ring: whether a ring of ranks shares the rows.
        pattern: a key of `PATTERNS`; what follows goes with it.
        anchor_placement: as `choose_anchor_placement` returns it.
        interleaved: whether documents lie in several chunks.
        softcap: the cap of the model's scores; None if they have none.
    """
    if engine not in ENGINES:
        raise ValueError(f"attention engine {engine!r} is unknown; choose from {list(ENGINES)}")
    if kernel is not None and engine != "flash":
        raise ValueError(f"--attn_kernel {kernel} belongs to --attn_engine flash, not {engine}")
    if kernel in KERNELS:
        KERNELS[kernel].capped(softcap)
    if ring and engine != "flash":
        raise ValueError(
            f"--attn_engine {engine} cannot run on a ring (--ring_degree 2 or more, by --parallel_mode "
            "ring_attn or hybrid_attn): its mask is of whole rows; use --parallel_mode ulysses_attn, or "
            "--attn_engine flash"
        )
    if pattern is None:
        return
    check_pattern(pattern, anchor_placement)
    if engine == "flash":
        check_segments(pattern, anchor_placement=anchor_placement, interleaved=interleaved)


def make_engine(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None = None,
    kernel: str | None = None,
    deterministic: bool = False,
    softcap: float | None = None,
    grid: RankGrid | None = None,
    ring_group: ProcessGroup | None = None,
    ulysses_group: ProcessGroup | None = None,
) -> Engine:
    """Choose engine, kernel and rank grid. Collective over the ring group, if there is a ring.

    A ring computes the planned part of every row in place of the engine; Ulysses goes around whatever
    computes. Both together are yunchang's unified sequence parallelism (arXiv 2405.07719): the ring places a
    row's tokens on its ranks, and the Ulysses ranks at one place of it trade their tokens for heads.

    Args:
        name: one of `ENGINES`.
        dtype: of q, k and v.
        head_dim: of q, k and v; None if nobody knows yet, and a kernel may turn out not to have it.
        kernel: a kernel's name to force it (flash only), or None for the fastest that runs.
        deterministic: whether the backward must give the same bits every time (see `choose_kernel`).
        softcap: the cap of the model's scores, which the kernel must have; None if they have none.
        grid: this rank's place, with its `ring_group` and `ulysses_group`; None for one rank.

    Raises:
        ValueError: an unknown name, or a combination that cannot run here.
    """
    grid = grid or RankGrid()
    check_combination(name, kernel=kernel, ring=grid.ring_degree > 1, softcap=softcap)
    warm_up = Engine.warm_up
    if name == "flash":
        chosen, reason = choose_kernel(
            device,
            dtype,
            head_dim=head_dim,
            name=kernel,
            deterministic=deterministic,
            softcap=softcap,
        )
        warm_up = partial(_warm_up, chosen, grid, device=device, dtype=dtype, softcap=softcap)
        attend, kernel = partial(flash.attend, kernel=chosen), chosen.name
    elif name == "flex":
        attend = flex.make_attend()
        if device.type == "cpu":
            kernel, reason = "dense_mask", "FlexAttention has no backward on the CPU"
        else:
            kernel, reason = "flex_attention", "compiled by PyTorch"
    else:
        attend, kernel, reason = reference.attend, "dense", "every score written out"

    traffic = Traffic()
    if grid.ring_degree > 1:
        from anchor_context.parallel.ring import ring

        attend = ring(chosen, ring_group, traffic)
    if grid.ulysses_degree > 1:
        from anchor_context.parallel.ulysses import ulysses

        attend = ulysses(attend, ulysses_group, traffic)
    return Engine(attend, name, kernel, grid, reason, traffic, warm_up)


def engine_elsewhere(name: str, *, kernel: str | None, grid: RankGrid, where: str) -> Engine:
    """What is known of an engine for a device that is not here: to describe and to check, not to attend.

    Args:
        kernel: a kernel's name if it is forced, or None.
        where: the device, for people.
    """
    check_combination(name, kernel=kernel, ring=grid.ring_degree > 1)
    reason = f"--attn_kernel, for {where}" if kernel else f"the fastest that runs on {where}"
    return Engine(None, name, kernel or "chosen there", grid, reason)


def _warm_up(
    kernel: Kernel, grid: RankGrid, *, heads: int, kv_heads: int, window: int | None, **call
) -> None:
    """For this rank's share of the model's heads."""
    if grid.ulysses_degree > 1:
        from anchor_context.parallel.ulysses import kv_repeats

        heads //= grid.ulysses_degree
        kv_heads = kv_heads * kv_repeats(kv_heads, grid.ulysses_degree) // grid.ulysses_degree
    warm_up_kernel(
        kernel,
        heads=heads,
        kv_heads=kv_heads,
        windows={None, window},
        rectangles=grid.ring_degree > 1 or window is not None,
        **call,
    )


def attend_on_first_use(name: str, **how) -> Callable[..., Tensor]:
    """The `attend` of an engine that is made at its first call, for the device, type and head size there.

    For other people's code, which moves and casts a model after it was patched.

    Args:
        how: further arguments of `make_engine`.
    """
    engines: dict[tuple, Engine] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, **settings) -> Tensor:
        head_dim, softcap = q.shape[-1], settings.get("softcap")
        place = (q.device, q.dtype, head_dim, softcap)
        if place not in engines:
            engine = make_engine(
                name, device=q.device, dtype=q.dtype, head_dim=head_dim, softcap=softcap, **how
            )
            logger.info("attention on %s in %s: %s", q.device, q.dtype, engine)
            engine.warm_up(
                heads=q.shape[1],
                kv_heads=k.shape[1],
                head_dim=head_dim,
                window=settings.get("sliding_window"),
                tell=logger.info,
            )
            engines[place] = engine
        return engines[place].attend(q, k, v, layout, **settings)

    return attend
