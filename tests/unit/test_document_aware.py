"""The attention function of the linked library files: which calls it takes, and what it makes of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from anchor_context.integrations.trainers import patch_model
from anchor_context.library_modified_files.document_aware import document_aware

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2]])
CAUSAL = torch.ones(6, 6).tril().bool()


class Layer(torch.nn.Module):
    is_causal = True


def library_function(module, query, key, value, attention_mask, **settings) -> tuple[str, None]:
    return "the library's", None


def own_documents(lengths: list[int]) -> Tensor:
    """(1, 1, S, S) bool, by hand: causal, own document."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ((document[:, None] == document) & CAUSAL)[None, None]


def qkv(value_size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 6, 8), (1, 2, 6, 8), (1, 2, 6, value_size))
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.fixture
def intra_doc(monkeypatch):
    monkeypatch.setenv("ANCHOR_CONTEXT_PATTERN", "intra_doc")


def taken(function, mask, positions: Tensor = POSITIONS, **settings) -> bool:
    """Whether the call attends by document, rather than as the library would."""
    out, _ = function(Layer(), *qkv(), mask, position_ids=positions, **settings)
    return isinstance(out, Tensor)


def test_a_mask_written_in_place_is_read_again(intra_doc):
    function = document_aware(library_function, engine="flex")
    mask = own_documents([3, 3])
    assert taken(function, mask)
    mask.copy_(CAUSAL)  # the same buffer now holds a mask of the caller's own
    assert not taken(function, mask)
    mask.copy_(own_documents([3, 3]))
    assert taken(function, mask)


def test_a_mask_is_read_again_for_other_documents(intra_doc):
    function = document_aware(library_function, engine="flex")
    mask = own_documents([3, 3])
    assert taken(function, mask)
    assert not taken(function, mask, torch.tensor([[0, 1, 0, 1, 2, 3]]))
    assert taken(function, mask)


def test_masks_and_positions_of_inference_mode_are_read_at_every_call(intra_doc):
    function = document_aware(library_function, engine="flex")
    with torch.inference_mode():
        mask, positions = own_documents([3, 3]), POSITIONS.clone()
        assert taken(function, mask, positions)
        mask.copy_(CAUSAL)
        assert not taken(function, mask, positions)
        mask.copy_(own_documents([2, 4]))
        positions.copy_(torch.tensor([[0, 1, 0, 1, 2, 3]]))
        assert taken(function, mask, positions)


def test_a_window_in_the_mask_must_be_the_calls(intra_doc):
    function = document_aware(library_function, engine="flex")
    narrow = own_documents([3, 3]) & ~CAUSAL.tril(-2)
    assert taken(function, narrow, sliding_window=2)
    assert not taken(function, narrow)
    assert not taken(function, own_documents([3, 3]), sliding_window=2)


def test_with_boundaries_a_causal_mask_may_come_and_no_other(intra_doc):
    """The library cannot make more of boundaries that positions do not repeat."""
    function = document_aware(library_function, engine="flex")
    boundaries, positions = torch.tensor([0, 3, 6]), torch.arange(6)[None]
    for mask in (None, CAUSAL[None, None], own_documents([3, 3])):
        assert taken(function, mask, positions, cu_seq_lens_q=boundaries)
    for mask in (torch.eye(6)[None, None].bool(), ~CAUSAL[None, None], torch.ones(1, 6)):
        assert not taken(function, mask, positions, cu_seq_lens_q=boundaries)


def test_a_block_mask_of_the_callers_own_stays_in_force(intra_doc):
    function = document_aware(library_function, engine="flex")
    document = torch.tensor([0, 0, 0, 1, 1, 1])

    def block_mask(visible):
        return create_block_mask(visible, B=1, H=None, Q_LEN=6, KV_LEN=6, device="cpu")

    causal = block_mask(lambda b, h, q, k: q >= k)
    prefix = block_mask(lambda b, h, q, k: (q >= k) | (k < 3))
    own = block_mask(lambda b, h, q, k: (q >= k) & (document[q] == document[k]))
    assert taken(function, own)
    assert not taken(function, causal) and not taken(function, prefix)
    boundaries, positions = torch.tensor([0, 3, 6]), torch.arange(6)[None]
    assert taken(function, causal, positions, cu_seq_lens_q=boundaries)
    assert not taken(function, prefix, positions, cu_seq_lens_q=boundaries)


def ways(engine: str):
    """The attention of the linked files, and that of a patched model, as `f(q, k, v, **settings)`."""
    linked = document_aware(library_function, engine=engine)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = patch_model(LlamaForCausalLM(config), engine=engine, pattern="intra_doc")
    layouts = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: layouts.append(kwargs["layout"]), with_kwargs=True
    )
    model(torch.zeros(1, 6, dtype=torch.long), position_ids=POSITIONS)
    patched = AttentionInterface()[model.config._attn_implementation]
    return (
        lambda *x, **more: linked(Layer(), *x, None, position_ids=POSITIONS, **more)[0],
        lambda *x, **more: patched(Layer(), *x, None, layout=layouts[0], **more)[0],
    )


@pytest.mark.parametrize("engine", ["flash", "flex"])
@pytest.mark.parametrize("value_size", [8, 4])
def test_both_ways_compute_values_shorter_than_keys(intra_doc, engine, value_size):
    """Multi-head latent attention; flash kernels take no such values."""
    q, k, v = qkv(value_size)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, own_documents([3, 3]), enable_gqa=True
    ).transpose(1, 2)
    for way in ways(engine):
        torch.testing.assert_close(way(q, k, v), expected)


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ("flash", {"s_aux": torch.tensor([-1.0, 0.0, 1.0, 3.0])}),
        ("flex", {"s_aux": torch.tensor([-1.0, 0.0, 1.0, 3.0])}),
        ("flex", {"softcap": 0.5}),
    ],
)
def test_both_ways_compute_sinks_and_caps(intra_doc, engine, settings):
    q, k, v = qkv()
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) / 8**0.5
    if "softcap" in settings:
        scores = 0.5 * torch.tanh(scores / 0.5)
    weights = scores.masked_fill(~own_documents([3, 3]), -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if "s_aux" in settings:
        total = total + settings["s_aux"].double().exp()[:, None, None]
    expected = (weights / total) @ v.repeat_interleave(2, 1)
    for way in ways(engine):
        torch.testing.assert_close(way(q, k, v, **settings), expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"position_bias": torch.zeros(1, 4, 6, 6)}, "position_bias"),
        ({"dropout": 0.1}, "attention dropout"),
    ],
)
def test_both_ways_refuse_what_is_not_computed(intra_doc, setting, name):
    for way, remedy in zip(
        ways("flash"), ("ANCHOR_CONTEXT_PATTERN=off", "config.json"), strict=True
    ):
        with pytest.raises(ValueError, match=f"Layer asks for {name}.*{remedy}"):
            way(*qkv(), **setting)


def test_importing_it_inside_transformers_import_loads_no_more_of_transformers():
    code = "import sys, anchor_context.library_modified_files.document_aware\n"
    code += "assert 'torch' in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("engine", ["flash", "flex"])
def test_a_script_that_compiles_its_model_attends_the_same(intra_doc, engine):
    function = document_aware(library_function, engine=engine)
    compiled = torch.compile(
        lambda positions: function(Layer(), *qkv(), None, position_ids=positions)[0] * 2,
        backend="aot_eager",
    )
    for positions in (POSITIONS, torch.tensor([[0, 1, 0, 1, 2, 3]])):
        expected, _ = function(Layer(), *qkv(), None, position_ids=positions)
        torch.testing.assert_close(compiled(positions), expected * 2)
