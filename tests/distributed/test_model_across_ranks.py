"""A whole tiny model on a ring, under Ulysses and on data × sequence grids: loss and all gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from rows import KINDS, ROW, batch_of
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from anchor_context.engine import make_engine
from anchor_context.integrations.calls import layer_windows
from anchor_context.integrations.models import set_attention
from anchor_context.loss import CausalLMWithLoss, tiled_loss
from anchor_context.parallel.groups import RankGrid, make_grid, make_groups
from anchor_context.parallel.shard import shard_batch
from anchor_context.rope.length import fix_frequencies
from anchor_context.rope.scaling import apply_rope_settings

LAYERS = 2


@dataclass(frozen=True)
class Case:
    layout: str
    rows: tuple[str, ...]
    pattern: tuple[str, str] = ("anchor", "per_document")
    padding: int = 0
    checkpointing: bool = False
    rope: str = "default"
    window: int | None = None
    """Of the first layer: the second sees everything."""


LAYOUTS = {  # name -> (ring degree, Ulysses degree); the rest of four ranks is data parallel
    "ring 4": (4, 1),
    "hybrid 2 x 2": (2, 2),
    "Ulysses 4": (1, 4),
    "data 2 x ring 2": (2, 1),
    "data 2 x Ulysses 2": (1, 2),
}
ROPE = {  # stretched beyond a third of the row
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": ROW // 3,
    },
}
CASES = [
    *(Case(layout, (kind,) * 2) for layout in LAYOUTS for kind in KINDS),
    *(Case(layout, ("one", "primes"), ("full", "none")) for layout in LAYOUTS),
    # The second row's last three quarters are padding: some rank of a data group has few targets.
    *(Case(layout, ("primes", "ends_at_edge"), padding=180) for layout in LAYOUTS),
    # A row of nothing but padding: a data group, or a rank, without any target.
    *(Case(layout, ("primes", "one"), padding=ROW) for layout in LAYOUTS),
    Case("ring 4", ("primes", "one"), checkpointing=True),
    Case("hybrid 2 x 2", ("primes", "one"), checkpointing=True),
    # Frequencies that transformers takes from the positions of a call: ranks hold different ones.
    *(Case(layout, ("primes", "one"), rope=r) for layout in ("ring 4", "Ulysses 4") for r in ROPE),
    Case("Ulysses 4", ("primes",) * 2, ("intra_doc_reset", "none"), rope="longrope"),
    *(Case(layout, ("primes", "one"), window=37) for layout in ("ring 4", "hybrid 2 x 2")),
]


def tiny_model(case: Case) -> PreTrainedModel:
    make_config, make = LlamaConfig, LlamaForCausalLM
    if case.window is not None:
        make_config, make = partial(Qwen3Config, **windows(case.window)), Qwen3ForCausalLM
    config = make_config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=ROW if case.rope == "default" else ROW // 3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4} | ROPE.get(case.rope, {}),
    )
    apply_rope_settings(config, row_length=ROW)
    fix_frequencies(config, row_length=ROW)
    torch.manual_seed(0)
    model = make(config).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def windows(window: int) -> dict:
    """Of Qwen3's configuration, for layers that differ."""
    kinds = ["sliding_attention", "full_attention"]
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "layer_types": kinds,
        "head_dim": 8,
    }


def loss_and_gradients(case: Case, batch: dict, grid: RankGrid, groups: tuple) -> dict:
    """This rank's sums, before anything is reduced over ranks."""
    engine = make_engine(
        "flash",
        device=torch.device("cpu"),
        dtype=torch.float32,
        grid=grid,
        ring_group=groups[0],
        ulysses_group=groups[1],
    )
    model = tiny_model(case)
    set_attention(model, engine.attend)
    parallel = shard_batch(batch, grid=grid, windows=layer_windows(model.config))
    loss_sum, count = CausalLMWithLoss(model, tiled_loss)(**parallel)
    loss_sum.backward()
    return {
        "loss_sum": loss_sum.detach(),
        "count": count,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "account": engine.traffic.take(),
    }


def whole_batch(case: Case) -> dict:
    pattern, placement = case.pattern
    return batch_of(
        case.rows, pattern=pattern, placement=placement, vocabulary=64, padding=case.padding
    )


def rows_of(batch: dict, rows: slice, case: Case) -> dict:
    """Some rows of a batch, as a data group would load them."""
    pattern, placement = case.pattern
    part = batch_of(case.rows[rows], pattern=pattern, placement=placement, vocabulary=64)
    return part | {"input_ids": batch["input_ids"][rows], "labels": batch["labels"][rows]}


def on_ranks(rank: int, world: int) -> dict:
    grids, groups = {}, {}
    for name, (ring_degree, ulysses_degree) in LAYOUTS.items():
        grids[name] = make_grid(
            rank=rank, world_size=world, ring_degree=ring_degree, ulysses_degree=ulysses_degree
        )
        groups[name] = make_groups(grids[name], rank=rank, world_size=world)
    found = {}
    for case in CASES:
        grid, batch = grids[case.layout], whole_batch(case)
        if grid.data_degree == 2:
            batch = rows_of(batch, slice(grid.data_rank, grid.data_rank + 1), case)
        here = loss_and_gradients(case, batch, grid, groups[case.layout])
        own_count = int(here["count"])
        for tensor in (here["loss_sum"], here["count"], *here["gradients"].values()):
            dist.all_reduce(tensor)
        found[case] = here | {"own_count": own_count}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(on_ranks, 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_every_parameter_gradient_equal_one_process(found, case):
    alone = loss_and_gradients(case, whole_batch(case), RankGrid(), (None, None))
    shared = found[0][case]
    assert shared["count"] == alone["count"] > 0
    mean, true_mean = (x["loss_sum"] / x["count"] for x in (shared, alone))
    assert abs(mean - true_mean) / true_mean < 1e-5
    for name, true in alone["gradients"].items():
        assert true.abs().max() > 0, f"{name} has no gradient: the case proves nothing"
        error = (shared["gradients"][name] - true).norm() / true.norm()
        assert error < 1e-5, name


def test_some_rank_holds_nothing_but_padding(found):
    padded = [case for case in CASES if case.padding == ROW]
    idle = {case.layout for case in padded if 0 in (found[r][case]["own_count"] for r in range(4))}
    assert idle >= {"data 2 x ring 2", "data 2 x Ulysses 2"}


def test_checkpointing_sends_keys_and_values_twice(found):
    """What is sent twice counts twice; gradients go back once."""
    once, twice = (
        found[0][Case("ring 4", ("primes", "one"), **more)]["account"]
        for more in ({"padding": ROW}, {"checkpointing": True})
    )
    assert once["ring_kv"]["exchanges"] == once["ring_grad"]["exchanges"] == LAYERS
    assert twice["ring_kv"] == {key: 2 * value for key, value in once["ring_kv"].items()}
    assert twice["ring_grad"] == once["ring_grad"]
