"""The ablation's own promises: one start, the same tokens, honest means; and a run from end to end."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from anchor_context.attention.patterns import PATTERNS
from anchor_context.data.loader import make_loader

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def paper():
    sys.path.insert(0, BENCHMARKS)
    try:
        import paper
    finally:
        sys.path.remove(BENCHMARKS)
    return paper


@pytest.fixture(scope="module")
def size(paper):
    data = replace(
        paper.SIZES["cpu"].data,
        long=512,
        characters=150_000,
        vocabulary=700,
        depths=(0.0, 100.0),
        trials=1,
        held_out_documents=2,
    )
    return replace(
        paper.SIZES["cpu"],
        data=data,
        hidden=32,
        step_tokens=1024,
        short_steps=3,
        long_steps=3,
        prompts_at_a_time=4,
    )


@pytest.fixture(scope="module")
def data(paper, size, tmp_path_factory):
    return paper.make_data(size.data, tmp_path_factory.mktemp("paper"))


@pytest.fixture(scope="module")
def started(paper, size, data):
    """(configuration, weights) of a model that was not trained."""
    torch.manual_seed(0)
    config = paper.model_config(size, data.tokenizer)
    model = LlamaForCausalLM._from_config(config, dtype=torch.float32)
    return config, model.state_dict()


def test_all_variants_start_from_the_same_weights(paper, size, started):
    import paper_small

    config, start = started
    variants = paper.extended(config, start, size, torch.device("cpu"))
    assert {(v.pattern, v.precision) for v in variants} == {
        (pattern, precision) for pattern in PATTERNS for precision in paper.PRECISIONS
    }
    for variant in variants:
        named = list(variant.model.named_parameters())
        assert len(named) == len(variant.masters)
        for (name, weight), master in zip(named, variant.masters, strict=True):
            assert torch.equal(master, start[name]) and master.dtype == torch.float32
            assert weight.dtype == paper.PRECISIONS[variant.precision]
            assert torch.equal(weight, start[name].to(weight.dtype))
        rope = variant.model.config.rope_parameters
        assert rope["rope_theta"] == paper_small.THETA * 2, "512 over 256 tokens"
        assert variant.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_step_moves_the_masters_and_rounds_them_into_the_model(paper, size, data, started):
    config, start = started
    variants = paper.extended(config, start, size, torch.device("cpu"))
    (variant,) = [v for v in variants if (v.pattern, v.precision) == ("anchor", "bf16")]
    paper.train([variant], data.long, steps=size.long_steps, tokens=size.step_tokens, seed=0)
    assert len(variant.losses) == len(variant.seconds) == size.long_steps
    (last,) = variant.optimizer.param_groups
    assert last["lr"] == pytest.approx(size.long_rate * 5 / 6), (
        "half a step before the end of three"
    )
    for (name, weight), master in zip(
        variant.model.named_parameters(), variant.masters, strict=True
    ):
        assert not torch.equal(master, start[name])
        assert torch.equal(weight, master.bfloat16()) and weight.dtype == torch.bfloat16
    # Had the masters been rounded, all of them would be bfloat16 numbers.
    assert any(not torch.equal(m, m.bfloat16().float()) for m in variant.masters)


def test_no_variant_steps_before_another_as_a_rule(paper, size, data):
    order = []
    variants = [
        SimpleNamespace(step=lambda batches, name=name: order.append(name)) for name in PATTERNS
    ]
    paper.train(variants, data.long, steps=40, tokens=size.step_tokens, seed=0)
    turns = [order[i : i + 4] for i in range(0, 160, 4)]
    assert len(order) == 160 and all(set(turn) == set(PATTERNS) for turn in turns)
    for one, other in permutations(PATTERNS, 2):
        assert 12 <= sum(turn.index(one) < turn.index(other) for turn in turns) <= 28


def test_patterns_see_the_same_tokens_and_targets_through_other_masks(paper, data):
    from paper_train import inputs_of

    loader = make_loader(
        data.long,
        pattern="anchor",
        seed=0,
        batch_size=2,
        accumulation=1,
        data_rank=0,
        data_degree=1,
    )
    batch = next(iter(loader))
    inputs = {p: inputs_of(batch, p, torch.device("cpu")) for p in PATTERNS}
    assert len(batch["layout"].cu_seqlens) > 2 + 1, "several documents in a row"
    for pattern, given in inputs.items():
        assert torch.equal(given["input_ids"], batch["input_ids"])
        assert torch.equal(given["labels"], batch["labels"])
        assert torch.equal(given["layout"].cu_seqlens, batch["layout"].cu_seqlens)
        assert given["layout"].pattern == pattern
        starts = batch["layout"].cu_seqlens[:-1].long()
        assert (given["input_ids"].flatten()[starts] == data.tokenizer.bos_token_id).all()
    index = torch.arange(512).expand(2, -1)
    assert torch.equal(inputs["full"]["position_ids"], index)
    assert torch.equal(inputs["intra_doc"]["position_ids"], index)
    for pattern in ("anchor", "intra_doc_reset"):
        positions = inputs[pattern]["position_ids"]
        assert (positions.flatten()[starts] == 0).all() and not torch.equal(positions, index)


def test_in_float32_the_reset_changes_the_loss_by_rounding_alone(paper, size, data, started):
    config, start = started
    variants = paper.extended(config, start, replace(size, long_steps=1), torch.device("cpu"))
    paper.train(variants, data.long, steps=1, tokens=size.step_tokens, seed=0)
    losses = {(v.pattern, v.precision): v.losses for v in variants}
    seed = {variant: {"losses": of_variant} for variant, of_variant in losses.items()}
    assert paper.reset_gap(seed, "float32") < 1e-5
    assert abs(losses["full", "float32"][0] - losses["intra_doc", "float32"][0]) > 1e-5


def test_mean_spread_and_gap(paper):
    assert paper.mean_and_spread([1.0, 2.0, 6.0]) == {
        "mean": 3.0,
        "spread": pytest.approx(math.sqrt((4 + 1 + 9) / 2)),
    }
    assert paper.mean_and_spread([5.0]) == {"mean": 5.0, "spread": None}
    seed = {
        ("intra_doc", "bf16"): {"losses": [1.0, 2.0]},
        ("intra_doc_reset", "bf16"): {"losses": [1.5, 1.0]},
    }
    assert paper.reset_gap(seed, "bf16") == 0.75
    assert paper.mean_by([(8, 1.0), (8, 0.0), (4, 1.0)]) == {8: 0.5, 4: 1.0}
    assert math.isclose(paper.GUESSING_NATS, math.log(90)), "numbers from 10 to 99"


def test_aggregate_keeps_seeds_apart_and_takes_the_median_step(paper):
    def measured(value: float) -> dict:
        return {name: {256: value} for name in paper.MEASURES} | {
            "losses": [value] * 12,
            "engine": "flash, torch_cpu",
            "seconds": [value, value, 10.0],
        }

    found = [
        {(p, "bf16"): measured(value) for p in ("intra_doc", "intra_doc_reset")}
        for value in (0.0, 0.5)
    ]
    first, second = paper.aggregate(found)
    assert (first["pattern"], second["pattern"]) == ("intra_doc", "intra_doc_reset")
    for result in (first, second):
        assert result["needle"] == {256: paper.mean_and_spread([0.0, 0.5])}
        assert result["loss"] == paper.mean_and_spread([0.0, 0.5])
        assert result["engine"] == "flash, torch_cpu"
        assert result["step_s"] == statistics.median([0.0, 0.0, 10.0, 0.5, 0.5, 10.0])


def test_documents_hold_their_answers_and_prompts_fill_their_lengths(paper, size, data):
    from paper_data import question_documents

    kinds = ("Question: what is the secret number", "What is the pass key?")
    fillers = []
    for text, kind in zip(question_documents(7, sentences=5), kinds * 20, strict=False):
        body, question = text.split(f" {kind}")
        answer = question.rsplit(" is ", 1)[1].rstrip(".")
        assert f" is {answer}." in body and 10 <= int(answer) < 100
        fillers.append(body.count(".") - 1 - (kind == kinds[1]))
    assert set(fillers) == {1, 2, 3, 4, 5} and statistics.median(fillers) < 3, "short ones teach"
    assert data.tokenizer.tokenize(" 48 48.") == ["Ġ", "48", "Ġ", "48", "."]
    assert {p.length for p in data.prompts} == {256, 512}
    assert all(len(data.tokenizer.tokenize(f" {p.answer}")) == 2 for p in data.prompts)
    assert all(len(p.token_ids) + 2 == p.length for p in data.prompts)
    assert all(document.shape == (512,) for document in data.held_out)


def test_a_run_from_end_to_end(paper, size, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(paper.SIZES, "cpu", size)
    monkeypatch.setattr(paper, "matmul_rate", lambda device, dtype: 1.0)
    plot = tmp_path / "paper.png"
    command = ["paper.py", "--size", "cpu", "--seeds", "0", "1", "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", command)
    paper.main()
    lines = capsys.readouterr().out.splitlines()
    line = json.loads(lines[-1])
    assert line["benchmark"] == "paper" and line["seeds"] == [0, 1]
    assert line["ceiling"]["guessing_nats"] == pytest.approx(math.log(90))
    assert [(r["pattern"], r["precision"]) for r in line["results"]] == [
        ("start", "float32"),
        *((pattern, precision) for precision in paper.PRECISIONS for pattern in PATTERNS),
    ]
    for result in line["results"]:
        assert set(result["needle"]) == set(result["needle_nats"]) == {"256", "512"}
        assert all(0 <= r["mean"] <= 1 for r in result["needle"].values())
        assert all(r["spread"] > 0 for r in result["perplexity"].values())
    for result in line["results"][1:]:
        assert result["step_s"] > 0 and result["engine"] == "flash, torch_cpu"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert any("1-63" in text for text in lines) and any("reset gap" in text for text in lines)
