"""Checkpointing and tiled MLPs compute what they replace; `auto` follows device and row length."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Starcoder2Config,
)
from transformers.models.llama import modeling_llama

from anchor_context import memory
from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.loss import CausalLMWithLoss
from anchor_context.memory import MemoryPlan, apply_memory_plan, choose_memory_plan, tile_mlps
from anchor_context.models import set_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NOTHING = MemoryPlan("none", "", False, "", False, "")
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
        loss_sum, _ = CausalLMWithLoss(model, fused=False)(**batch)
        (loss_sum * scale).backward()
    return loss_sum.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def relative_error(got: dict, want: dict) -> float:
    assert got.keys() == want.keys()
    return max(((got[k] - want[k]).norm() / want[k].norm()).item() for k in want)


PLANS = {
    "full": replace(NOTHING, gradient_checkpointing="full"),
    "tiled": replace(NOTHING, tiled_mlp=True),
    "tiled and full": replace(NOTHING, gradient_checkpointing="full", tiled_mlp=True),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_changes_no_loss_and_no_gradient(name, tied, monkeypatch):
    monkeypatch.setattr(memory, "TILE_TOKENS", 40)  # 192 tokens: 5 tiles, the last one short
    plain, batch = model_and_batch(tied=tied)
    planned, _ = model_and_batch(tied=tied)
    apply_memory_plan(planned, PLANS[name])
    loss, gradients = loss_and_gradients(plain, batch)
    planned_loss, planned_gradients = loss_and_gradients(planned, batch)
    assert planned_loss == pytest.approx(loss, rel=1e-6)
    assert relative_error(planned_gradients, gradients) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_s_mlps_are_tiled_and_restored(family, monkeypatch):
    monkeypatch.setattr(memory, "TILE_TOKENS", 50)
    model, batch = model_and_batch(family)
    rows = []
    model.model.layers[1].mlp.up_proj.register_forward_hook(
        lambda module, args, out: rows.append(out.shape[:-1].numel())
    )
    loss, gradients = loss_and_gradients(model, batch)
    assert set(rows) == {2 * TOKENS}

    rows.clear()
    undo = tile_mlps(model)
    tiled_loss, tiled_gradients = loss_and_gradients(model, batch)
    assert tiled_loss == pytest.approx(loss, rel=1e-6)
    assert relative_error(tiled_gradients, gradients) < 1e-5
    assert max(rows) == 48 and sum(rows) == 2 * 2 * 2 * TOKENS  # forward and again in backward

    rows.clear()
    undo()
    assert loss_and_gradients(model, batch)[0] == loss
    assert set(rows) == {2 * TOKENS}


def test_one_instance_is_tiled_and_no_other(monkeypatch):
    monkeypatch.setattr(memory, "TILE_TOKENS", 50)
    first, _ = model_and_batch()
    second, _ = model_and_batch()
    tile_mlps(first)
    assert all("forward" in vars(layer.mlp) for layer in first.model.layers)
    assert not any("forward" in vars(layer.mlp) for layer in second.model.layers)


@pytest.mark.parametrize("tokens", range(1, 60))
def test_the_last_tile_hands_the_gradient_on(tokens, monkeypatch):
    # DeepSpeed marks a weight's gradient as ready at tile number `shards`, not at the last tile: a count
    # that torch.chunk does not reach (6 chunks of 10 tokens are 5) would leave it unready for good.
    monkeypatch.setattr(memory, "TILE_TOKENS", 7)
    model, _ = model_and_batch()
    mlp = model.model.layers[0].mlp
    tile_mlps(model)
    mlp(torch.randn(1, tokens, 32, requires_grad=True)).sum().backward()
    assert all(getattr(p, "ds_grad_is_ready", True) for p in mlp.parameters())
    assert all(p.grad.abs().sum() > 0 for p in mlp.parameters())


def test_checkpointing_keeps_one_input_per_layer():
    """What autograd holds between forward and backward."""

    def saved_bytes(plan: MemoryPlan) -> int:
        model, batch = model_and_batch()
        apply_memory_plan(model, plan)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # `batch` and the loss hold on to every saved storage, so no address is used twice.
            loss_sum, _ = CausalLMWithLoss(model, fused=False)(**batch)
        assert loss_sum.requires_grad
        return sum(held.values())

    assert saved_bytes(PLANS["full"]) < saved_bytes(NOTHING) / 2


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
    monkeypatch.setattr(memory, "TILE_TOKENS", 50)
    names = dict(vars(modeling_llama))
    plain, batch = model_and_batch()
    planned, _ = model_and_batch()
    apply_memory_plan(planned, replace(NOTHING, liger=True, tiled_mlp=True))
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
    apply_memory_plan(planned, replace(NOTHING, liger=True))
    assert stand_in_for_liger["swiglu"] and not stand_in_for_liger["rope"]
    assert loss_and_gradients(planned, batch)[0] == loss_and_gradients(plain, batch)[0]
    assert "rotations" not in stand_in_for_liger


def test_liger_without_kernels_for_the_model_is_refused(stand_in_for_liger, monkeypatch):
    monkeypatch.setattr(memory, "liger_available", lambda device: True)
    model, _ = model_and_batch("qwen3")
    asked = {"device": CUDA, "row_tokens_per_rank": 16}
    plan = choose_memory_plan(model, **asked)
    assert not plan.liger and "no kernels for qwen3" in plan.liger_reason
    with pytest.raises(ValueError, match="--liger yes.*qwen3"):
        choose_memory_plan(model, liger="yes", **asked)


# --- the choice -----------------------------------------------------------------------------------

LLAMA, _ = model_and_batch()


@pytest.mark.parametrize(
    ("device", "tokens", "expected"),
    [
        (CPU, 4_096, ("none", False)),
        (CPU, 65_536, ("full", False)),
        (CPU, 1_048_576, ("full", True)),  # what the CPU holds need not be offloaded
        (CUDA, 4_096, ("none", False)),
        (CUDA, 8_192, ("full", False)),
        (CUDA, 131_072, ("full", True)),
        (CUDA, 262_144, ("offload", True)),
    ],
)
def test_auto_follows_device_and_row_length(device, tokens, expected):
    plan = choose_memory_plan(LLAMA, device=device, row_tokens_per_rank=tokens)
    assert (plan.gradient_checkpointing, plan.tiled_mlp) == expected
    for reason in (plan.gradient_checkpointing_reason, plan.tiled_mlp_reason):
        assert f"{tokens:,} tokens" in reason and reason in str(plan)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("tiled", ["yes", "no"])
def test_what_a_flag_says_is_done(checkpointing, tiled):
    plan = choose_memory_plan(
        LLAMA,
        device=CPU,
        row_tokens_per_rank=16,
        gradient_checkpointing=checkpointing,
        tiled_mlp=tiled,
        liger="no",
    )
    assert (plan.gradient_checkpointing, plan.tiled_mlp) == (checkpointing, tiled == "yes")
    assert (plan.liger, plan.liger_reason) == (False, "--liger")
    assert plan.tiled_mlp_reason == "--tiled_mlp"
    assert plan.gradient_checkpointing_reason == "--gradient_checkpointing"


def test_offload_on_the_cpu_is_full_and_says_so():
    asked = {"row_tokens_per_rank": 16, "gradient_checkpointing": "offload"}
    assert choose_memory_plan(LLAMA, device=CUDA, **asked).gradient_checkpointing == "offload"
    plan = choose_memory_plan(LLAMA, device=CPU, **asked)
    assert plan.gradient_checkpointing == "full"
    assert "offload asked for" in plan.gradient_checkpointing_reason


def test_a_model_that_transformers_cannot_checkpoint_is_not_checkpointed(monkeypatch):
    monkeypatch.setattr(type(LLAMA), "supports_gradient_checkpointing", False)
    asked = {"device": CPU, "row_tokens_per_rank": 1_048_576}
    plan = choose_memory_plan(LLAMA, **asked)
    assert plan.gradient_checkpointing == "none"
    assert plan.gradient_checkpointing_reason == "transformers cannot checkpoint llama"
    with pytest.raises(ValueError, match="--gradient_checkpointing full cannot work here"):
        choose_memory_plan(LLAMA, gradient_checkpointing="full", **asked)


@pytest.mark.parametrize("family", [Phi3Config, Starcoder2Config, Glm4Config])
def test_auto_tiles_no_other_mlps(family):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(family(**sizes, **heads, pad_token_id=0))
    asked = {"device": CPU, "row_tokens_per_rank": 1_048_576}
    plan = choose_memory_plan(model, **asked)
    assert not plan.tiled_mlp and f"{family.model_type} has no MLP" in plan.tiled_mlp_reason
    apply_memory_plan(model, plan)
    with pytest.raises(ValueError, match=f"--tiled_mlp yes.*{family.model_type}"):
        choose_memory_plan(model, tiled_mlp="yes", **asked)


@pytest.mark.parametrize("installed", [False, True])
def test_liger_runs_where_it_can(installed, stand_in_for_liger, monkeypatch):
    monkeypatch.setattr(memory, "liger_available", lambda device: installed)
    on_gpu = choose_memory_plan(LLAMA, device=CUDA, row_tokens_per_rank=16)
    assert on_gpu.liger is installed
    assert ("installed" if installed else "pip install liger-kernel") in on_gpu.liger_reason
    on_cpu = choose_memory_plan(LLAMA, device=CPU, row_tokens_per_rank=16)
    assert not on_cpu.liger and "cpu" in on_cpu.liger_reason
    with pytest.raises(ValueError, match="--liger yes"):
        choose_memory_plan(LLAMA, device=CPU, row_tokens_per_rank=16, liger="yes")


@pytest.mark.parametrize(
    ("flag", "value"), [("gradient_checkpointing", "some"), ("tiled_mlp", "on"), ("liger", "cpu")]
)
def test_an_unknown_value_names_the_choices(flag, value):
    with pytest.raises(ValueError, match=rf"--{flag} {value}.*auto"):
        choose_memory_plan(LLAMA, device=CPU, row_tokens_per_rank=16, **{flag: value})
