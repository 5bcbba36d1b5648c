"""The losses by tiles: exact sums, gradients that scale, tied embeddings, ranks without targets."""

from __future__ import annotations

import sys
from copy import deepcopy
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from anchor_context import loss as loss_module
from anchor_context.attention import flex
from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.integrations.models import set_attention
from anchor_context.layout import IGNORE_INDEX
from anchor_context.loss import (
    CausalLMWithLoss,
    check_logits,
    liger_loss,
    logit_settings,
    plain_loss,
    tiled_loss,
)

TOKENS = 48


def model_and_batch(*, tied: bool, targets: bool = True):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    engine = make_engine("flash", device=torch.device("cpu"), dtype=torch.float32)
    set_attention(model, engine.attend)
    layout = make_layout(
        np.array([0, 17, 48]),
        batch_size=2,
        row_length=TOKENS,
        pattern="intra_doc",
        anchor_placement="none",
    )
    labels = torch.randint(40, (2, TOKENS))
    labels[:, ::5] = IGNORE_INDEX
    if not targets:
        labels[:] = IGNORE_INDEX
    batch = {
        "input_ids": torch.randint(40, (2, TOKENS)),
        "labels": labels,
        "position_ids": layout.position_ids,
        "layout": layout,
    }
    return model, batch


def gradients(model, loss) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("scale", [1.0, 0.037])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss_of", [tiled_loss, plain_loss])
def test_tiles_equal_the_loss_of_all_logits(loss_of, tied, scale, monkeypatch):
    monkeypatch.setattr(
        loss_module, "TILE_ENTRIES", 40 * 7
    )  # 7 tokens: 14 tiles, the last one short
    model, batch = model_and_batch(tied=tied)
    loss_sum, count = CausalLMWithLoss(model, loss_of)(**batch)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "layout")}
    logits = model(**inputs, use_cache=False).logits
    expected = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    assert count == (batch["labels"] != IGNORE_INDEX).sum() > 0
    assert torch.allclose(loss_sum, expected, rtol=1e-6, atol=0)
    for got, want in zip(
        gradients(model, loss_sum * scale), gradients(model, expected * scale), strict=True
    ):
        assert ((got - want).norm() / want.norm()).item() < 1e-5


@pytest.mark.parametrize("loss_of", [tiled_loss, plain_loss])
def test_a_rank_without_targets_gives_zero_and_zero_gradients(loss_of):
    model, batch = model_and_batch(tied=False, targets=False)
    loss_sum, count = CausalLMWithLoss(model, loss_of)(**batch)
    assert loss_sum == 0 and count == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(model, loss_sum))


@pytest.mark.parametrize("loss_of", [tiled_loss, plain_loss])
def test_no_logits_of_the_whole_row_exist(loss_of, monkeypatch):
    """Nor is anything as large as one tile's logits kept for the backward."""
    monkeypatch.setattr(loss_module, "TILE_ENTRIES", 300 * 7)
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    hidden = torch.randn(2 * TOKENS, 8, requires_grad=True)
    head = torch.nn.Linear(8, 300, bias=False)  # 300 × 8 entries, 96 × 300 logits in all
    with Sizes():
        loss_of(hidden, head, torch.randint(300, (2 * TOKENS,))).backward()
    assert max(made) == 300 * 8


@pytest.mark.parametrize("engine", ["flash", "flex"])
def test_a_step_takes_no_decision_from_a_tensor(engine):
    """On a GPU each would wait until all work before it is done."""
    decisions = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

    class NoDecision(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            by_number = function is torch.ops.aten.index.Tensor and all(
                index is None or index.dtype != torch.bool for index in args[1]
            )
            assert by_number or not decisions & set(function.tags), function
            return function(*args, **(kwargs or {}))

    model, batch = model_and_batch(tied=False)
    set_attention(
        model, make_engine(engine, device=torch.device("cpu"), dtype=torch.float32).attend
    )
    with NoDecision():
        loss_sum, count = CausalLMWithLoss(model, tiled_loss)(**batch)
        (loss_sum / count).backward()
        flex.block_mask(batch["layout"])  # what stands for the dense mask on CUDA
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            loss_sum.item()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shift", [0.0, 300.0])
@pytest.mark.parametrize("loss_of", [tiled_loss, plain_loss])
def test_the_loss_is_the_definition_in_float64(loss_of, bias, shift, monkeypatch):
    """Also for logits that would overflow without the shift by their largest."""
    monkeypatch.setattr(loss_module, "TILE_ENTRIES", 40 * 7)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 40, bias=bias)
    hidden = torch.randn(TOKENS, 16)
    hidden[:, 0] += shift
    labels = torch.randint(40, (TOKENS,))
    labels[::5] = IGNORE_INDEX

    exact_head, exact_hidden = deepcopy(head).double(), hidden.double().requires_grad_()
    exact = cross_entropy(exact_head(exact_hidden), labels, reduction="sum")
    (exact * 0.037).backward()
    hidden.requires_grad_()
    loss = loss_of(hidden, head, labels)
    (loss * 0.037).backward()

    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    pairs = [(hidden, exact_hidden), *zip(head.parameters(), exact_head.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert ((ours.grad - theirs.grad).norm() / theirs.grad.norm()).item() < 1e-5


def test_bfloat16_sums_in_float32(monkeypatch):
    """The loss and the head's gradient of many tiles: rounding each tile's part would lose them."""
    monkeypatch.setattr(loss_module, "TILE_ENTRIES", 40 * 4)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 40, bias=False).bfloat16()
    hidden = torch.randn(4096, 16).bfloat16().requires_grad_()
    labels = torch.randint(40, (4096,))
    exact_head, exact_hidden = deepcopy(head).double(), hidden.detach().double()
    exact = cross_entropy(exact_head(exact_hidden), labels, reduction="sum")
    exact.backward()
    loss = tiled_loss(hidden, head, labels)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    assert head.weight.grad.dtype == hidden.grad.dtype == torch.bfloat16
    error = (head.weight.grad - exact_head.weight.grad).norm() / exact_head.weight.grad.norm()
    assert error < 4e-3  # bfloat16 itself keeps 2e-3


@pytest.mark.parametrize("loss_of", [tiled_loss, plain_loss])
def test_evaluation_makes_no_gradient(loss_of):
    head = torch.nn.Linear(16, 40, bias=False)
    with torch.no_grad():
        loss = loss_of(torch.randn(8, 16), head, torch.randint(40, (8,)))
    assert not loss.requires_grad and loss > 0


# --- Logits that are scaled or capped after the head ------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"scale": 0.3}, {"softcap": 2.0}, {"scale": 0.3, "softcap": 0.5}],
    ids=lambda settings: "+".join(settings),
)
@pytest.mark.parametrize("loss_of", [tiled_loss, plain_loss])
def test_scaled_and_capped_logits_are_the_definition_in_float64(
    loss_of, settings, bias, monkeypatch
):
    monkeypatch.setattr(loss_module, "TILE_ENTRIES", 40 * 7)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 40, bias=bias)
    torch.nn.init.normal_(head.weight)  # logits of a deviation of 4
    hidden = torch.randn(TOKENS, 16)
    labels = torch.randint(40, (TOKENS,))
    labels[::5] = IGNORE_INDEX

    exact_head, exact_hidden = deepcopy(head).double(), hidden.double().requires_grad_()
    logits = exact_head(exact_hidden) * settings.get("scale", 1)
    if "softcap" in settings:
        logits = settings["softcap"] * torch.tanh(logits / settings["softcap"])
    exact = cross_entropy(logits, labels, reduction="sum")
    (exact * 0.037).backward()
    hidden.requires_grad_()
    loss = loss_of(hidden, head, labels, **settings)
    (loss * 0.037).backward()

    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    pairs = [(hidden, exact_hidden), *zip(head.parameters(), exact_head.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert ((ours.grad - theirs.grad).norm() / theirs.grad.norm()).item() < 1e-5


def test_capped_logits_take_no_more_room(monkeypatch):
    monkeypatch.setattr(loss_module, "TILE_ENTRIES", 300 * 8)
    assert loss_module.tile_tokens(300, capped=False) == 8
    assert loss_module.tile_tokens(300, capped=True) == 4


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (LlamaConfig(), {}),
        (Gemma2Config(), {"softcap": 30.0}),
        (Gemma2Config(final_logit_softcapping=None), {}),
        (GraniteConfig(logits_scaling=8.0), {"scale": 1 / 8}),
        (GraniteConfig(), {}),
        (CohereConfig(logit_scale=0.5), {"scale": 0.5}),
        (
            HyperCLOVAXConfig(logits_scaling=0.5),
            {"scale": 0.5},
        ),  # multiplies, where Granite divides
    ],
)
def test_each_family_s_settings(config, settings):
    assert logit_settings(config) == settings


def test_a_setting_of_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"llama: config.logits_scaling=8.0 changes the logits"):
        logit_settings(LlamaConfig(logits_scaling=8.0))


@pytest.mark.parametrize(
    "family",
    [
        ("gemma2", {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
        ("granite", {"logits_scaling": 0.3, "embedding_multiplier": 5.0}),
        ("cohere", {"logit_scale": 3.0}),
        ("hyperclovax", {"logits_scaling": 3.0}),
        ("nanochat", {"final_logit_softcapping": 0.5}),
    ],
    ids=lambda family: family[0],
)
def test_the_loss_is_that_of_the_library_s_own_logits(family):
    """What the family's own forward makes of the head's output, whatever we think that it does."""
    kind, changes = family
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **sizes, **heads, **ends, **changes)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    ids = torch.randint(40, (1, 24))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        expected = cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")
        attend = make_engine("flex", device=torch.device("cpu"), dtype=torch.float32).attend
        set_attention(model, attend)
        layout = make_layout(
            np.array([0]), batch_size=1, row_length=24, pattern="full", anchor_placement="none"
        )
        wrapped = CausalLMWithLoss(model, tiled_loss)
        inputs = {"input_ids": ids, "labels": ids, "position_ids": layout.position_ids}
        loss, _ = wrapped(**inputs, layout=layout)
        wrapped.logit_settings = {}
        without, _ = wrapped(**inputs, layout=layout)
    torch.testing.assert_close(loss, expected)
    assert (without - expected).abs() > 0.01 * expected, "the case is vacuous"


def test_a_model_of_more_than_base_and_head_is_refused():
    model, _ = model_and_batch(tied=False)
    model.norm_before_head = torch.nn.LayerNorm(32)
    with pytest.raises(
        ValueError, match=r"this one has other weights besides \(norm_before_head.weight"
    ):
        CausalLMWithLoss(model, tiled_loss)


@pytest.mark.parametrize(("scale", "liger_s"), [(1.0, 1), (0.0625, 1), (0.3, 0)])
def test_liger_scales_exactly_or_leaves_it_to_the_tiles(scale, liger_s, monkeypatch):
    made = []

    class Stand(torch.nn.Module):
        def __init__(self, **settings):
            super().__init__()
            made.append(settings)

        def forward(self, weight, hidden, labels, bias):
            logits = 4.0 * torch.tanh((hidden @ weight.T) / 4.0)
            return cross_entropy(logits.float(), labels, reduction="sum")

    place = ModuleType("liger_kernel.transformers")
    place.LigerFusedLinearCrossEntropyLoss = Stand
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", place)
    head = torch.nn.Linear(16, 40, bias=False)
    hidden, labels = 10 * torch.randn(8, 16), torch.randint(40, (8,))
    settings = {"scale": scale, "softcap": 4.0}
    expected = tiled_loss(hidden, head, labels, **settings)
    torch.testing.assert_close(liger_loss(hidden, head, labels, **settings), expected)
    assert len(made) == liger_s and all(call["softcap"] == 4.0 for call in made)


@pytest.mark.parametrize(
    ("version", "available"), [("0.8.3", False), ("0.8.4", True), ("0.9.0", True), (None, True)]
)
def test_a_liger_that_counts_in_32_bits_is_not_used(version, available, monkeypatch):
    def installed(name):
        if version is None:  # a nightly build has another name
            raise loss_module.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(loss_module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(loss_module.metadata, "version", installed)
    assert loss_module.liger_available(torch.device("cuda")) is available
    assert not loss_module.liger_available(torch.device("cpu"))


class Doubled(LlamaForCausalLM):
    """As the code that comes with a model may have it."""

    def forward(self, *inputs, **settings):
        found = super().forward(*inputs, **settings)
        return type(found)(logits=2 * found.logits)


class LeftOut(LlamaForCausalLM):
    def forward(self, *inputs, **settings):
        found = super().forward(*inputs, **settings)
        return type(found)(logits=found.logits[..., :-1])


class WithoutBase(LlamaForCausalLM):
    base_model_prefix = ""


def test_a_model_whose_base_cannot_be_told_from_it_is_refused():
    config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=40)
    with pytest.raises(ValueError, match="this one has no base model to tell from it"):
        CausalLMWithLoss(WithoutBase(config), tiled_loss)


@pytest.mark.parametrize("kind", [Doubled, LeftOut])
def test_a_model_that_changes_its_logits_in_its_code_is_refused(kind):
    config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=40)
    with torch.device("meta"):
        model = kind(config)
    with pytest.raises(ValueError, match="llama: the model changes the logits after the head"):
        check_logits(model)


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model("llama"),
        AutoConfig.for_model("gpt2"),
        AutoConfig.for_model("mixtral", num_hidden_layers=2),
        CohereConfig(logit_scale=0.3),
        HyperCLOVAXConfig(logits_scaling=0.3),
        GraniteConfig(logits_scaling=3.0),
        Gemma2Config(final_logit_softcapping=1.5),
    ],
    ids=lambda config: config.model_type,
)
def test_the_settings_of_known_families_are_all_that_their_code_does(config, monkeypatch):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head, base = model.get_output_embeddings(), model.base_model
    check_logits(model)
    assert model.get_output_embeddings() is head and "forward" not in vars(base)
    if logit_settings(config):
        monkeypatch.setattr(loss_module, "logit_settings", lambda config: {})
        with pytest.raises(ValueError, match="changes the logits after the head"):
            check_logits(model)
