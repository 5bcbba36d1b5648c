"""What the memory plan expects of ranks that share a row, against the tensors that autograd keeps."""

from __future__ import annotations

import numpy as np
import torch
from ranks import run_ranks
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.integrations.models import set_attention
from anchor_context.memory.estimate import ModelSizes, Setup, expected_peak
from anchor_context.memory.treatments import Treatment
from anchor_context.parallel.groups import make_grid, make_groups
from anchor_context.parallel.shard import shard_batch

CPU, TOKENS = torch.device("cpu"), 256


def kept_and_expected(rank: int, ranks: int) -> tuple[int, int]:
    """Bytes of the activations behind a forward with Ulysses; of weights, what is kept is no activation.

    Heads are wide and MLPs narrow, so that attention's part decides.
    """
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=256,
    )
    model = LlamaForCausalLM(config).train()
    grid = make_grid(rank=rank, world_size=ranks, ring_degree=1, ulysses_degree=ranks)
    _, group = make_groups(grid, rank=rank, world_size=ranks)
    engine = make_engine("flash", device=CPU, dtype=torch.float32, grid=grid, ulysses_group=group)
    set_attention(model, engine.attend)
    layout = make_layout(
        np.arange(0, ranks * TOKENS, 100),
        batch_size=1,
        row_length=ranks * TOKENS,
        pattern="anchor",
        anchor_placement="per_document",
    )
    row = torch.zeros(1, ranks * TOKENS, dtype=torch.long)
    whole = {"input_ids": row, "position_ids": layout.position_ids, "layout": layout}
    batch = shard_batch(whole, grid=grid)

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(**batch, use_cache=False)
    setup = Setup(ModelSizes.of(model), 4, "cpu", ulysses_degree=ranks)
    expected = expected_peak(setup, Treatment(), TOKENS).parts["activations"]
    return sum(storage.nbytes() for storage in kept.values()), expected


def test_ulysses_keeps_what_is_expected(tmp_path):
    """The attention's output twice: of some heads, as it came, and of all of them, as it is projected."""
    for kept, expected in run_ranks(kept_and_expected, 2, tmp_path):
        assert 0.98 * kept <= expected <= 1.1 * kept, (kept, expected)
