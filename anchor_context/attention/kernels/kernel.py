"""What a kernel is, and what the libraries' kernels have in common.

A kernel is a pair of plain functions without autograd, because the ring needs the pieces: `forward`
returns the output *and* its log-sum-exp, `backward` takes them again. The flash engine and the
document-aware ring wrap the same pair in their own autograd functions.

Shapes and names (flash-attn's):
    q, out, dout, dq        (Tq, H, D)     tokens of all spans one after the other, H query heads
    k, v, dk, dv            (Tk, Hkv, D)   Hkv divides H: grouped-query heads stay grouped
    lse                     (H, Tq)        float32 (float64 for float64 inputs)
A span is one rectangle: queries cu_seqlens_q[i] … cu_seqlens_q[i+1] against the keys
cu_seqlens_k[i] … cu_seqlens_k[i+1]. A causal span has as many queries as keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata

import torch
from packaging.version import Version
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spans:
    """Which queries meet which keys: one rectangle (or causal triangle) per entry. One without queries may
    have keys (their gradients are 0), but not the other way round."""

    cu_seqlens_q: Tensor
    """(spans + 1,) int32."""
    cu_seqlens_k: Tensor
    """(spans + 1,) int32."""
    max_seqlen_q: int
    """At least the queries of the longest span."""
    max_seqlen_k: int


@dataclass(frozen=True)
class Kernel:
    """One library's variable-length attention.

    forward(q, k, v, spans, *, causal, scale, window) -> (out, lse)
    backward(dout, q, k, v, out, lse, spans, *, causal, scale, window, deterministic=False) -> (dq, dk, dv)

    `window` is the number of tokens that a query sees of its causal span, itself included, or None. Those
    that cap scores take `softcap` as well, a number or None: call `capped`.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    unavailable: Callable[..., str | None]
    """(device, dtype, head_dim=None) -> why the kernel cannot run here, or None if it can. A `head_dim`
    of None is one that nobody knows yet, and no reason."""
    not_deterministic: Callable[[torch.device, int | None], str | None]
    """(device, head_dim) -> why two backwards may differ in bits even where `choose_kernel` was asked for a
    deterministic one, or None."""
    no_softcap: Callable[..., str | None]
    """(device=None, head_dim=None) -> why the kernel cannot cap scores, or None if it can: if `forward` and
    `backward` take `softcap`. What is None nobody knows yet, and is no reason."""
    compiles: bool = False
    """Compiles at its first call, some seconds for each kind of call: see `warm_up`."""

    def capped(self, softcap: float | None) -> Kernel:
        """The kernel for scores `softcap · tanh(score / softcap)` (Gemma 2); itself where that is None.

        Raises:
            ValueError: it has none.
        """
        if softcap is None:
            return self
        if reason := self.no_softcap():
            raise ValueError(
                f"the kernel {self.name} {reason}, and the model's attn_logit_softcapping={softcap} asks for "
                "that: use --attn_engine flex"
            )
        return replace(
            self,
            forward=partial(self.forward, softcap=softcap),
            backward=partial(self.backward, softcap=softcap),
        )


# --------------------------------------------------------------------------------------------------
# What the entries ask


def cuda_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no CUDA kernel can run: the device or the type; None if one can."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return (
            f"computes in bfloat16 or float16, not {dtype}: load or cast the model to bfloat16 "
            "(--mixed_precision bf16)"
        )
    return None


def flash_2_reason(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """Why FlashAttention-2, the package's or PyTorch's, cannot run; None if it can."""
    if reason := cuda_reason(device, dtype):
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs a GPU of compute capability 8.0 or newer, not {major}.{minor}"
    return head_dim_reason(head_dim)


def head_dim_reason(head_dim: int | None) -> str | None:
    """Why FlashAttention-2 and -3 cannot compute heads of this size; None if they can."""
    if head_dim is not None and (head_dim % 8 or head_dim > 256):
        return f"computes heads of a multiple of 8 up to 256, and these have {head_dim}"
    return None


def version_reason(package: str, at_least: str) -> str | None:
    """Why an installed package cannot serve: it is not there, or too old; None if it can."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"the package {package} is not installed"
    if Version(version) < Version(at_least):
        return (
            f"{package} {version} is older than {at_least}, and its functions take other arguments"
        )
    return None


def window_sides(causal: bool, window: int | None) -> dict[str, int]:
    """How many keys to the left and right of itself a query sees; -1 is no limit (FlashAttention-2, -3)."""
    left = -1 if window is None else window - 1
    return {"window_size_left": left, "window_size_right": 0 if causal else -1}


def caps_scores(device: torch.device | None = None, head_dim: int | None = None) -> None:
    """`Kernel.no_softcap` of a kernel that can always cap them."""


def caps_no_scores(device: torch.device | None = None, head_dim: int | None = None) -> str:
    """`Kernel.no_softcap` of a kernel that has no caps."""
    return "does not cap scores"


def always_deterministic(device: torch.device, head_dim: int | None) -> None:
    """`Kernel.not_deterministic` of a kernel that always can be."""
