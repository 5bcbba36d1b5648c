"""Validation finds the same numbers however the ranks share its rows."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from anchor_context.data.loader import Dealing, make_loader
from anchor_context.data.options import DataOptions
from anchor_context.demo import standard_library_texts, tiny_llama, train_tokenizer
from anchor_context.engine import make_engine
from anchor_context.evaluate.validation import Validation, open_views, prepare_views
from anchor_context.integrations.models import set_attention
from anchor_context.loss import CausalLMWithLoss, tiled_loss
from anchor_context.parallel.groups import RankGrid, make_grid, make_groups
from anchor_context.parallel.shard import shard_batch, token_multiple

ROW = 128
LAYOUTS = {  # name -> (ring degree, Ulysses degree, tokens in a micro-batch) of two ranks
    "data 2": (1, 1, 150),
    "data 2, whole rows": (1, 1, None),
    "ring 2": (2, 1, 400),
    "Ulysses 2": (1, 2, 64),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and views.json: evaluation documents laid in both views."""
    folder = tmp_path_factory.mktemp("data")
    texts = standard_library_texts(at_most_characters=30_000)
    tokenizer = train_tokenizer(texts, vocab_size=320)
    torch.manual_seed(0)
    tiny_llama(tokenizer, hidden=32, layers=2).save_pretrained(folder / "model")
    text = max(texts, key=len)
    pieces = [text[:50], text[50:300], text[300:900], text[900:1100]]
    lines = [json.dumps({"text": piece}) + "\n" for piece in pieces]
    (folder / "eval.jsonl").write_text("".join(lines))
    views = prepare_views(
        str(folder / "eval.jsonl"),
        DataOptions(seq_length=ROW),
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        anchor_placement="per_document",
        cache_dir=folder,
    )
    (folder / "views.json").write_text(
        json.dumps({name: str(path) for name, path in views.items()})
    )
    return folder


def measure(folder, accelerator, grid: RankGrid, groups: tuple, most_tokens: int | None) -> dict:
    from transformers import AutoModelForCausalLM

    engine = make_engine(
        "flash",
        device=torch.device("cpu"),
        dtype=torch.float32,
        grid=grid,
        ring_group=groups[0],
        ulysses_group=groups[1],
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    set_attention(model, engine.attend)

    def batches(rows, **how):
        loader = make_loader(
            rows,
            seed=0,
            batch_size=2,
            accumulation=1,
            data_rank=grid.data_rank,
            data_degree=grid.data_degree,
            dealing=Dealing(most_tokens, zero_stage=3, divisible_by=token_multiple(grid)),
            **how,
        )
        return loader.dataset  # without a worker, which is spawned here and imports everything

    validation = Validation(
        accelerator,
        open_views(json.loads((folder / "views.json").read_text()), pattern="anchor"),
        SimpleNamespace(pause=lambda doing: nullcontext()),
        CausalLMWithLoss(model, tiled_loss),
        metrics=folder / "metrics.jsonl",
        batches=batches,
        share=partial(shard_batch, grid=grid),
        treat=lambda tokens: None,
        traffic=engine.traffic,
        every=1,
        first_step=0,
        last_step=1,
        best=None,
        save=None,
    )
    found = validation.measure(lambda: False)
    assert engine.traffic.take() == {}, "what validation sends is no training step's"
    return found


def on_ranks(rank: int, world: int, folder) -> dict:
    from accelerate import Accelerator

    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}.items():
        os.environ[name] = str(value)
    accelerator, found = Accelerator(cpu=True), {}
    assert accelerator.num_processes == world
    for name, (ring, ulysses, most_tokens) in LAYOUTS.items():
        grid = make_grid(rank=rank, world_size=world, ring_degree=ring, ulysses_degree=ulysses)
        groups = make_groups(grid, rank=rank, world_size=world)
        found[name] = measure(folder, accelerator, grid, groups, most_tokens)
    return found


class OneRank:
    device, process_index, is_main_process = torch.device("cpu"), 0, True

    def reduce(self, sums: torch.Tensor, how: str) -> torch.Tensor:
        return sums


@pytest.mark.slow  # two processes that import everything
def test_every_layout_of_two_ranks_finds_what_one_process_finds(folder, tmp_path):
    expected = measure(folder, OneRank(), RankGrid(), (None, None), 10_000)
    assert expected["eval_targets"] > expected["eval_targets_alone"] > 300
    for found in run_ranks(on_ranks, 2, tmp_path, folder):
        assert found.keys() == LAYOUTS.keys()
        for name, figures in found.items():
            assert figures.keys() == expected.keys()
            for key in expected.keys() - {"eval_seconds"}:
                assert figures[key] == pytest.approx(expected[key], rel=1e-6), (name, key)
