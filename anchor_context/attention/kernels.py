"""FlashAttention-2 kernels behind one signature: the only file that calls their operators.

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
from dataclasses import dataclass
from importlib import metadata

import torch
from packaging.version import Version
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spans:
    """Which queries meet which keys: one rectangle (or causal triangle) per entry."""

    cu_seqlens_q: Tensor
    """(spans + 1,) int32."""
    cu_seqlens_k: Tensor
    """(spans + 1,) int32."""
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Kernel:
    """One library's variable-length attention.

    forward(q, k, v, spans, *, causal, scale, window) -> (out, lse)
    backward(dout, q, k, v, out, lse, spans, *, causal, scale, window) -> (dq, dk, dv)

    `window` is the number of tokens that a query sees of its span, itself included, or None.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    honours_window: bool
    unavailable: Callable[[torch.device, torch.dtype], str | None]
    """(device, dtype) -> why the kernel cannot run here, or None if it can."""


def choose_kernel(
    device: torch.device, dtype: torch.dtype, *, name: str | None = None
) -> tuple[Kernel, str]:
    """The fastest kernel that runs on `device`, or the one called `name`, with the reason.

    Raises:
        ValueError: the named kernel cannot run here, or none can; the message says why.
    """
    candidates = list(KERNELS.values()) if name is None else [_kernel_named(name)]
    reasons = []
    for kernel in candidates:
        reason = kernel.unavailable(device, dtype)
        if reason is None:
            why = "; ".join(reasons) or ("--attn_kernel" if name else "the first choice runs here")
            return kernel, why
        reasons.append(f"{kernel.name}: {reason}")
    raise ValueError(
        f"no FlashAttention kernel for {dtype} on {device.type}: {'; '.join(reasons)}. "
        "Take what runs here instead: no kernel by name (--attn_kernel left out), or the flex engine "
        "(--attn_engine flex)"
    )


def _kernel_named(name: str) -> Kernel:
    if name not in KERNELS:
        raise ValueError(f"--attn_kernel {name} is unknown; choose from {list(KERNELS)}")
    return KERNELS[name]


# --- flash-attn, the package ----------------------------------------------------------------------


def _flash_attn_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return "the package flash-attn is not installed"
    if Version(version) < Version("2.7"):
        return f"flash-attn {version} is older than 2.7, and its functions take other arguments"
    if reason := _needs_cuda_and_half(device, dtype):
        return reason
    try:
        import flash_attn.flash_attn_interface  # noqa: F401
    except ImportError as error:  # built for another torch, for instance
        return f"flash-attn {version} is installed but does not load ({error})"
    return None


def _needs_cuda_and_half(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return (
            f"computes in bfloat16 or float16, not {dtype}: load or cast the model to bfloat16 "
            "(--mixed_precision bf16)"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs a GPU of compute capability 8.0 or newer, not {major}.{minor}"
    return None


def _flash_attn_forward(q, k, v, spans, *, causal, scale, window):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(
        q,
        k,
        v,
        spans.cu_seqlens_q,
        spans.cu_seqlens_k,
        spans.max_seqlen_q,
        spans.max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        **_window_sides(causal, window),
    )
    return out, lse


def _flash_attn_backward(dout, q, k, v, out, lse, spans, *, causal, scale, window):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        spans.cu_seqlens_q,
        spans.cu_seqlens_k,
        spans.max_seqlen_q,
        spans.max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        **_window_sides(causal, window),
    )
    return dq, dk, dv


def _window_sides(causal: bool, window: int | None) -> dict[str, int]:
    """How many keys to the left and right of itself a query sees; -1 is no limit."""
    left = -1 if window is None else window - 1
    return {"window_size_left": left, "window_size_right": 0 if causal else -1}


# --- PyTorch's FlashAttention-2 on CUDA -----------------------------------------------------------
# torch.nn.attention.varlen.varlen_attn is a wrapper over these two operators. Its own signature moved
# between releases and hides the backward; of theirs, only optional keywords came between 2.11 and 2.13.


def _torch_varlen_forward(q, k, v, spans, *, causal, scale, window):
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        spans.cu_seqlens_q,
        spans.cu_seqlens_k,
        spans.max_seqlen_q,
        spans.max_seqlen_k,
        0.0,  # dropout
        causal and window is None,  # a window states causality by its right side
        False,  # return_debug_mask
        scale=scale,
        **_window_sides(causal, window),
    )
    return out, lse


def _torch_varlen_backward(dout, q, k, v, out, lse, spans, *, causal, scale, window):
    return torch.ops.aten._flash_attention_backward(
        dout.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        spans.cu_seqlens_q,
        spans.cu_seqlens_k,
        spans.max_seqlen_q,
        spans.max_seqlen_k,
        0.0,  # dropout
        causal and window is None,
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # random state, unused without dropout
        torch.empty(0, device=q.device),
        scale=scale,
        **_window_sides(causal, window),
    )


# --- PyTorch's flash kernel for the CPU -----------------------------------------------------------
# It takes one rectangle at a time, so the spans are a Python loop. Slicing under autograd would pad
# every slice's gradient to the full row; here each span writes its part of one preallocated result.


def _torch_cpu_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" else f"needs the CPU, not {device.type}"


def _torch_cpu_forward(q, k, v, spans, *, causal, scale, window):
    assert window is None
    out = torch.empty_like(q)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(q.shape[1], q.shape[0], dtype=lse_dtype)
    for queries, keys in _rectangles(spans, causal=causal):
        out_HTD, lse_HT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q[queries]),
            _heads_first(k[keys]),
            _heads_first(v[keys]),
            0.0,
            causal,
            scale=scale,
        )
        out[queries] = out_HTD[0].transpose(0, 1)
        lse[:, queries] = lse_HT[0]
    return out, lse


def _torch_cpu_backward(dout, q, k, v, out, lse, spans, *, causal, scale, window):
    assert window is None
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys in _rectangles(spans, causal=causal):
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(dout[queries]),
            _heads_first(q[queries]),
            _heads_first(k[keys]),
            _heads_first(v[keys]),
            _heads_first(out[queries]),
            lse[None, :, queries],
            0.0,
            causal,
            scale=scale,
        )
        for whole, part, where in zip((dq, dk, dv), gradients, (queries, keys, keys), strict=True):
            whole[where] = part[0].transpose(0, 1)
    return dq, dk, dv


def _rectangles(spans: Spans, *, causal: bool):
    """(query slice, key slice) of every span that is not empty."""
    edges_q, edges_k = spans.cu_seqlens_q.tolist(), spans.cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(edges_q, edges_q[1:], edges_k, edges_k[1:], strict=False):
        assert not causal or q1 - q0 == k1 - k0, "a causal span is square"
        # This kernel does not need the maxima, but the CUDA kernels compute nothing beyond them.
        assert q1 - q0 <= spans.max_seqlen_q and k1 - k0 <= spans.max_seqlen_k, "maxima too small"
        if q1 > q0:
            yield slice(q0, q1), slice(k0, k1)


def _heads_first(x: Tensor) -> Tensor:
    """(T, H, D) -> (1, H, T, D), a view."""
    return x.transpose(0, 1).unsqueeze(0)


KERNELS = {
    kernel.name: kernel
    for kernel in (  # in the order of preference
        Kernel(
            name="flash_attn",
            forward=_flash_attn_forward,
            backward=_flash_attn_backward,
            honours_window=True,
            unavailable=_flash_attn_unavailable,
        ),
        Kernel(
            name="torch_varlen",
            forward=_torch_varlen_forward,
            backward=_torch_varlen_backward,
            honours_window=True,
            unavailable=_needs_cuda_and_half,
        ),
        Kernel(
            name="torch_cpu",
            forward=_torch_cpu_forward,
            backward=_torch_cpu_backward,
            honours_window=False,
            unavailable=_torch_cpu_unavailable,
        ),
    )
}
