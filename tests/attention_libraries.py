"""Stand-ins for the attention libraries that need a GPU: dense attention behind their own signatures.

Each takes the arguments that the library takes, by the library's names and conventions (where a window's
limits lie, what -1 or None means, which lengths it trusts), computes on the CPU, and keeps every call. So a
kernel's entry can be held to the reference where none of the libraries runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from types import ModuleType

import pytest
import torch
from torch import Tensor

Calls = list[tuple[str, dict]]
"""(function, arguments by name) of every call, in order."""


def visible(queries: int, keys: int, left: int, right: int) -> Tensor:
    """(queries, keys) bool. The last query stands beside the last key; -1 is no limit."""
    distance = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if right >= 0:
        seen &= distance <= right
    if left >= 0:
        seen &= distance >= -left
    return seen


def rectangles(call: dict):
    """(queries, keys) slices of every span; a span longer than the call says is an error."""
    edges_q, edges_k = call["cu_seqlens_q"].tolist(), call["cu_seqlens_k"].tolist()
    for q0, q1, k0, k1 in zip(edges_q, edges_q[1:], edges_k, edges_k[1:], strict=False):
        assert q1 - q0 <= call["max_seqlen_q"] and k1 - k0 <= call["max_seqlen_k"]
        yield slice(q0, q1), slice(k0, k1)


def scores(call: dict, queries: slice, keys: slice, left: int, right: int) -> Tensor:
    """(H, queries, keys) in float64, -inf where nothing is seen."""
    q, k = call["q"][queries].double(), repeated(call["k"], call["q"])[keys].double()
    product = torch.einsum("qhd,khd->hqk", q, k) * call["softmax_scale"]
    if softcap := call.get("softcap"):
        product = softcap * torch.tanh(product / softcap)
    return product.masked_fill(~visible(len(q), len(k), left, right), -torch.inf)


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """(T, Hkv, D) -> (T, H, D)."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def forward(call: dict, left: int, right: int) -> tuple[Tensor, Tensor]:
    q, v = call["q"], repeated(call["v"], call["q"]).double()
    out = torch.full(q.shape, torch.nan, dtype=torch.float64)
    lse = torch.full((q.shape[1], len(q)), torch.nan, dtype=torch.float64)
    for queries, keys in rectangles(call):
        score = scores(call, queries, keys, left, right)
        lse[:, queries] = score.logsumexp(-1)
        out[queries] = torch.einsum("hqk,khd->qhd", score.softmax(-1), v[keys])
    return out.to(q.dtype), lse.to(torch.promote_types(q.dtype, torch.float32))


def backward(call: dict, left: int, right: int) -> tuple[Tensor, Tensor, Tensor]:
    """From the *given* out and lse, as the libraries do."""
    q, k, dout, out = (call[name].double() for name in ("q", "k", "dout", "out"))
    group = (k.shape[1], q.shape[1] // k.shape[1])
    k, v = repeated(k, q), repeated(call["v"], q).double()
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys in rectangles(call):
        score = scores(call, queries, keys, left, right)
        weight = (score - call["lse"][:, queries, None].double()).exp()
        dv[keys] = torch.einsum("hqk,qhd->khd", weight, dout[queries])
        dweight = torch.einsum("qhd,khd->hqk", dout[queries], v[keys])
        dscore = weight * (dweight - (dout[queries] * out[queries]).sum(-1).T[..., None])
        if softcap := call.get("softcap"):
            dscore *= 1 - (score / softcap).where(weight > 0, 0).square()
        dscore *= call["softmax_scale"]
        dq[queries] = torch.einsum("hqk,khd->qhd", dscore, k[keys])
        dk[keys] = torch.einsum("hqk,qhd->khd", dscore, q[queries])
    dk, dv = (x.unflatten(1, group).sum(2) for x in (dk, dv))
    return tuple(x.to(call["q"].dtype) for x in (dq, dk, dv))


def extras(number: int) -> tuple[None, ...]:
    """Values that a release returns behind those that anybody needs."""
    return (None,) * number


# --------------------------------------------------------------------------------------------------
# The libraries. Each is put in place by `stand_in(monkeypatch, kernel, calls, …)`.


def flash_attn_4(calls: Calls, more: int) -> dict[str, Callable]:
    """Without a limit a side is None; causal closes the right one."""

    def sides(call: dict) -> tuple[int, int]:
        left, right = call["window_size_left"], 0 if call["causal"] else call["window_size_right"]
        return -1 if left is None else left, -1 if right is None else right

    def _flash_attn_fwd(
        q,
        k,
        v,
        *,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        return_lse,
    ):
        call = dict(locals())
        calls.append(("forward", call))
        out, lse = forward(call, *sides(call))
        return (out, lse if return_lse else None, *extras(more))

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        *,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softcap,
        deterministic,
    ):
        call = dict(locals())
        calls.append(("backward", call))
        return (*backward(call, *sides(call)), *extras(more))

    def _validate_head_dims(head_dim, head_dim_v, compute_capability, alignment):
        assert head_dim % alignment == 0, f"({head_dim}, {head_dim_v}) is not supported"
        assert head_dim <= 128 or head_dim == 256 or compute_capability == 9, "too large"

    return locals()


def flash_attn_3(calls: Calls, more: int) -> dict[str, Callable]:
    """Without a limit a side is -1; causal closes the right one."""

    def _flash_attn_forward(
        q,
        k,
        v,
        *,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        num_splits,
    ):
        call = dict(locals())
        calls.append(("forward", call))
        right = 0 if causal else window_size_right
        return (*forward(call, window_size_left, right), *extras(more))

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        *,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dq,
        dk,
        dv,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        deterministic,
    ):
        call = {**locals(), "lse": softmax_lse}
        calls.append(("backward", call))
        right = 0 if is_causal else window_size_right
        for whole, found in zip((dq, dk, dv), backward(call, window_size_left, right), strict=True):
            whole.copy_(found)

    return locals()


def flash_attn(calls: Calls, more: int) -> dict[str, Callable]:
    def _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        softcap,
        window_size_left,
        window_size_right,
    ):
        call = dict(locals())
        calls.append(("forward", call))
        right = 0 if causal else window_size_right
        return (*forward(call, window_size_left, right), *extras(more))

    def _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
    ):
        call = {**locals(), "lse": softmax_lse}
        calls.append(("backward", call))
        right = 0 if causal else window_size_right
        for whole, found in zip((dq, dk, dv), backward(call, window_size_left, right), strict=True):
            whole.copy_(found)

    return locals()


def torch_varlen(calls: Calls, more: int) -> dict[str, Callable]:
    """PyTorch's own. Where `is_causal` is set, the sides of a window are not read."""

    def sides(call: dict) -> tuple[int, int]:
        if call["is_causal"]:
            return -1, 0
        return call["window_size_left"], call["window_size_right"]

    def _flash_attention_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        *,
        scale,
        window_size_left,
        window_size_right,
    ):
        call = {**locals(), "softmax_scale": scale}
        calls.append(("forward", call))
        return (*forward(call, *sides(call)), *extras(more))

    def _flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        is_causal,
        rng_state,
        unused,
        *,
        scale,
        window_size_left,
        window_size_right,
    ):
        call = {**locals(), "softmax_scale": scale}
        calls.append(("backward", call))
        return backward(call, *sides(call))

    return locals()


PLACES = {
    "flash_attn_4": (flash_attn_4, "flash_attn.cute.interface"),
    "flash_attn_3": (flash_attn_3, "flash_attn_interface"),
    "flash_attn": (flash_attn, "flash_attn.flash_attn_interface"),
    "torch_varlen": (torch_varlen, None),
}
"""kernel -> its library, and the module in which it is looked for (None: PyTorch's operators)."""


def stand_in(monkeypatch: pytest.MonkeyPatch, kernel: str, *, more: int = 2) -> Calls:
    """Put the stand-in for a kernel's library in its place; returns the calls that it will keep.

    Args:
        more: values that its functions return beyond those that anybody needs.
    """
    calls: Calls = []
    make, place = PLACES[kernel]
    functions = {n: f for n, f in make(calls, more).items() if n.startswith("_")}
    if place is None:
        for name, function in functions.items():
            monkeypatch.setattr(torch.ops.aten, name, function)
        return calls
    parts = place.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        if name not in sys.modules or end == len(parts):
            module = ModuleType(name)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, name, module)
            if end > 1:
                monkeypatch.setattr(
                    sys.modules[".".join(parts[: end - 1])], parts[end - 1], module, raising=False
                )
    vars(sys.modules[place]).update(functions)
    return calls


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], **versions: str
) -> None:
    """A CUDA device of that capability, with these packages alone (underscores for dashes)."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    installed = {name.replace("_", "-"): version for name, version in versions.items()}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
