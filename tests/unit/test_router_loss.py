"""The loss that a mixture of experts adds itself: refused by name, or left out, in both ways to train."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train_flags import GOOD
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import train
from anchor_context import patch_model
from anchor_context.attention.patterns import make_layout
from anchor_context.loss import CausalLMWithLoss, plain_loss
from anchor_context.parallel.groups import RankGrid

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe")


def tiny_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        # logits straight from the head: Granite divides them
        logits_scaling=1.0,
    )
    return AutoModelForCausalLM.from_config(config)


def batch() -> dict:
    tokens = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(1))
    layout = make_layout(
        np.array([0, 9]),
        batch_size=1,
        row_length=24,
        pattern="intra_doc",
        anchor_placement="none",
    )
    return {"input_ids": tokens, "position_ids": layout.position_ids, "layout": layout}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def test_both_ways_refuse_it_by_name(family):
    model = tiny_model(family)
    says = f"{family}: output_router_logits=true .*leave it out with"
    with pytest.raises(ValueError, match=f"{says} --leave_out_router_loss, or set it to false"):
        train.check_model(model.config, replace(GOOD, attn_engine="flex"), RankGrid())
    with pytest.raises(ValueError, match=f"{says} leave_out_router_loss=True"):
        patch_model(model, pattern="intra_doc")


def test_both_ways_leave_it_out_where_somebody_says_so(family):
    flags = replace(GOOD, attn_engine="flex", leave_out_router_loss=True)
    through_train, through_patch = tiny_model(family), tiny_model(family)
    train.check_model(through_train.config, flags, RankGrid())
    assert not through_train.config.output_router_logits
    patch_model(through_patch, pattern="intra_doc", leave_out_router_loss=True)

    inputs = batch()
    targets = inputs["input_ids"].roll(-1, 1)
    patch_model(through_train, pattern="intra_doc")  # for its attention alone
    total, count = CausalLMWithLoss(through_train, plain_loss)(**inputs, labels=targets)

    def loss_of(**more) -> Tensor:
        return through_patch(**inputs, labels=targets, shift_labels=targets, **more).loss

    torch.testing.assert_close(loss_of(), total / count)
    through_patch.config.output_router_logits = True
    assert loss_of() > total / count + 0.01, "the family adds no loss: the case is vacuous"


def test_a_call_that_asks_for_it_is_refused():
    model = patch_model(tiny_model("mixtral"), pattern="intra_doc", leave_out_router_loss=True)
    inputs = batch()
    with pytest.raises(ValueError, match="output_router_logits=True adds a loss"):
        model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    assert model(**inputs, output_router_logits=True).router_logits
