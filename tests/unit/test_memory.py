"""Checkpointing, offloading and tiled MLPs compute what they replace; Liger changes one model alone."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama import modeling_llama

from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.integrations.models import set_attention
from anchor_context.loss import CausalLMWithLoss, tiled_loss
from anchor_context.memory import treatments
from anchor_context.memory.liger import apply_liger
from anchor_context.memory.treatments import TreatedModel, Treatment, tile_mlps

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NOTHING = Treatment()
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
TOKENS = 96


def model_and_batch(family: str = "llama", *, tied: bool = False):
    torch.manual_seed(0)
    make_config, make_model = FAMILIES[family]
    config = make_config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=40,
        tie_word_embeddings=tied,
    )
    model = make_model(config).train()
    set_attention(model, make_engine("flash", device=CPU, dtype=torch.float32).attend)
    layout = make_layout(
        np.array([0, 17, TOKENS]),
        batch_size=2,
        row_length=TOKENS,
        pattern="intra_doc",
        anchor_placement="none",
    )
    tokens = torch.randint(40, (2, TOKENS))
    batch = {
        "input_ids": tokens,
        "labels": tokens.roll(-1, 1),
        "position_ids": layout.position_ids,
        "layout": layout,
    }
    return model, batch


def loss_and_gradients(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """After a scaling of the loss, as training does it, and of two micro-batches added up."""
    model.zero_grad()
    for scale in (0.37, 0.11):
        loss_sum, _ = CausalLMWithLoss(model, tiled_loss)(**batch)
        (loss_sum * scale).backward()
    return loss_sum.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def relative_error(got: dict, want: dict) -> float:
    assert got.keys() == want.keys()
    return max(((got[k] - want[k]).norm() / want[k].norm()).item() for k in want)


def treated(model, treatment: Treatment, *, tokens: int = 2 * TOKENS):
    TreatedModel(model, tiles=treatment.tiled_mlp)(treatment, tokens)
    return model


TREATMENTS = {
    "full": Treatment(checkpoint_every=1),
    "every 2nd": Treatment(checkpoint_every=2),
    "offload": Treatment(checkpoint_every=1, offload=True),
    "tiled": Treatment(tiled_mlp=True),
    "tiled and full": Treatment(checkpoint_every=1, tiled_mlp=True),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", TREATMENTS)
def test_a_treatment_changes_no_loss_and_no_gradient(name, tied, monkeypatch):
    monkeypatch.setattr(treatments, "TILE_TOKENS", 40)  # 192 tokens: 5 tiles, the last one short
    plain, batch = model_and_batch(tied=tied)
    planned, _ = model_and_batch(tied=tied)
    treated(planned, TREATMENTS[name])
    loss, gradients = loss_and_gradients(plain, batch)
    planned_loss, planned_gradients = loss_and_gradients(planned, batch)
    assert planned_loss == pytest.approx(loss, rel=1e-6)
    assert relative_error(planned_gradients, gradients) < 1e-5


def mlp_gradients(*, tiles: int, dtype: torch.dtype, micro_batches: int = 1) -> list[torch.Tensor]:
    """Of an MLP's bfloat16 weights and of its input, computed in `dtype`."""
    model, _ = model_and_batch()
    mlp = model.model.layers[0].mlp.to(torch.bfloat16).to(dtype)
    tile_mlps(model).tiles = tiles
    for _ in range(micro_batches):
        x, dout = (torch.randn(4096, 32).to(torch.bfloat16).to(dtype) for _ in range(2))
        x.requires_grad_()
        mlp(x).backward(dout)
    return [x.grad.double(), *(p.grad.double() for p in mlp.parameters())]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_gradients_of_many_tiles_add_up_in_float32(micro_batches):
    """In bfloat16 the sum of 256 tiles would be off by ten times as much as that of one."""
    exact, whole, tiled = (
        mlp_gradients(tiles=tiles, dtype=dtype, micro_batches=micro_batches)
        for tiles, dtype in ((1, torch.float64), (1, torch.bfloat16), (256, torch.bfloat16))
    )
    for ours, theirs, want in zip(tiled, whole, exact, strict=True):
        assert (ours - want).norm() < 1.5 * (theirs - want).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_s_mlps_are_tiled_and_whole_again(family):
    model, batch = model_and_batch(family)
    rows = []
    model.model.layers[1].mlp.up_proj.register_forward_hook(
        lambda module, args, out: rows.append(out.shape[:-1].numel())
    )
    loss, gradients = loss_and_gradients(model, batch)
    assert set(rows) == {2 * TOKENS}

    rows.clear()
    tiling = tile_mlps(model)
    tiling.tiles = 4
    tiled_loss, tiled_gradients = loss_and_gradients(model, batch)
    assert tiled_loss == pytest.approx(loss, rel=1e-6)
    assert relative_error(tiled_gradients, gradients) < 1e-5
    assert max(rows) == 48 and sum(rows) == 2 * 2 * 2 * TOKENS  # forward and again in backward

    rows.clear()
    tiling.tiles = 1
    assert loss_and_gradients(model, batch)[0] == loss
    assert set(rows) == {2 * TOKENS}


def test_one_instance_is_tiled_and_no_other():
    first, _ = model_and_batch()
    second, _ = model_and_batch()
    tile_mlps(first)
    assert all("forward" in vars(layer.mlp) for layer in first.model.layers)
    assert not any("forward" in vars(layer.mlp) for layer in second.model.layers)


@pytest.mark.parametrize("tiles", [2, 3, 7])
@pytest.mark.parametrize("tokens", range(1, 24))
def test_there_are_as_many_tiles_as_asked_for_and_the_last_hands_the_gradient_on(tokens, tiles):
    # Every tile is a gathering of ZeRO-3, of which ranks must have equally many, also with fewer tokens than
    # tiles. And DeepSpeed marks a weight's gradient as ready at tile number `tiles`, not at the last tile: a
    # count that torch.chunk does not reach (6 chunks of 10 tokens are 5) would leave it unready for good.
    model, _ = model_and_batch()
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, tokens, 32, requires_grad=True)
    whole = mlp(x)
    calls = []
    mlp.up_proj.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    tile_mlps(model).tiles = tiles
    tiled = mlp(x)
    assert len(calls) == tiles
    torch.testing.assert_close(tiled, whole)
    tiled.sum().backward()
    assert len(calls) == 2 * tiles
    assert all(getattr(p, "ds_grad_is_ready", True) for p in mlp.parameters())
    assert all(p.grad.abs().sum() > 0 for p in mlp.parameters())


def test_checkpointing_keeps_one_input_per_layer():
    """What autograd holds between forward and backward."""

    def saved_bytes(treatment: Treatment) -> int:
        model, batch = model_and_batch()
        treated(model, treatment)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # `batch` and the loss hold on to every saved storage, so no address is used twice.
            loss_sum, _ = CausalLMWithLoss(model, tiled_loss)(**batch)
        assert loss_sum.requires_grad
        return sum(held.values())

    assert saved_bytes(TREATMENTS["full"]) < saved_bytes(NOTHING) / 2


def test_a_model_without_such_mlps_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40))
    with pytest.raises(ValueError, match=r"--tiled_mlp.*GPT2LMHeadModel"):
        tile_mlps(model)


# --- Liger ----------------------------------------------------------------------------------------


@pytest.fixture
def stand_in_for_liger(monkeypatch):
    """Liger's interface (0.8), doing to models and modules what it does, in plain PyTorch."""
    asked = {}

    def apply(model, *, rope=True, **kernels):
        asked.update(kernels, rope=rope)
        modeling = sys.modules[type(model).__module__]
        for name in [n for n in vars(modeling) if n.endswith(("RMSNorm", "MLP"))]:
            setattr(modeling, name, None)  # Liger's own classes
        for layer in model.model.layers:
            layer.mlp.forward = lambda x, mlp=layer.mlp: type(mlp).forward(mlp, x)

    def apply_without_rope(model, *, rope=False, **kernels):
        apply(model, rope=rope, **kernels)

    def rotate(q, k, cos, sin):
        asked["rotations"] = asked.get("rotations", 0) + 1
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)

    transformers_part = ModuleType("liger_kernel.transformers")
    transformers_part._apply_liger_kernel_to_instance = apply
    transformers_part.liger_rotary_pos_emb = rotate
    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply, "mistral": apply_without_rope}
    for module in (ModuleType("liger_kernel"), transformers_part, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_liger_changes_one_model_and_no_loss(stand_in_for_liger, monkeypatch):
    monkeypatch.setattr(treatments, "TILE_TOKENS", 50)
    names = dict(vars(modeling_llama))
    plain, batch = model_and_batch()
    planned, _ = model_and_batch()
    apply_liger(planned)
    treated(planned, Treatment(tiled_mlp=True))
    assert vars(modeling_llama) == names
    assert stand_in_for_liger == {
        "rms_norm": True,
        "swiglu": True,
        "rope": False,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    loss, _ = loss_and_gradients(plain, batch)
    assert "rotations" not in stand_in_for_liger
    assert loss_and_gradients(planned, batch)[0] == pytest.approx(loss, rel=1e-6)
    assert stand_in_for_liger["rotations"] == 2 * len(planned.model.layers)  # two micro-batches


def test_a_rotation_that_liger_leaves_out_stays_the_model_s_own(stand_in_for_liger):
    """As GLM-4's, which turns neighbouring entries together: Liger's would be another one."""
    plain, batch = model_and_batch("mistral")
    planned, _ = model_and_batch("mistral")
    apply_liger(planned)
    assert stand_in_for_liger["swiglu"] and not stand_in_for_liger["rope"]
    assert loss_and_gradients(planned, batch)[0] == loss_and_gradients(plain, batch)[0]
    assert "rotations" not in stand_in_for_liger
