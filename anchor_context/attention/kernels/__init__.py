"""FlashAttention kernels behind one signature: the only room that calls the attention libraries.

A kernel is one entry of `KERNELS`, made in the file of its library; every list of kernels (flags, messages,
benchmarks, tests) is derived from it. `kernel.py` says what a kernel is, with shapes; `large.py` keeps the
calls of every CUDA kernel below 2³¹ elements.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

import torch

from anchor_context.attention.kernels import flash_attn_2, flash_attn_3, flash_attn_4, pytorch
from anchor_context.attention.kernels.kernel import Kernel, Spans, version_reason
from anchor_context.attention.kernels.large import in_pieces

__all__ = ["KERNELS", "Kernel", "Spans", "choose_kernel", "faster_kernel_hint", "warm_up"]

KERNELS = {
    kernel.name: kernel
    # In the order of preference. On an H100 FlashAttention-4 took 0.51 to 0.60 of FlashAttention-2's time,
    # forward and backward, with heads of 64 and 128. FlashAttention-3 was not measured here.
    for kernel in (
        in_pieces(flash_attn_4.KERNEL),
        in_pieces(flash_attn_3.KERNEL),
        in_pieces(flash_attn_2.KERNEL),
        in_pieces(pytorch.CUDA_KERNEL),
        pytorch.CPU_KERNEL,
    )
}
FLASH_ATTENTION_2 = (flash_attn_2.KERNEL.name, pytorch.CUDA_KERNEL.name)


def choose_kernel(
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int | None = None,
    name: str | None = None,
    deterministic: bool = False,
    softcap: float | None = None,
) -> tuple[Kernel, str]:
    """The fastest kernel that runs on `device`, or the one called `name`, with the reason.

    Args:
        head_dim: of q, k and v; None if nobody knows yet.
        deterministic: whether its backward must give the same bits every time. Where PyTorch's switch decides
            (torch.use_deterministic_algorithms), it must be on already.
        softcap: the cap of the model's scores, which the kernel must be able to compute; None without one.

    Raises:
        ValueError: the named kernel cannot run here, or none can; the message says why.
    """
    candidates = list(KERNELS.values()) if name is None else [_kernel_named(name)]
    refused: dict[str, list[str]] = {}
    for kernel in candidates:
        reason = kernel.unavailable(device, dtype, head_dim)
        if reason is None and deterministic:
            reason = kernel.not_deterministic(device, head_dim)
        if reason is None and softcap is not None:
            reason = kernel.no_softcap(device, head_dim)
        if reason is None:
            if deterministic:
                kernel = replace(kernel, backward=partial(kernel.backward, deterministic=True))
            chosen_by = "--attn_kernel" if name else "the first choice runs here"
            return kernel, _in_words(refused) or chosen_by
        refused.setdefault(reason, []).append(kernel.name)
    remedies = "no kernel by name (--attn_kernel left out), or the flex engine (--attn_engine flex)"
    capped = "" if softcap is None else f" with attn_logit_softcapping={softcap}"
    raise ValueError(
        f"no FlashAttention kernel for {dtype} on {device.type}{capped}: {_in_words(refused)}. "
        f"Take what runs here instead: {remedies}"
        + (", or leave out --deterministic" if deterministic else "")
    )


def _in_words(refused: dict[str, list[str]]) -> str:
    """{reason: kernels} as "kernel, kernel: reason; …"."""
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in refused.items())


def _kernel_named(name: str) -> Kernel:
    if name not in KERNELS:
        raise ValueError(f"--attn_kernel {name} is unknown; choose from {list(KERNELS)}")
    return KERNELS[name]


def faster_kernel_hint(device: torch.device, chosen: str) -> str | None:
    """Where a faster kernel than `chosen`, a kernel's name, could be installed: how, and what it gains."""
    if device.type != "cuda" or chosen not in FLASH_ATTENTION_2:
        return None
    missing = version_reason(flash_attn_4.PACKAGE, flash_attn_4.AT_LEAST)
    if missing is None or flash_attn_4.capability_reason(device) is not None:
        return None
    extra = "[cu13]" if (torch.version.cuda or "").startswith("13.") else ""
    return (
        f'pip install "{flash_attn_4.PACKAGE}{extra}" makes attention 1.7 to 1.9 × as fast as {chosen} '
        "(measured on an H100)"
    )


def warm_up(
    kernel: Kernel,
    *,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    windows: Collection[int | None] = (None,),
    rectangles: bool = False,
    softcap: float | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Make a kernel that compiles do so now, and `tell` how long it took; does nothing for the others.

    A tiny forward and backward for each kind of call that training makes, of few and of many spans: causal,
    for each of `windows`, and `rectangles`, which a ring computes, and anchors that a window hides. With the
    model's `softcap`.
    """
    if not kernel.compiles:
        return
    started, kernel = time.perf_counter(), kernel.capped(softcap)
    kinds = [(True, window) for window in windows] + [(False, None)] * rectangles
    for (causal, window), number in itertools.product(kinds, (1, flash_attn_4.MANY_SPANS)):
        length = 8  # one token might be a case of its own
        edges = length * torch.arange(number + 1, dtype=torch.int32, device=device)
        q = torch.zeros(number * length, heads, head_dim, dtype=dtype, device=device)
        k = torch.zeros(number * length, kv_heads, head_dim, dtype=dtype, device=device)
        spans = Spans(edges, edges, length, length)
        settings = {"causal": causal, "scale": 1.0, "window": window}
        out, lse = kernel.forward(q, k, k, spans, **settings)
        kernel.backward(out, q, k, k, out, lse, spans, **settings)
    tell(f"compiling attention, {time.perf_counter() - started:.0f} s ({kernel.name})")
