"""LoRA adapters: what trains, what stays bit for bit, and what a saved model is."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import train
from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.integrations.adapters import (
    PEFT,
    Lora,
    add_adapters,
    frozen_checksum,
    write_merged_model,
)
from anchor_context.integrations.models import set_attention
from anchor_context.integrations.rehearsal import rehearse
from anchor_context.loss import CausalLMWithLoss, tiled_loss
from anchor_context.memory import treatments
from anchor_context.memory.treatments import TreatedModel, Treatment
from anchor_context.run.saved_model import Source

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **more)),
    "qwen2": lambda **more: Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, **more)),
    "qwen3": lambda **more: Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, **more)),
    "qwen3_moe": lambda **more: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **more
        )
    ),
    # Its first layer is dense, and names its projections as version 4 of transformers named the experts'.
    "glm4_moe": lambda **more: Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **SIZES,
            **HEADS,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            **more,
        )
    ),
    "gpt_neox": lambda **more: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SIZES, num_attention_heads=4, **more)
    ),
}
EVERYTHING = Lora(rank=4, alpha=8.0, targets=None, embeddings_and_norms=True)
ATTENTION = Lora(
    rank=3, alpha=5.0, targets=("k_proj", "q_proj", "v_proj"), embeddings_and_norms=False
)
MLP = Lora(rank=3, alpha=5.0, targets=("down_proj", "gate_proj"), embeddings_and_norms=False)
TOKENS = 60


def make_model(family: str = "llama", *, tied: bool = False):
    torch.manual_seed(0)
    return FAMILIES[family](tie_word_embeddings=tied).train()


def as_if_trained(model) -> None:
    """Other values in all that trains: B begins at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --- what trains ----------------------------------------------------------------------------------


def test_adapters_begin_as_those_of_peft_and_leave_the_random_state_alone():
    model = make_model()
    state = torch.get_rng_state()
    add_adapters(model, EVERYTHING, seed=7)
    assert torch.get_rng_state().equal(state) and type(model) is LlamaForCausalLM

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    base = make_model()
    torch.manual_seed(7)
    theirs = get_peft_model(base, config).base_model.model.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    assert all(weight.equal(theirs[name]) for name, weight in model.state_dict().items())


def test_what_is_trained():
    def adapted(lora: Lora) -> set[str]:
        model = make_model()
        add_adapters(model, lora, seed=0)
        return trained(model)

    assert {n.split(".")[-4] for n in adapted(ATTENTION)} == {"q_proj", "k_proj", "v_proj"}
    everything = adapted(EVERYTHING)
    assert {n.split(".")[-4] for n in everything if "lora_" in n} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    whole = {n for n in everything if "lora_" not in n}
    layer = {f"{norm}_layernorm" for norm in ("input", "post_attention")}
    assert whole == {
        *("model.embed_tokens.weight", "model.norm.weight"),
        *(f"model.layers.{n}.{norm}.weight" for n in range(2) for norm in layer),
    }


TREATMENTS = {
    "nothing": Treatment(),
    "full": Treatment(checkpoint_every=1),
    "every 2nd": Treatment(checkpoint_every=2),
    "offload": Treatment(checkpoint_every=1, offload=True),
    "tiled": Treatment(tiled_mlp=True),
    "tiled and full": Treatment(checkpoint_every=1, tiled_mlp=True),
}


@pytest.mark.parametrize("lora", [EVERYTHING, ATTENTION, MLP], ids=["all", "attention", "MLP"])
@pytest.mark.parametrize("name", TREATMENTS)
def test_every_treatment_gives_every_adapter_the_gradient_of_a_plain_model(name, lora, monkeypatch):
    """The first layer's input needs no gradient of itself; the frozen weights get none."""
    monkeypatch.setattr(treatments, "TILE_TOKENS", 16)
    layout = make_layout(
        np.array([0, 17]),
        batch_size=1,
        row_length=TOKENS,
        pattern="full",
        anchor_placement="none",
    )
    row = torch.randint(40, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = row.roll(-1, 1)

    plain = make_model()
    add_adapters(plain, lora, seed=0)
    as_if_trained(plain)
    treated = copy.deepcopy(plain)
    logits = plain(row).logits.flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    want.backward()

    treatment = TREATMENTS[name]
    set_attention(treated, make_engine("flash", device=row.device, dtype=torch.float32).attend)
    TreatedModel(treated, tiles=treatment.tiled_mlp)(treatment, TOKENS)
    got, _ = CausalLMWithLoss(treated, tiled_loss)(
        input_ids=row, labels=labels, position_ids=layout.position_ids, layout=layout
    )
    got.backward()

    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    theirs = dict(plain.named_parameters())
    for parameter_name, parameter in treated.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        expected = theirs[parameter_name].grad
        assert expected.norm() > 0, "the case is vacuous"
        assert (parameter.grad - expected).norm() / expected.norm() < 1e-5, parameter_name


def test_no_group_of_parameters_is_empty():
    model = make_model()
    add_adapters(model, ATTENTION, seed=0)
    (matrices,) = train.parameter_groups(model, weight_decay=0.1)
    assert matrices["weight_decay"] == 0.1 and len(matrices["params"]) == 2 * 3 * 2


def test_the_checksum_is_of_the_weights_that_stay():
    model = make_model()
    add_adapters(model, EVERYTHING, seed=0)
    before = frozen_checksum(model)
    as_if_trained(model)
    assert frozen_checksum(model) == before
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-7
    assert frozen_checksum(model) != before


# --- what is saved --------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [EVERYTHING, ATTENTION], ids=["everything", "attention"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_the_adapter_and_the_trained_model_agree(family, tied, lora, tmp_path):
    if family == "gpt_neox" and lora is ATTENTION:
        lora = Lora(rank=3, alpha=5.0, targets=("query_key_value",), embeddings_and_norms=False)
    base, saved = str(tmp_path / "base"), tmp_path / "step-1"
    model = make_model(family, tied=tied)
    model.save_pretrained(base)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_adapters(model, lora, seed=0)
    as_if_trained(model)
    weights = model.state_dict()
    source = Source(config=json.loads((tmp_path / "base/config.json").read_text()), files={})
    write_merged_model(saved, model, weights, source, lora=lora, base=base)

    tokens = torch.arange(40)[None]
    want = model.eval()(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(saved).eval()
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(saved / "adapter")
    ).eval()
    untrained = AutoModelForCausalLM.from_pretrained(base).eval()
    assert (untrained(tokens).logits - want).abs().max() > 0.1, "the case is vacuous"
    assert (merged(tokens).logits - want).abs().max() < 1e-5
    assert (adapted(tokens).logits - want).abs().max() < 1e-5
    assert adapted.peft_config["default"].base_model_name_or_path == base

    # Neither training nor merging has touched a weight that is not trained.
    after = merged.state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        layer = name.rpartition(".")[0]
        if f"{layer}.base_layer.weight" in weights:
            assert weights[name.replace(layer, f"{layer}.base_layer")].equal(weight)
        if name in weights and name not in trained(model):
            embeddings_train = tied and lora.embeddings_and_norms
            if not (embeddings_train and name in model.all_tied_weights_keys):
                assert after[name].equal(weight), name


def test_an_adapter_trained_with_another_rope_belongs_to_the_base_with_the_saved_configuration(
    tmp_path,
):
    """As the README says: the base's own would be another function."""
    base, saved = str(tmp_path / "base"), tmp_path / "step-1"
    make_model().save_pretrained(base)
    config = AutoConfig.from_pretrained(base)
    config.rope_parameters["rope_theta"] = 100.0
    model = AutoModelForCausalLM.from_pretrained(base, config=config)
    add_adapters(model, EVERYTHING, seed=0)
    as_if_trained(model)
    source = Source(config=json.loads((tmp_path / "base/config.json").read_text()), files={})
    write_merged_model(saved, model, model.state_dict(), source, lora=EVERYTHING, base=base)

    tokens = torch.arange(40)[None]
    want = model.eval()(tokens).logits

    def off(**how) -> float:
        plain = AutoModelForCausalLM.from_pretrained(base, **how)
        adapted = PeftModel.from_pretrained(plain, str(saved / "adapter")).eval()
        return (adapted(tokens).logits - want).abs().max().item()

    assert off(config=AutoConfig.from_pretrained(saved)) < 1e-5
    assert off() > 1e-3


def test_merging_rounds_once(tmp_path):
    model = make_model().to(torch.bfloat16)
    add_adapters(model, ATTENTION, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    as_if_trained(model)
    model.config.dtype = torch.bfloat16
    source = Source(config=model.config.to_dict() | {"model_type": "llama"}, files={})
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    write_merged_model(tmp_path / "m", model, weights, source, lora=ATTENTION, base="base")
    layer = "model.layers.1.self_attn.v_proj"
    a, b = (weights[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
    exact = weights[f"{layer}.base_layer.weight"].double() + 5 / 3 * b @ a
    got = load_file(tmp_path / "m/model.safetensors")[f"{layer}.weight"]
    assert got.dtype == torch.bfloat16
    # In float32, a value in ten thousand lies on the other side of the middle.
    assert (got == exact.to(torch.bfloat16)).double().mean() > 0.99
    assert load_file(tmp_path / "m/adapter/adapter_model.safetensors")[
        f"base_model.model.{layer}.lora_A.weight"
    ].equal(weights[f"{layer}.lora_A.default.weight"])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"lora_alpha": 4.0}, "--lora_alpha, .* need --lora_rank"),
        ({"lora_targets": "q_proj"}, "--lora_targets and .* need --lora_rank"),
        ({"lora_embeddings_and_norms": True}, "--lora_embeddings_and_norms need --lora_rank"),
        ({"lora_rank": -1}, "--lora_rank -1 must be at least 1, or 0"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "--lora_alpha 0.0 must be positive"),
        ({"lora_rank": 2, "lora_targets": " ,"}, "--lora_targets is empty"),
    ],
)
def test_values_that_cannot_work(flags, says):
    with pytest.raises(ValueError, match=says):
        train.lora_of(train.Flags(model_name_or_path="model", **flags))


def test_flags_and_their_defaults():
    def lora(line: str) -> Lora | None:
        return train.lora_of(train.parse_flags(["--model_name_or_path", "m", *line.split()]))

    assert lora("") is None
    assert lora("--lora_rank 8") == Lora(8, 16.0, None, False)
    line = "--lora-rank 8 --lora-alpha 4 --lora_targets v_proj,q_proj --lora_embeddings_and_norms"
    assert lora(line) == Lora(8, 4.0, ("q_proj", "v_proj"), True)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    pinned = (Path(train.__file__).parent / "tests/requirements.txt").read_text().splitlines()
    assert PEFT in pinned
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"--lora_rank needs peft: pip install {PEFT}"):
        train.lora_of(train.Flags(model_name_or_path="model", lora_rank=2))


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (
            ("q_proj", "query"),
            "--lora_targets query cannot adapt a llama: its linear layers are down",
        ),
        (("lm_head",), "--lora_targets lm_head cannot .* up_proj, v_proj \\(besides the head\\)"),
    ],
)
def test_unknown_targets_are_found_without_weights(targets, says, tmp_path):
    make_model().config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    source = Source(config=config.to_dict(), files={})
    lora = Lora(rank=2, alpha=4.0, targets=targets, embeddings_and_norms=False)
    with pytest.raises(ValueError, match=says):
        rehearse(str(tmp_path), config, source, trust_remote_code=False, lora=lora)
    rehearse(str(tmp_path), config, source, trust_remote_code=False, lora=EVERYTHING)


def test_layers_that_peft_takes_for_experts_are_left_alone_and_refused_by_name():
    model = make_model("glm4_moe")
    mlp = Lora(rank=2, alpha=4.0, targets=("down_proj",), embeddings_and_norms=False)
    with pytest.raises(
        ValueError,
        match="down_proj cannot .* o_proj, q_proj, v_proj .*, and down_proj, gate_proj, up_proj, experts to",
    ):
        add_adapters(model, mlp, seed=0)
    add_adapters(model, EVERYTHING, seed=0)
    adapted = {name.split(".")[-4] for name in trained(model) if "lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_model_without_linear_layers_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40))
    with pytest.raises(ValueError, match="--lora_rank cannot adapt a gpt2: it has no linear layer"):
        add_adapters(model, EVERYTHING, seed=0)
