"""Learned sinks and capped scores: every engine against the dense float64 reference, and no leak."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_attention import PLACED_PATTERNS, ROW, compiled, qkv, random_layout, worst_error
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from anchor_context.attention import flash, flex, reference
from anchor_context.attention.kernels import KERNELS
from anchor_context.attention.patterns import PATTERNS

__all__ = ["compiled"]  # a fixture

SINKS = torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=torch.float64)
MASKS = [placed for placed in PLACED_PATTERNS if placed[0] != "intra_doc_reset"]
"""Without the one that differs from another in its positions alone."""
CAP = 1.5
"""Of scores with a deviation of 1: it bends most of them."""
SETTINGS = {"sinks": {"sinks": SINKS}, "cap": {"softcap": CAP}}
SETTINGS["both"] = SETTINGS["sinks"] | SETTINGS["cap"]


def run(attend, inputs, grad, layout, dtype, *, sinks=None, **settings) -> list[torch.Tensor]:
    """[out, dq, dk, dv], and the sinks' gradient where there are some."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    if sinks is not None:
        settings["sinks"] = sinks.to(dtype).detach().requires_grad_()
        leaves.append(settings["sinks"])
    out = attend(*leaves[:3], layout, scale=0.25, **settings)
    out.backward(grad.to(dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("settings", ["sinks", "both"])
# 200 documents in 256 tokens: most have one token
@pytest.mark.parametrize(("documents", "batch_size"), [(1, 1), (200, 1), (200, 2)])
@pytest.mark.parametrize(("pattern", "placement"), MASKS)
def test_engines_agree_with_the_reference(pattern, placement, batch_size, documents, settings):
    layout = random_layout(
        documents=documents, batch_size=batch_size, pattern=pattern, placement=placement
    )
    inputs, grad = qkv(batch_size)
    settings = SETTINGS[settings]
    expected = run(reference.attend, inputs, grad, layout, torch.float64, **settings)
    engines = {"flex": flex.make_attend()}
    if placement != "shared" and "softcap" not in settings and PATTERNS[pattern].sees is None:
        engines["flash"] = partial(flash.attend, kernel=KERNELS["torch_cpu"])
    for name, attend in engines.items():
        results = run(attend, inputs, grad, layout, torch.float32, **settings)
        assert len(results) == 4 + ("sinks" in settings)
        assert worst_error(results, expected) < 1e-5, name


@pytest.mark.parametrize("pattern", ["anchor", "intra_doc"])
def test_a_sink_is_taken_once_beside_a_window_and_a_hidden_anchor(pattern):
    placement = PATTERNS[pattern].placement("per_document")
    layout = random_layout(documents=5, batch_size=2, pattern=pattern, placement=placement)
    inputs, grad = qkv(2)
    settings = {"sinks": SINKS, "sliding_window": 7}
    expected = run(reference.attend, inputs, grad, layout, torch.float64, **settings)
    for attend in (flex.make_attend(), partial(flash.attend, kernel=KERNELS["torch_cpu"])):
        results = run(attend, inputs, grad, layout, torch.float32, **settings)
        assert worst_error(results, expected) < 1e-5


@pytest.mark.parametrize("settings", SETTINGS)
def test_they_change_what_they_should(settings):
    layout = random_layout(documents=5, batch_size=1, pattern="intra_doc", placement="none")
    inputs, _ = qkv(1)
    plain = reference.attend(*inputs, layout, scale=0.25)
    changed = reference.attend(*inputs, layout, scale=0.25, **SETTINGS[settings])
    assert (changed - plain).norm() > 0.1 * plain.norm(), "the case is vacuous"


def test_a_sink_is_a_key_of_that_score_without_a_value():
    """By hand: one query that sees two keys."""
    layout = random_layout(documents=1, batch_size=1, pattern="full", placement="none")
    (q, k, v), _ = qkv(1)
    out = reference.attend(q, k, v, layout, scale=0.25, sinks=SINKS)
    scores = torch.stack([q[0, 3, 1] @ k[0, 1, 0] / 4, q[0, 3, 1] @ k[0, 1, 1] / 4, SINKS[3]])
    weights = scores.exp() / scores.exp().sum()
    torch.testing.assert_close(out[0, 3, 1], weights[:2] @ v[0, 1, :2])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("engine", ["flash", "flex"])
def test_no_token_changes_what_comes_before_or_another_document(engine, settings):
    settings = SETTINGS[settings]
    if engine == "flash":
        attend, settings = partial(flash.attend, kernel=KERNELS["torch_cpu"]), SETTINGS["sinks"]
    else:
        attend = flex.make_attend()
    layout = random_layout(
        documents=4, batch_size=1, pattern="anchor", placement="per_document", seed=3
    )
    inputs, _ = qkv(1)
    before = attend(*inputs, layout, scale=0.25, **settings)
    first, last = layout.cu_seqlens[1:3].tolist()
    token = (first + last) // 2
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :, token] += 1
    differs = (attend(*changed, layout, scale=0.25, **settings) != before).any(-1).any(1)[0]
    assert differs[token:last].all() and last - token > 2
    differs[token:last] = False
    assert not differs.any()


@pytest.mark.parametrize("settings", SETTINGS)
def test_flex_attention_itself_agrees(settings):
    """The real kernel's forward, its cap and its log-sum-exp, with which CUDA trains."""
    settings = SETTINGS[settings]
    layout = random_layout(documents=6, batch_size=2, pattern="anchor", placement="shared")
    inputs, _ = qkv(2)
    expected = reference.attend(*inputs, layout, scale=0.25, **settings)
    out, aux = flex_attention(
        *(x.float() for x in inputs),
        block_mask=flex.block_mask(layout),
        score_mod=flex.cap(CAP) if "softcap" in settings else None,
        scale=0.25,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    if "sinks" in settings:
        out = flex.with_sinks(out, aux.lse, SINKS)
    assert ((out - expected).norm() / expected.norm()).item() < 1e-5


def test_every_step_has_new_documents_and_compiles_nothing(compiled):
    graphs, compile_flex = compiled
    attend = compile_flex()
    (q, k, v), _ = qkv(1)
    for step in range(3):
        layout = random_layout(
            documents=1 + step, batch_size=1, pattern="intra_doc", placement="none", seed=step
        )
        mask = flex.block_mask(layout)
        attend(q, k, v, block_mask=mask, score_mod=flex.cap(CAP), scale=0.25, enable_gqa=True)
    assert len(graphs) == 1


def test_bfloat16_keeps_its_type_and_the_sinks_theirs():
    layout = random_layout(documents=5, batch_size=1, pattern="intra_doc", placement="none")
    inputs, grad = qkv(1)
    expected = run(reference.attend, inputs, grad, layout, torch.float64, sinks=SINKS)
    for attend in (flex.make_attend(), partial(flash.attend, kernel=KERNELS["torch_cpu"])):
        results = run(attend, inputs, grad, layout, torch.bfloat16, sinks=SINKS)
        assert {x.dtype for x in results} == {torch.bfloat16}
        assert worst_error([x.double() for x in results], expected) < 0.02


def test_a_kernel_without_caps_says_so_at_the_call():
    layout = random_layout(documents=5, batch_size=1, pattern="intra_doc", placement="none")
    inputs, _ = qkv(1)
    with pytest.raises(ValueError, match="torch_cpu does not cap scores.*--attn_engine flex"):
        flash.attend(*inputs, layout, scale=0.25, softcap=CAP, kernel=KERNELS["torch_cpu"])
    assert inputs[0].shape[2] == ROW
