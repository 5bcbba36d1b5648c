"""--deterministic on a GPU: two runs of a model leave the same bits in every weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anchor_context.attention.kernels import KERNELS
from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.integrations.models import attention_heads, set_attention
from anchor_context.layout import IGNORE_INDEX
from anchor_context.loss import liger_available, liger_loss, tiled_loss
from anchor_context.memory.liger import apply_liger
from anchor_context.run.determinism import compute_deterministically

CUDA = torch.device("cuda")
ROW, VOCABULARY = 2048, 5000
LOSSES = {"tiled": tiled_loss, "Liger": liger_loss}


@pytest.fixture
def deterministic():
    compute_deterministically()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kernel", ["flex", *(n for n in KERNELS if n != "torch_cpu")])
def test_two_runs_are_the_same_bits(kernel, loss, deterministic):
    if loss == "Liger" and not liger_available(CUDA):
        pytest.skip("liger-kernel is not installed (pip install liger-kernel==0.8.5)")
    if kernel == "flex":
        chosen = {"name": "flex"}
    else:
        chosen = {"name": "flash", "kernel": kernel, "deterministic": True}
        if reason := KERNELS[kernel].unavailable(CUDA, torch.bfloat16, 64):
            pytest.skip(reason)
    first, second = (weights_after_three_steps(chosen, loss) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def weights_after_three_steps(chosen: dict, loss: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    model = LlamaForCausalLM(config).to(CUDA, torch.bfloat16).train()
    engine = make_engine(
        **chosen, device=CUDA, dtype=torch.bfloat16, head_dim=attention_heads(config)["head_dim"]
    )
    set_attention(model, engine.attend)
    if loss == "Liger":
        apply_liger(model)
    layout = make_layout(
        np.array([0, 900, 1000]),
        batch_size=1,
        row_length=ROW,
        pattern="intra_doc",
        anchor_placement="none",
    ).to(CUDA)
    tokens = torch.randint(VOCABULARY, (1, ROW), generator=torch.Generator().manual_seed(1))
    labels = tokens[0].roll(-1)
    labels[::7] = IGNORE_INDEX
    tokens, labels = tokens.to(CUDA), labels.to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        out = model.model(tokens, position_ids=layout.position_ids, layout=layout, use_cache=False)
        (LOSSES[loss](out.last_hidden_state[0], model.lm_head, labels) / ROW).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]
