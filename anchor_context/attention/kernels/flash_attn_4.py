"""FlashAttention-4, the package flash-attn-4: compiled on the spot for Hopper and data-centre Blackwell.

Costs: each kind of call (causal or not, with a window or not, few or many spans) compiles at its first use,
some 7 s on an H100. What it compiles depends on which *kind* the maxima of the spans are, one tile or more;
they are bounds and no more, so they are rounded up here until that never differs. `kernels.warm_up` makes a
tiny call of each kind before training. See `kernel.py` for shapes.
"""

from __future__ import annotations

from importlib import metadata

import torch
from packaging.version import Version

from anchor_context.attention.kernels.kernel import Kernel, Spans, cuda_reason, version_reason

PACKAGE = "flash-attn-4"
AT_LEAST = "4.0.0b19"
DETERMINISTIC_256_FROM = "4.0.0b34"
"""On Blackwell, heads of 256 have a kernel of their own, whose backward could not be deterministic before."""
SOFTCAP_FROM = "4.0.0b24"
"""Before, the backward of documents (cu_seqlens) took no function of the scores, and a cap is one."""
MANY_SPANS = 257
"""From so many spans on, another specialisation is compiled, with a table of tiles."""
SEVERAL_TILES = 1024
"""Tokens that are more than one tile in every kernel of the library (at most 256 today)."""


def capability_reason(device: torch.device) -> str | None:
    """Why the library has nothing for this GPU; None if it has."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"is for GPUs of compute capability 9.0 and newer, not {major}.{minor}"
    if major > 11:
        return (
            f"has but FlashAttention-2's way for compute capability {major}.{minor}, and some releases of it "
            "forget a window in the backward"
        )
    return None


def unavailable(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    reason = (
        cuda_reason(device, dtype) or capability_reason(device) or version_reason(PACKAGE, AT_LEAST)
    )
    if reason is not None:
        return reason
    try:
        from flash_attn.cute import interface
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # noqa: F401
    except (
        ImportError,
        AttributeError,
        OSError,
    ) as error:  # CUTLASS of another release, for instance
        return f"{PACKAGE} is installed but does not load ({error})"
    validate = getattr(interface, "_validate_head_dims", None)
    if head_dim is not None and validate is not None:
        try:
            validate(head_dim, head_dim, torch.cuda.get_device_capability(device)[0], 8)
        except AssertionError as error:
            return str(error)
    return None


def not_deterministic(device: torch.device, head_dim: int | None) -> str | None:
    blackwell = torch.cuda.get_device_capability(device)[0] > 9
    if blackwell and head_dim == 256:
        version = metadata.version(PACKAGE)
        if Version(version) < Version(DETERMINISTIC_256_FROM):
            return (
                f"{PACKAGE} {version} has no deterministic backward for heads of 256 on Blackwell "
                f"({DETERMINISTIC_256_FROM} has)"
            )
    return None


def no_softcap(device: torch.device | None = None, head_dim: int | None = None) -> str | None:
    if reason := version_reason(PACKAGE, SOFTCAP_FROM):
        return f"does not cap scores ({reason})"
    if device is not None and head_dim == 256 and torch.cuda.get_device_capability(device)[0] > 9:
        return "does not cap scores of heads of 256 on Blackwell"
    return None


def forward(q, k, v, spans, *, causal, scale, window, softcap=None):
    from flash_attn.cute.interface import _flash_attn_fwd

    # Releases add values behind these two.
    out, lse, *_ = _flash_attn_fwd(
        q,
        k,
        v,
        return_lse=True,
        softcap=softcap or 0.0,
        **_settings(spans, causal=causal, scale=scale, window=window),
    )
    return out, lse


def backward(
    dout, q, k, v, out, lse, spans, *, causal, scale, window, softcap=None, deterministic=False
):
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv, *_ = _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softcap=softcap or 0.0,
        deterministic=deterministic,
        **_settings(spans, causal=causal, scale=scale, window=window),
    )
    return dq, dk, dv


def _settings(spans: Spans, *, causal: bool, scale: float, window: int | None) -> dict:
    return {
        "cu_seqlens_q": spans.cu_seqlens_q,
        "cu_seqlens_k": spans.cu_seqlens_k,
        "max_seqlen_q": max(spans.max_seqlen_q, SEVERAL_TILES),
        "max_seqlen_k": max(spans.max_seqlen_k, SEVERAL_TILES),
        "softmax_scale": scale,
        "causal": causal,
        # None is no limit; with a left side given, the library asks for the right one too.
        "window_size_left": None if window is None else window - 1,
        "window_size_right": 0 if causal and window is not None else None,
    }


KERNEL = Kernel(
    name="flash_attn_4",
    forward=forward,
    backward=backward,
    unavailable=unavailable,
    not_deterministic=not_deterministic,
    no_softcap=no_softcap,
    compiles=True,
)
