"""The kernels: what each entry hands to its library, which is chosen and why, and calls that are too large.

Libraries that need a GPU are stand-ins (`tests/attention_libraries.py`); `tests/gpu` runs the real ones.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import train
from anchor_context import engine
from anchor_context.attention import flash, kernels, reference
from anchor_context.attention.kernels import (
    KERNELS,
    Kernel,
    Spans,
    choose_kernel,
    faster_kernel_hint,
    flash_attn_4,
    large,
    pytorch,
    warm_up,
)
from anchor_context.attention.patterns import PATTERNS, make_layout
from anchor_context.integrations.models import attention_heads
from anchor_context.parallel.groups import RankGrid
from anchor_context.run.determinism import compute_deterministically
from tests.attention_libraries import PLACES, pretend_gpu, stand_in

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16
HEADS, KV_HEADS, HEAD_DIM = 8, 1, 16
H100, B200, A100, RTX_5090 = (9, 0), (10, 0), (8, 0), (12, 0)
ALL = {"flash_attn_4": "4.0.0b36", "flash_attn": "2.8.3"}
"""Packages with everything in them."""


def span_tensors(queries: int, keys: int, *, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v, dout in float64."""
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys), (HEADS, queries)
    make = partial(torch.randn, dtype=torch.float64, generator=generator)
    return [make(tokens, number, HEAD_DIM) for number, tokens in heads]


def spans_of(queries: list[int], keys: list[int]) -> Spans:
    edges = [torch.tensor(np.cumsum([0, *x]), dtype=torch.int32) for x in (queries, keys)]
    return Spans(*edges, max(queries), max(keys))


def close(found, expected) -> bool:
    return all(torch.allclose(f, e, atol=1e-12) for f, e in zip(found, expected, strict=True))


@pytest.fixture
def put(monkeypatch):
    """put(kernel): the stand-in for its library in its place, where it has one; the calls it keeps."""

    def put(name: str, **settings):
        return stand_in(monkeypatch, name, **settings) if name in PLACES else []

    return put


def test_every_kernel_of_a_library_has_a_stand_in():
    assert set(PLACES) | {"torch_cpu"} == set(KERNELS)


# --------------------------------------------------------------------------------------------------
# What the entries compute


@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("pattern", ["intra_doc", "anchor"])
@pytest.mark.parametrize("window", [None, 1, 100, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_computes_documents_as_the_reference_does(name, window, pattern, more, put):
    """Documents of 1, 127, 128 and 129 tokens, 8 heads over 1; `more` values come back than are needed."""
    kernel = KERNELS[name]
    calls = put(name, more=more)
    layout = make_layout(
        np.cumsum([0, 1, 127, 128]),
        batch_size=1,
        row_length=385,
        pattern=pattern,
        anchor_placement=PATTERNS[pattern].placement("per_document"),
    )
    q, k, v, dout = (x.transpose(0, 1)[None] for x in span_tensors(385, 385))
    found, expected = [], []
    for results, attend in (
        (expected, reference.attend),
        (found, partial(flash.attend, kernel=kernel)),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, layout, scale=0.3, sliding_window=window)
        out.backward(dout)
        results += [out.detach(), *(leaf.grad for leaf in leaves)]
    assert close(found, expected)
    # One more call, of one key each, where a window hides anchors.
    each = 2 if pattern == "anchor" and window else 1
    made = [*["forward"] * each, *["backward"] * each]
    assert [function for function, _ in calls] == made * (name in PLACES)


CAPPING = ("flash_attn_4", "flash_attn_3", "flash_attn")


@pytest.mark.parametrize("sinks", [None, torch.linspace(-2, 2, HEADS, dtype=torch.float64)])
@pytest.mark.parametrize("name", CAPPING)
def test_kernels_that_cap_scores_do_so_as_the_reference_does(name, sinks, put, monkeypatch):
    """And what the cap changes in the log-sum-exp reaches a sink."""
    calls = put(name)
    pretend_gpu(monkeypatch, H100, **ALL)
    layout = make_layout(
        np.array([0, 1, 20]),
        batch_size=1,
        row_length=50,
        pattern="intra_doc",
        anchor_placement="none",
    )
    q, k, v, dout = (x.transpose(0, 1)[None] for x in span_tensors(50, 50))
    found, expected = [], []
    for results, attend in (
        (expected, reference.attend),
        (found, partial(flash.attend, kernel=KERNELS[name])),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, layout, scale=0.3, softcap=0.7, sinks=sinks)
        out.backward(dout)
        results += [out.detach(), *(leaf.grad for leaf in leaves)]
    assert close(found, expected)
    assert [call["softcap"] for _, call in calls] == [0.7, 0.7]


@pytest.mark.parametrize(
    ("name", "capability", "version", "head_dim", "says"),
    [
        ("flash_attn_4", H100, "4.0.0b24", 256, None),
        ("flash_attn_4", H100, "4.0.0b23", 256, r"does not cap scores \(flash-attn-4 4.0.0b23"),
        ("flash_attn_4", B200, "4.0.0b24", 128, None),
        ("flash_attn_4", B200, "4.0.0b24", 256, "does not cap scores of heads of 256 on Blackwell"),
        ("flash_attn", A100, "2.8.3", 256, None),
        ("torch_varlen", A100, "", 128, "torch_varlen does not cap scores.*--attn_engine flex"),
    ],
)
def test_a_named_kernel_without_caps_is_refused(
    name, capability, version, head_dim, says, put, monkeypatch
):
    put(name)
    pretend_gpu(monkeypatch, capability, **({name: version} if version else {}))
    how = {"device": CUDA, "dtype": BF16, "head_dim": head_dim, "kernel": name}
    with nullcontext() if says is None else pytest.raises(ValueError, match=says):
        assert engine.make_engine("flash", **how, softcap=50.0).kernel == name
    assert engine.make_engine("flash", **how).kernel == name


def test_an_automatic_choice_passes_over_kernels_without_caps(put, monkeypatch):
    put("flash_attn_4")
    put("flash_attn")
    pretend_gpu(monkeypatch, H100, flash_attn_4="4.0.0b20", flash_attn="2.8.3")
    kernel, reason = choose_kernel(CUDA, BF16, softcap=50.0)
    assert kernel.name == "flash_attn" and "flash_attn_4: does not cap scores" in reason
    assert choose_kernel(CUDA, BF16)[0].name == "flash_attn_4"
    says = "on cpu with attn_logit_softcapping=50.0: .*torch_cpu: does not cap scores.*engine flex"
    with pytest.raises(ValueError, match=says):
        choose_kernel(CPU, torch.float32, softcap=50.0)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_computes_rectangles(name, put):
    """As a ring needs them: unequal, of one query, without queries, and without anything."""
    put(name)
    queries, keys = [5, 0, 3, 0, 1, 0], [2, 4, 3, 0, 7, 1]
    q, k, v, dout = span_tensors(sum(queries), sum(keys))
    spans = spans_of(queries, keys)
    settings = {"causal": False, "scale": 0.3, "window": None}
    out, lse = KERNELS[name].forward(q, k, v, spans, **settings)
    gradients = KERNELS[name].backward(dout, q, k, v, out, lse, spans, **settings)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    parts = zip(
        *(x.split(n) for x, n in zip(leaves, (queries, keys, keys), strict=True)), strict=True
    )
    expected = torch.cat(
        [
            scaled_dot_product_attention(
                *(x.transpose(0, 1) for x in part), scale=0.3, enable_gqa=True
            ).transpose(0, 1)
            for part in parts
            if len(part[0])
        ]
    )
    expected.backward(dout)
    assert close([out, *gradients], [expected, *(leaf.grad for leaf in leaves)])
    first = torch.einsum("qhd,kd->hqk", q[:5], k[:2, 0]) * 0.3
    assert lse.shape == (HEADS, sum(queries)) and torch.allclose(lse[:, :5], first.logsumexp(-1))


@pytest.mark.parametrize("name", PLACES)
def test_a_backward_takes_the_log_sum_exp_of_more_than_its_own_keys(name, put):
    """The ring's parts: with the whole row's out and lse, their gradients are summands of the row's."""
    put(name)
    kernel = KERNELS[name]
    settings = {"causal": False, "scale": 0.3, "window": None}
    q, k, v, dout = span_tensors(6, 9)
    whole = spans_of([6], [9])
    out, lse = kernel.forward(q, k, v, whole, **settings)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, whole, **settings)
    parts = [
        kernel.backward(dout, q, k[cut], v[cut], out, lse, spans_of([6], [n]), **settings)
        for cut, n in ((slice(0, 4), 4), (slice(4, 9), 5))
    ]
    dqs, dks, dvs = zip(*parts, strict=True)
    assert close([sum(dqs), torch.cat(dks), torch.cat(dvs)], [dq, dk, dv])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [name for name, (_, place) in PLACES.items() if place is not None])
def test_what_the_libraries_are_called_with(name, causal, window, deterministic, put, monkeypatch):
    calls = put(name)
    pretend_gpu(monkeypatch, H100 if name != "flash_attn" else A100, **ALL)
    kernel, _ = choose_kernel(CUDA, BF16, name=name, deterministic=deterministic)
    q, k, v, dout = span_tensors(6, 6)
    spans = spans_of([4, 2], [4, 2])
    settings = {"causal": causal, "scale": 0.3, "window": window}
    out, lse = kernel.forward(q, k, v, spans, **settings)
    kernel.backward(dout, q, k, v, out, lse, spans, **settings)

    (_, forward), (_, backward) = calls
    left, right = {
        ("flash_attn_4", None): (None, None),
        ("flash_attn_4", 7): (6, 0 if causal else None),
    }.get((name, window), (-1 if window is None else 6, 0 if causal else -1))
    for call in (forward, backward):
        assert call["cu_seqlens_q"] is spans.cu_seqlens_q
        assert call["cu_seqlens_k"] is spans.cu_seqlens_k
        assert call["softmax_scale"] == 0.3
        assert (call["window_size_left"], call["window_size_right"]) == (left, right)
        assert call.get("is_causal", call.get("causal")) == causal
        assert call["q"] is q and call["k"] is k and call["v"] is v
        assert call.get("dropout_p", 0.0) == 0.0 and call.get("num_splits", 1) == 1
        # FlashAttention-4 compiles anew where a maximum is one tile: no maximum ever is.
        assert call["max_seqlen_q"] == call["max_seqlen_k"] == (1024 if name[-1] == "4" else 4)
    assert backward["deterministic"] is deterministic
    assert backward["dout"] is dout and backward["out"] is out and backward["lse"] is lse


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_the_calls_of_pytorch_s_cuda_kernel_fit_its_operators(causal, window):
    """On the device "meta", which computes nothing, but checks arguments and gives shapes."""
    kernel = KERNELS["torch_varlen"]
    q, k = (torch.empty(64, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    edges = torch.empty(4, dtype=torch.int32, device="meta")
    spans = Spans(edges, edges, 32, 32)
    settings = {"causal": causal, "scale": 0.25, "window": window}
    out, lse = kernel.forward(q, k, k, spans, **settings)
    gradients = kernel.backward(out, q, k, k, out, lse, spans, **settings)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (4, 64) and lse.dtype == torch.float32
    assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]


def test_the_cpu_kernel_holds_spans_to_the_maxima_that_cuda_kernels_need():
    q, k, v, _ = span_tensors(256, 256)
    spans = replace(spans_of([256], [256]), max_seqlen_q=255)
    with pytest.raises(AssertionError, match="maxima too small"):
        KERNELS["torch_cpu"].forward(q, k, v, spans, causal=True, scale=1.0, window=None)


def test_the_cpu_kernel_reads_heads_whose_numbers_lie_apart():
    """As those of gpt-oss with heads of 2, whose halves transformers joins so."""
    layout = make_layout(
        np.array([0, 3]),
        batch_size=1,
        row_length=8,
        pattern="intra_doc",
        anchor_placement="none",
    )
    *inputs, dout = (x.transpose(0, 1)[None] for x in span_tensors(8, 8))
    dout = dout.mT.contiguous().mT
    found = []
    for attend in (reference.attend, partial(flash.attend, kernel=KERNELS["torch_cpu"])):
        leaves = [x.mT.contiguous().mT.requires_grad_() for x in inputs]
        assert all(leaf.stride(-1) > 1 for leaf in leaves)
        out = attend(*leaves, layout, scale=0.3)
        out.backward(dout)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert close(*found)


def test_queries_without_keys_are_a_mistake_not_a_crash_of_the_process():
    q, k, v, _ = span_tensors(3, 0)
    with pytest.raises(AssertionError, match="has keys"):
        KERNELS["torch_cpu"].forward(
            q, k, v, spans_of([3], [0]), causal=False, scale=1.0, window=None
        )


# --------------------------------------------------------------------------------------------------
# The choice of a kernel


def test_the_kernel_choice_says_why():
    kernel, reason = choose_kernel(CPU, torch.float32)
    assert kernel.name == "torch_cpu"
    assert "flash_attn" in reason and "torch_varlen: needs a CUDA device" in reason
    assert reason.count("needs a CUDA device") == 1, "one reason, one mention"


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "torch_cpu"])
def test_a_forced_kernel_that_cannot_run_says_why(name):
    with pytest.raises(ValueError, match=f"{name}: .*(not installed|needs a CUDA device)"):
        choose_kernel(CPU, torch.bfloat16, name=name)


@pytest.mark.parametrize(
    ("version", "capability", "says"),
    [
        ("2.6.3", (9, 0), "older than 2.7"),
        ("2.8.3", (7, 5), "compute capability 8.0 or newer, not 7.5"),
        ("2.8.3", (9, 0), "installed but does not load"),  # it is not there to be imported
    ],
)
def test_a_flash_attn_that_would_fail_is_not_chosen(monkeypatch, version, capability, says):
    pretend_gpu(monkeypatch, capability, flash_attn=version)
    reason = KERNELS["flash_attn"].unavailable(torch.device("cuda"), torch.bfloat16)
    assert says in reason
    if capability >= (8, 0):
        chosen, why = choose_kernel(torch.device("cuda"), torch.bfloat16)
        assert chosen.name == "torch_varlen" and says in why


@pytest.mark.parametrize(
    ("name", "capability", "versions", "dtype", "head_dim", "says"),
    [
        ("flash_attn_4", A100, ALL, BF16, 64, "compute capability 9.0 and newer, not 8.0"),
        ("flash_attn_4", RTX_5090, ALL, BF16, 64, "compute capability 12.0"),
        ("flash_attn_4", H100, {}, BF16, 64, "package flash-attn-4 is not installed"),
        ("flash_attn_4", H100, {"flash_attn_4": "4.0.0b18"}, BF16, 64, "older than 4.0.0b19"),
        ("flash_attn_4", H100, {"flash_attn_4": "4.0.0b19"}, BF16, 64, None),
        ("flash_attn_4", H100, {"flash_attn_4": "4.0.0"}, BF16, 64, None),
        ("flash_attn_4", H100, ALL, torch.float32, 64, "bfloat16 or float16, not torch.float32"),
        ("flash_attn_4", H100, ALL, BF16, 60, "(60, 60) is not supported"),
        ("flash_attn_4", H100, ALL, BF16, 192, None),
        ("flash_attn_4", B200, ALL, BF16, 192, "too large"),
        ("flash_attn_4", B200, ALL, BF16, 256, None),
        ("flash_attn_4", (11, 0), ALL, BF16, None, None),
        ("flash_attn_3", A100, {}, BF16, 64, "for Hopper, compute capability 9.x, not 8.0"),
        ("flash_attn_3", B200, {}, BF16, 64, "for Hopper, compute capability 9.x, not 10.0"),
        ("flash_attn_3", H100, {}, torch.float32, 64, "bfloat16 or float16"),
        ("flash_attn_3", H100, {}, BF16, 264, "a multiple of 8 up to 256, and these have 264"),
        ("flash_attn_3", H100, {}, BF16, 256, None),
        ("flash_attn", H100, {}, BF16, 64, "package flash-attn is not installed"),
        ("flash_attn", A100, ALL, BF16, 100, "a multiple of 8 up to 256, and these have 100"),
        ("flash_attn", A100, ALL, torch.float16, 128, None),
        ("torch_varlen", A100, {}, BF16, 20, "a multiple of 8 up to 256, and these have 20"),
        ("torch_varlen", A100, {}, BF16, None, None),
    ],
)
def test_each_refusal_has_its_reason(
    name, capability, versions, dtype, head_dim, says, put, monkeypatch
):
    put(name)
    pretend_gpu(monkeypatch, capability, **versions)
    reason = KERNELS[name].unavailable(CUDA, dtype, head_dim)
    assert reason is None if says is None else says in reason, reason
    if says is not None:
        with pytest.raises(ValueError, match=f"{name}: "):
            choose_kernel(CUDA, dtype, head_dim=head_dim, name=name)


def test_a_flash_attn_3_that_is_not_there_or_does_not_load(monkeypatch):
    pretend_gpu(monkeypatch, H100)
    unavailable = partial(KERNELS["flash_attn_3"].unavailable, CUDA, BF16)
    assert "not installed" in unavailable()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # an import that fails
    assert "not installed" in unavailable()


def test_a_flash_attn_3_may_lie_in_a_package_of_its_name(put, monkeypatch):
    calls = put("flash_attn_3")
    package, interface = ModuleType("flash_attn_3"), sys.modules["flash_attn_interface"]
    package.flash_attn_interface = interface
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_3", package)
    monkeypatch.setitem(sys.modules, "flash_attn_3.flash_attn_interface", interface)
    pretend_gpu(monkeypatch, H100)
    kernel, _ = choose_kernel(CUDA, BF16, name="flash_attn_3")
    q, k, v, _ = span_tensors(4, 4)
    kernel.forward(q, k, v, spans_of([4], [4]), causal=True, scale=1.0, window=None)
    assert len(calls) == 1


def test_an_early_flash_attn_3_is_refused(put, monkeypatch):
    put("flash_attn_3")
    pretend_gpu(monkeypatch, H100)
    interface = sys.modules["flash_attn_interface"]
    monkeypatch.setattr(interface, "_flash_attn_backward", lambda dout, q, k, v, causal: None)
    assert "early one" in KERNELS["flash_attn_3"].unavailable(CUDA, BF16)
    operator = lambda *arguments, **named: None  # noqa: E731
    monkeypatch.setattr(
        interface, "_flash_attn_backward", operator
    )  # a custom operator's signature
    assert KERNELS["flash_attn_3"].unavailable(CUDA, BF16) is None


def test_a_flash_attn_4_that_moved_its_functions_is_refused(put, monkeypatch):
    put("flash_attn_4")
    pretend_gpu(monkeypatch, H100, **ALL)
    interface = sys.modules["flash_attn.cute.interface"]
    monkeypatch.delattr(interface, "_validate_head_dims")  # its own check is no condition
    assert KERNELS["flash_attn_4"].unavailable(CUDA, BF16, 64) is None
    monkeypatch.delattr(interface, "_flash_attn_bwd")
    assert "does not load" in KERNELS["flash_attn_4"].unavailable(CUDA, BF16, 64)


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        (H100, ("flash_attn_4", "flash_attn_3", "flash_attn"), "flash_attn_4"),
        (B200, ("flash_attn_4", "flash_attn_3", "flash_attn"), "flash_attn_4"),
        (H100, ("flash_attn_3", "flash_attn"), "flash_attn_3"),
        (A100, ("flash_attn_4", "flash_attn_3", "flash_attn"), "flash_attn"),
        (RTX_5090, ("flash_attn_4", "flash_attn"), "flash_attn"),
        (H100, (), "torch_varlen"),
    ],
)
def test_the_fastest_that_runs_is_chosen(capability, installed, chosen, put, monkeypatch):
    for name in installed:
        put(name)
    pretend_gpu(monkeypatch, capability, **{n: ALL[n] for n in installed if n in ALL})
    kernel, reason = choose_kernel(CUDA, BF16, head_dim=128)
    assert kernel.name == chosen
    faster = list(KERNELS)[: list(KERNELS).index(chosen)]
    assert all(name in reason for name in faster)


def test_the_flag_s_choices_are_the_kernels():
    (field,) = (f for f in fields(train.Flags) if f.name == "attn_kernel")
    assert list(field.metadata["choices"]) == list(KERNELS)
    with pytest.raises(ValueError, match="--attn_kernel.*choose from 'flash_attn_4'"):
        train.parse_flags(["--model_name_or_path", "m", "--attn_kernel", "flash_attn_5"])


def test_an_engine_knows_the_head_size_before_there_is_a_model(monkeypatch):
    pretend_gpu(monkeypatch, A100)
    make = partial(engine.make_engine, "flash", device=CUDA, dtype=BF16)
    assert make(head_dim=64).kernel == "torch_varlen"
    with pytest.raises(ValueError, match="a multiple of 8 up to 256, and these have 20"):
        make(head_dim=20)


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"num_key_value_heads": 2, "head_dim": 24}, (4, 2, 24)),
        ({"num_key_value_heads": 2, "head_dim": None}, (4, 2, 16)),
        ({}, (4, 4, 16)),
        ({"head_dim": 8, "qk_head_dim": 40}, (4, 4, 40)),  # multi-head latent attention
    ],
)
def test_the_heads_of_a_configuration(config, heads):
    text = SimpleNamespace(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **config)
    text.get_text_config = lambda: text
    assert tuple(attention_heads(text).values()) == heads


@pytest.mark.parametrize(
    ("device", "capability", "versions", "chosen", "told"),
    [
        (CUDA, H100, {}, "torch_varlen", True),
        (CUDA, B200, {}, "flash_attn", True),
        (CUDA, H100, {"flash_attn_4": "4.0.0b18"}, "torch_varlen", True),  # too old
        (CUDA, H100, ALL, "torch_varlen", False),  # it is there, and something else is in its way
        (CUDA, H100, {}, "flash_attn_3", False),
        (CUDA, H100, {}, "flex_attention", False),
        (CUDA, A100, {}, "torch_varlen", False),
        (CUDA, RTX_5090, {}, "torch_varlen", False),
        (CPU, H100, {}, "torch_cpu", False),
    ],
)
def test_a_faster_kernel_that_could_be_had_is_told(
    device, capability, versions, chosen, told, monkeypatch
):
    pretend_gpu(monkeypatch, capability, **versions)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    hint = faster_kernel_hint(device, chosen)
    if told:
        assert 'pip install "flash-attn-4[cu13]"' in hint and "1.7 to 1.9 ×" in hint
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        assert 'pip install "flash-attn-4"' in faster_kernel_hint(device, chosen)
    else:
        assert hint is None


# --------------------------------------------------------------------------------------------------
# Kernels that compile


def test_what_training_will_call_is_compiled_before_and_told(put, monkeypatch):
    calls, told, clock = put("flash_attn_4"), [], iter([100.0, 107.4])
    monkeypatch.setattr(kernels, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    warm_up(
        KERNELS["flash_attn_4"],
        device=CPU,
        dtype=BF16,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        windows=(None, 100),
        rectangles=True,
        tell=told.append,
    )
    many = flash_attn_4.MANY_SPANS
    kinds = [(True, None, 1), (True, None, many), (True, 99, 1), (True, 99, many)]
    kinds += [(False, None, 1), (False, None, many)]
    made = [(c["causal"], c["window_size_left"], len(c["cu_seqlens_q"]) - 1) for _, c in calls]
    assert made == [kind for kind in kinds for _ in ("forward", "backward")]
    assert [f for f, _ in calls] == ["forward", "backward"] * len(kinds)
    assert all(c["q"].shape[1:] == (HEADS, HEAD_DIM) and c["q"].dtype == BF16 for _, c in calls)
    assert all(c["k"].shape[1] == KV_HEADS for _, c in calls)
    assert told == ["compiling attention, 7 s (flash_attn_4)"]


@pytest.mark.parametrize("name", [n for n, kernel in KERNELS.items() if not kernel.compiles])
def test_the_others_are_not_called_before_training(name, put):
    calls, told = put(name), []
    settings = {"device": CPU, "dtype": BF16, "heads": 2, "kv_heads": 1, "head_dim": 16}
    warm_up(KERNELS[name], **settings, tell=told.append)
    assert not calls and not told


@pytest.mark.parametrize(
    ("grid", "heads", "kv_heads", "window", "rectangles"),
    [
        (RankGrid(), 8, 2, None, False),
        (RankGrid(), 8, 2, 5, True),  # of anchors that the window hides
        (RankGrid(ulysses_degree=2), 4, 1, None, False),
        (RankGrid(ulysses_degree=4), 2, 1, 5, True),  # each key/value head on two ranks
        (RankGrid(ring_degree=2), 8, 2, None, True),
    ],
)
def test_an_engine_compiles_for_its_rank_s_heads(
    grid, heads, kv_heads, window, rectangles, monkeypatch
):
    asked = []
    monkeypatch.setattr(engine, "warm_up_kernel", lambda kernel, **call: asked.append(call))
    what = {"heads": 8, "kv_heads": 2, "window": window, "head_dim": 64, "softcap": 50.0}
    engine._warm_up(KERNELS["torch_cpu"], grid, **what)
    assert asked == [
        {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": 64,
            "windows": {None, window},
            "softcap": 50.0,
            "rectangles": rectangles,
        }
    ]


def test_an_engine_compiles_the_kernel_that_it_chose(put, monkeypatch):
    calls = put("flash_attn_4")
    pretend_gpu(monkeypatch, H100, **ALL)
    made = engine.make_engine(
        "flash", device=CUDA, dtype=BF16, head_dim=16, deterministic=True, softcap=50.0
    )
    assert made.kernel == "flash_attn_4"
    here = {"device": CPU, "heads": 4, "kv_heads": 2, "head_dim": 16, "window": None}
    made.warm_up(**here, tell=print)
    assert {c["deterministic"] for f, c in calls if f == "backward"} == {True}
    assert {c["softcap"] for _, c in calls} == {50.0}


# --------------------------------------------------------------------------------------------------
# A deterministic backward


@pytest.fixture
def switch():
    """PyTorch's switch, as it was afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    ("name", "capability", "version", "head_dim", "says"),
    [
        ("flash_attn_4", H100, "4.0.0b19", 256, None),
        ("flash_attn_4", B200, "4.0.0b33", 128, None),
        ("flash_attn_4", B200, "4.0.0b33", 256, "no deterministic backward for heads of 256"),
        ("flash_attn_4", B200, "4.0.0b34", 256, None),
        ("flash_attn_3", H100, "", 192, None),
        ("flash_attn_3", H100, "", 256, "no deterministic backward for heads of more than 192"),
        ("flash_attn", A100, "2.8.3", 256, None),
    ],
)
def test_a_kernel_without_a_deterministic_backward_is_refused(
    name, capability, version, head_dim, says, put, monkeypatch
):
    put(name)
    pretend_gpu(monkeypatch, capability, **{name: version} if version else {})
    choose = partial(choose_kernel, CUDA, BF16, head_dim=head_dim, name=name)
    choose()
    if says is None:
        assert choose(deterministic=True)[0].name == name
    else:
        with pytest.raises(ValueError, match=f"{name}.*{says}.*or leave out --deterministic"):
            choose(deterministic=True)
        with pytest.raises(ValueError, match="torch_varlen: its backward is deterministic after"):
            choose_kernel(CUDA, BF16, head_dim=head_dim, deterministic=True)


def test_pytorch_s_kernel_goes_by_pytorch_s_switch(switch, monkeypatch):
    pretend_gpu(monkeypatch, A100)
    choose = partial(choose_kernel, CUDA, BF16, deterministic=True)
    switch(False)
    with pytest.raises(ValueError, match="use_deterministic_algorithms"):
        choose()
    switch(True, warn_only=True)  # PyTorch's operator then only warns
    with pytest.raises(ValueError, match="use_deterministic_algorithms"):
        choose()
    switch(True)
    assert choose()[0].name == "torch_varlen"


@pytest.mark.parametrize("number", [1, 2, 4])
def test_the_cpu_s_kernel_gives_the_same_bits_in_every_run(number):
    """Long enough for several threads; key/value heads are shared."""
    kernel, _ = choose_kernel(CPU, torch.float32, deterministic=True)
    q, k, v, dout = (x.float() for x in span_tensors(700, 700))
    spans, threads = spans_of([400, 300], [400, 300]), torch.get_num_threads()
    settings = {"causal": True, "scale": 0.3, "window": None}
    found = []
    try:
        torch.set_num_threads(number)
        for _ in range(4):
            out, lse = kernel.forward(q, k, v, spans, **settings)
            found.append((out, lse, *kernel.backward(dout, q, k, v, out, lse, spans, **settings)))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_the_whole_process_is_switched(switch, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    switch(False)
    compute_deterministically()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own choice
    compute_deterministically()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_flag_switches_before_anything_runs(monkeypatch, tmp_path):
    class Switched(Exception):
        pass

    def switch():
        raise Switched

    monkeypatch.setattr(train, "compute_deterministically", switch)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    flags = train.Flags(model_name_or_path="m", dataset="d", output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="runs under Accelerate"):
        train.main(flags)
    with pytest.raises(Switched):
        train.main(replace(flags, deterministic=True))


# --------------------------------------------------------------------------------------------------
# Calls that are too large


def counting(kernel: Kernel) -> tuple[Kernel, list]:
    """`kernel` in pieces, and (queries, heads, key/value heads) of every call that is made of it."""
    calls = []

    def forward(q, k, v, spans, **settings):
        calls.append((len(q), q.shape[1], k.shape[1]))
        assert all(x.is_contiguous() for x in (q, k, v))
        assert spans.max_seqlen_q <= len(q) and spans.max_seqlen_k <= max(len(k), 1)
        return kernel.forward(q, k, v, spans, **settings)

    def backward(dout, q, k, v, out, lse, spans, **settings):
        calls.append((len(q), q.shape[1], k.shape[1]))
        assert all(x.is_contiguous() for x in (dout, q, k, v, out, lse))
        return kernel.backward(dout, q, k, v, out, lse, spans, **settings)

    return large.in_pieces(replace(kernel, forward=forward, backward=backward)), calls


ROW = HEADS * 64
"""Elements of a token, its head size rounded up."""


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("limit", "calls"),
    [
        (10_000 * ROW, [(12, 8, 2)]),
        # A tile is counted for each span and one more: of two spans seven tokens fit.
        ((7 + 3 * 128) * ROW, [(5, 8, 2), (7, 8, 2)]),
        # The five tokens of the first span fit with half of the heads, in whole groups …
        ((5 + 2 * 128) * ROW * 3 // 4, [(5, 4, 1)] * 2 + [(4, 4, 1)] * 2 + [(3, 4, 1)] * 2),
        # … and with a half of each group, which share the key/value head.
        ((5 + 2 * 128) * ROW * 3 // 8, [(5, 2, 1)] * 4 + [(4, 2, 1)] * 4 + [(3, 2, 1)] * 4),
    ],
)
def test_pieces_are_the_whole(limit, calls, causal, monkeypatch):
    """Forward, backward and log-sum-exp of 8 heads over 2, in float64; a span without queries is between."""
    monkeypatch.setattr(large, "LIMIT", limit)
    queries, keys = [5, 0, 4, 3], [5, 0 if causal else 2, 4, 3]
    q, _, _, dout = span_tensors(12, 1)
    k, v = (torch.randn(sum(keys), 2, HEAD_DIM, dtype=torch.float64) for _ in range(2))
    spans = spans_of(queries, keys)
    settings = {"causal": causal, "scale": 0.3, "window": None}
    out, lse = pytorch.CPU_KERNEL.forward(q, k, v, spans, **settings)
    expected = [out, lse]
    expected += pytorch.CPU_KERNEL.backward(dout, q, k, v, out, lse, spans, **settings)

    kernel, made = counting(pytorch.CPU_KERNEL)
    out, lse = kernel.forward(q, k, v, spans, **settings)
    found = [out, lse, *kernel.backward(dout, q, k, v, out, lse, spans, **settings)]
    assert close(found, expected)
    assert made == calls + calls


@pytest.mark.parametrize("seed", range(20))
def test_pieces_cover_everything_once_and_stay_below_the_limit(seed):
    rng = np.random.default_rng(seed)
    group, kv_heads = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    heads, head_dim = group * kv_heads, int(rng.choice([64, 96, 128]))
    edges = [np.cumsum([0, *rng.integers(0, 500, rng.integers(1, 12))]).tolist() for _ in range(2)]
    edges[1] = edges[1][: len(edges[0])] + [edges[1][-1]] * (len(edges[0]) - len(edges[1]))
    limit = int(rng.integers(1000, 4000)) * 128 * max(1, heads // 3)
    covered = np.zeros((len(edges[0]) - 1, heads), dtype=int)
    settings = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    for piece in large.pieces(*edges, **settings, limit=limit):
        covered[piece.first : piece.last, piece.heads] += 1
        tokens = max(e[piece.last] - e[piece.first] for e in edges)
        number, own = piece.heads.stop - piece.heads.start, piece.kv_heads
        size = {"tokens": tokens, "spans": piece.last - piece.first, "head_dim": head_dim}
        assert large.elements(**size, heads=number) <= limit
        assert own.start == piece.heads.start // group and own.stop * group >= piece.heads.stop
        assert number % (own.stop - own.start) == 0, "every key/value head has as many query heads"
    assert (covered == 1).all()


def test_a_single_head_beyond_the_limit_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match="document of 17,000,000 tokens.*--parallel_mode ring"):
        edges = [0, 17_000_000]
        settings = {"heads": 8, "kv_heads": 1, "head_dim": 128, "limit": large.LIMIT}
        list(large.pieces(edges, edges, **settings))


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "whole"),
    [
        (131_072, 32, 128, True),
        (524_288, 32, 128, False),
        (1_048_576, 32, 64, False),
        (1_000_000, 32, 64, True),
        (1_000_000, 32, 96, False),
    ],
)
def test_below_the_limit_nothing_waits_for_the_device(tokens, heads, head_dim, whole):
    """The device "meta" has no values: to read a boundary there is an error."""

    def forward(q, k, v, spans, **settings):
        return q, None

    kernel = large.in_pieces(replace(pytorch.CUDA_KERNEL, forward=forward))
    q, k = (torch.empty(tokens, n, head_dim, dtype=BF16, device="meta") for n in (heads, 8))
    edges = torch.empty(64, dtype=torch.int32, device="meta")
    call = partial(kernel.forward, q, k, k, Spans(edges, edges, tokens, tokens), causal=True)
    if whole:
        assert call()[0] is q
    else:
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            call()


def test_gaps_between_tokens_count(monkeypatch):
    """A slice of a fused projection: few elements of its own, far from each other."""
    monkeypatch.setattr(large, "LIMIT", (6 + 2 * 128) * ROW)
    kernel, calls = counting(pytorch.CPU_KERNEL)
    fused = torch.randn(6, 3000 * HEADS, HEAD_DIM, dtype=torch.float64)
    q, (_, k, v, _) = fused[:, :HEADS], span_tensors(6, 6)
    settings = {"causal": True, "scale": 0.3, "window": None}
    out, _ = kernel.forward(q, k, v, spans_of([6], [6]), **settings)
    assert calls == [(6, HEADS, KV_HEADS)]  # contiguous: `counting` asserts it
    expected, _ = pytorch.CPU_KERNEL.forward(q, k, v, spans_of([6], [6]), **settings)
    assert torch.equal(out, expected)


def test_every_cuda_kernel_is_kept_below_the_limit(put, monkeypatch):
    monkeypatch.setattr(large, "LIMIT", (5 + 2 * 128) * ROW)
    for name in PLACES:
        calls = put(name)
        q, k, v, dout = span_tensors(8, 8)
        spans = spans_of([5, 3], [5, 3])
        settings = {"causal": True, "scale": 0.3, "window": None}
        out, lse = KERNELS[name].forward(q, k, v, spans, **settings)
        KERNELS[name].backward(dout, q, k, v, out, lse, spans, **settings)
        assert [(f, len(c["q"])) for f, c in calls] == [
            ("forward", 5),
            ("forward", 3),
            ("backward", 5),
            ("backward", 3),
        ], name
    assert kernels.KERNELS["torch_cpu"] is pytorch.CPU_KERNEL
