"""Validation while training: what it measures, when, and that training does not notice."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import train
from anchor_context.attention.patterns import make_layout
from anchor_context.data.documents import DocumentReader
from anchor_context.data.held_out import HELD_OUT
from anchor_context.data.loader import Dealing, make_loader
from anchor_context.data.options import DataOptions
from anchor_context.data.prepare import prepare_rows
from anchor_context.demo import standard_library_texts, tiny_llama, train_tokenizer
from anchor_context.engine import choose_anchor_placement, make_engine
from anchor_context.evaluate import __main__ as evaluate
from anchor_context.evaluate import plots
from anchor_context.evaluate.perplexity import token_losses
from anchor_context.evaluate.validation import (
    Validation,
    files_trained_on,
    open_views,
    plot_positions,
    prepare_held_out_views,
    prepare_views,
    with_target_positions,
)
from anchor_context.integrations.models import set_attention
from anchor_context.layout import IGNORE_INDEX
from anchor_context.loss import CausalLMWithLoss, tiled_loss
from anchor_context.parallel.traffic import Traffic
from anchor_context.run.folder import VALIDATION
from anchor_context.run.metrics import MetricsFile

S = 96


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with model/, train.jsonl and eval.jsonl: documents shorter and longer than a row."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = standard_library_texts(at_most_characters=60_000)
    pieces = [text[a:b] for text in texts for a, b in ((0, 90), (90, 200), (200, 800)) if text[a:b]]
    for name, some in (("eval", pieces[:6]), ("train", pieces[6:24])):
        lines = [
            json.dumps({"text": text, "set": "ab"[i % 2]}) + "\n" for i, text in enumerate(some)
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    tokenizer = train_tokenizer(texts, vocab_size=384)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(3)
    model = tiny_llama(tokenizer, hidden=32, layers=2)
    for parameter in model.parameters():  # or every loss is that of a uniform guess
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "model")
    return SimpleNamespace(
        folder=folder, tokenizer=tokenizer, model=folder / "model", eval=folder / "eval.jsonl"
    )


def load(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny.model)


def prepare(tiny, *, placement: str, dataset: str | None = "eval", **options):
    """(folders of the views, rows of training)."""
    how = {
        "tokenizer": tiny.tokenizer,
        "vocab_size": len(tiny.tokenizer),
        "anchor_placement": placement,
        "cache_dir": tiny.folder / "rows",
    }
    flags = DataOptions(**{"seq_length": S, "source_column": "set"} | options)
    training = prepare_rows(str(tiny.folder / "train.jsonl"), flags, **how)
    if dataset is None:
        return prepare_held_out_views(training, flags, **how), training
    return prepare_views(str(tiny.folder / f"{dataset}.jsonl"), flags, **how), training


def test_files_that_are_trained_on_too_are_told(tiny, tmp_path):
    copy = tiny.folder / "copy.jsonl"
    copy.write_bytes((tiny.folder / "train.jsonl").read_bytes())
    told = {}
    for dataset in ("eval", "copy", None):
        held_out = {"eval_documents": 2} if dataset is None else {}
        folders, training = prepare(tiny, placement="per_document", dataset=dataset, **held_out)
        told[dataset] = files_trained_on(open_views(folders, pattern="anchor"), training)
    assert told == {"eval": [], "copy": [str(copy.resolve())], None: []}
    assert files_trained_on({}, training) == []


class OneRank:
    """As much of an accelerator as a validation looks at, of one of several ranks."""

    device, process_index, is_main_process = torch.device("cpu"), 0, True

    def reduce(self, sums, how):
        assert how == "sum" and sums.dtype == torch.float64
        return sums


class Log:
    """As much of a run's log."""

    def __init__(self):
        self.said, self.paused = [], 0

    def pause(self, doing):
        assert doing == "validating"
        self.paused += 1
        return torch.no_grad()  # any context

    def validation(self, step, figures):
        self.said.append((step, figures))


def batches_in_this_process(rows, *, batch_size, ranks, rank, most, **how):
    """`make_loader`'s, without a worker."""
    loader = make_loader(
        rows,
        seed=0,
        batch_size=batch_size,
        accumulation=1,
        data_rank=rank,
        data_degree=ranks,
        dealing=Dealing(micro_batch_tokens=most),
        **how,
    )
    return loader.dataset


def make_validation(
    tiny,
    views,
    *,
    engine="flash",
    model=None,
    rows=2,
    ranks=1,
    rank=0,
    most=200,
    metrics=None,
    first_step=0,
    **more,
) -> Validation:
    if model is None:
        model = load(tiny)
        chosen = make_engine(engine, device=torch.device("cpu"), dtype=torch.float32)
        set_attention(model, chosen.attend)
        model = CausalLMWithLoss(model, tiled_loss)
    settings = {"every": 2, "last_step": 5, "best": None, "save": None} | more
    return Validation(
        OneRank(),
        views,
        Log(),
        model,
        metrics=metrics or tiny.folder / "none.jsonl",
        batches=partial(
            batches_in_this_process, batch_size=rows, ranks=ranks, rank=rank, most=most
        ),
        share=lambda batch: batch,
        treat=lambda tokens: None,
        traffic=Traffic(),
        first_step=first_step,
        **settings,
    )


def documents_of(tiny) -> list[list[int]]:
    """The tokens of the evaluation documents, EOS at their ends."""
    read = DocumentReader(tiny.tokenizer, "raw_json", len(tiny.tokenizer))
    texts = [json.loads(line)["text"] for line in tiny.eval.read_text().splitlines()]
    return [ids.tolist() for text in texts for ids in read._texts([((0,), (text, ""))], [])[0]]


@pytest.fixture(scope="module")
def alone(tiny) -> list[torch.Tensor]:
    """Each document's losses by the plain model behind a BOS: what a user gets."""
    model, bos = load(tiny).eval(), tiny.tokenizer.bos_token_id
    return [
        token_losses(model, torch.tensor([bos, *ids][: S + 1])).double()
        for ids in documents_of(tiny)
    ]


@pytest.mark.parametrize("held_out", [False, True])
def test_rows_that_were_prepared_ahead_say_how_the_packed_view_is_laid(tiny, held_out):
    """Options that are left out are those of the set."""
    laid = {"packing": "best_fit", "interleave_chunks": True, "domain_tag": True}
    laid |= {"eval_documents": 3} if held_out else {}
    folders, training = prepare(
        tiny, placement="per_document", dataset=None if held_out else "eval", **laid
    )
    flags = train.Flags(
        model_name_or_path=str(tiny.model),
        dataset=str(training.directory),
        seq_length=S,
        eval_documents=3 if held_out else None,
        eval_dataset=None if held_out else str(tiny.eval),
    )
    how = {
        "tokenizer": tiny.tokenizer,
        "vocab_size": len(tiny.tokenizer),
        "anchor_placement": "per_document",
        "cache_dir": tiny.folder / "rows",
    }
    again = partial(prepare_rows, flags.dataset, flags, **how)
    rows, views = train.lay_data(flags, again, once=lambda make: make())
    assert rows.directory == training.directory
    assert {name: view.rows.directory for name, view in views.items()} == folders
    assert views["packed"].rows.report["tag_tokens"] > 0


PATTERNS = {  # name -> (pattern, engine, further options of the data)
    "anchor": ("anchor", "flash", {}),
    "shared anchor": ("anchor", "flex", {}),
    "full": ("full", "flash", {"packing": "best_fit"}),
    "intra_doc": ("intra_doc", "flash", {}),
    "interleaved": ("anchor", "flash", {"interleave_chunks": True}),
    "tagged": ("intra_doc_reset", "flash", {"domain_tag": True, "mixture": "a=1,b=1"}),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_alone_is_the_plain_model_behind_a_bos_whatever_is_trained(name, tiny, alone):
    pattern, engine, options = PATTERNS[name]
    placement = choose_anchor_placement(pattern, engine)
    folders, _ = prepare(tiny, placement=placement, **options)
    views = open_views(folders, pattern=pattern)
    found = make_validation(tiny, views, engine=engine).measure(lambda: False)
    assert any(len(losses) == S for losses in alone), "no document is longer than a row"
    assert any(len(losses) < S for losses in alone)
    everything = torch.cat(alone)
    assert found["eval_targets_alone"] == len(everything)
    assert found["eval_loss_alone"] == pytest.approx(everything.mean().item(), rel=1e-6)
    assert found["eval_perplexity_alone"] == pytest.approx(everything.mean().exp().item(), rel=1e-5)
    early, late = torch.cat([x[:63] for x in alone]), torch.cat([x[63:] for x in alone])
    assert found["eval_loss_alone_by_position"] == pytest.approx(
        {"1": early.mean().item(), "64": late.mean().item()}, rel=1e-6
    )
    assert abs(early.mean() - late.mean()) > 1e-3, "the case is vacuous"


@pytest.mark.parametrize("name", PATTERNS)
def test_packed_is_the_loss_of_the_rows_in_the_pattern_of_training(name, tiny):
    """Here by the reference, row by row, and by counting through each row."""
    pattern, engine, options = PATTERNS[name]
    placement = choose_anchor_placement(pattern, engine)
    folders, _ = prepare(tiny, placement=placement, **options)
    views = open_views(folders, pattern=pattern)
    found = make_validation(tiny, views, engine=engine).measure(lambda: False)

    model, rows = load(tiny), views["packed"].rows
    reference = make_engine("reference", device=torch.device("cpu"), dtype=torch.float32)
    set_attention(model, reference.attend)
    losses = {1: [], 64: []}
    for row in map(rows.row, range(len(rows))):
        starts, documents = row.pieces()
        layout = make_layout(
            starts,
            documents=documents,
            batch_size=1,
            row_length=S,
            pattern=pattern,
            anchor_placement=placement,
        )
        ids = torch.from_numpy(row.tokens[None, :S].astype(np.int64))
        with torch.no_grad():
            logits = model(ids, position_ids=layout.position_ids, layout=layout).logits[0]
        labels = torch.from_numpy(row.labels())
        each = cross_entropy(logits.double(), labels, reduction="none", ignore_index=IGNORE_INDEX)
        seen = dict.fromkeys(range(len(starts)), int(placement == "shared"))
        ends = [*starts[1:], S]
        for start, end, document in zip(starts, ends, documents, strict=True):
            for i in range(start, end):
                seen[document] += 1
                if labels[i] != IGNORE_INDEX:
                    losses[1 if seen[document] < 64 else 64].append(each[i].item())
    targets = sum(map(len, losses.values()))
    assert found["eval_targets"] == targets == rows.report["targets"]
    assert found["eval_loss"] == pytest.approx(
        (sum(losses[1]) + sum(losses[64])) / targets, rel=1e-6
    )
    assert losses[64] and found["eval_loss_by_position"] == pytest.approx(
        {str(first): np.mean(some) for first, some in losses.items()}, rel=1e-6
    )


@pytest.mark.parametrize(
    ("rows", "ranks", "most"),
    [(1, 1, 16), (2, 1, None), (1, 2, 130), (2, 2, None), (64, 3, 10_000)],
)
def test_the_same_numbers_for_all_ranks_and_micro_batches(rows, ranks, most, tiny):
    """More ranks than rows of a step at the end, more rows in a step than there are."""
    folders, _ = prepare(tiny, placement="per_document")
    views = open_views(folders, pattern="anchor")
    model = make_validation(tiny, views).model
    expected = make_validation(tiny, views, model=model).measure(lambda: False)
    several = [
        make_validation(tiny, views, model=model, rows=rows, ranks=ranks, rank=rank, most=most)
        for rank in range(ranks)
    ]
    sums = {view: [v._sums(view, lambda: False) for v in several] for view in views}
    several[0]._sums = lambda view, stop: sum(sums[view])
    found = several[0].measure(lambda: False)
    for key in found.keys() - {"eval_seconds"}:
        assert found[key] == pytest.approx(expected[key], rel=1e-6)
    if ranks > 1:
        assert all(len(one) == ranks for one in sums.values())


def test_training_does_not_notice(tiny):
    folders, _ = prepare(tiny, placement="per_document")
    views = open_views(folders, pattern="anchor")
    validation = make_validation(tiny, views)
    validation._batches = {  # as in a run: a worker process each
        name: make_loader(
            rows,
            pattern=pattern,
            seed=0,
            batch_size=2,
            accumulation=1,
            data_rank=0,
            data_degree=1,
            total_rows=len(rows),
            transform=partial(with_target_positions, beginnings=name == "alone"),
        )
        for name, (rows, pattern) in views.items()
    }
    validation.model.train()
    parameter = next(validation.model.parameters())
    parameter.grad = torch.ones_like(parameter)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert validation.at(2, stop=lambda: False)
    assert validation.log.said[0][1]["eval_targets"] == views["packed"].rows.report["targets"]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after
    assert all(part.training for part in validation.model.modules())
    assert (parameter.grad == 1).all()
    assert [p.grad for p in validation.model.parameters()][1:] == [None] * (
        len(list(validation.model.parameters())) - 1
    )


# --------------------------------------------------------------------------------------------------
# When, and what becomes of it.


@pytest.fixture
def views(tiny):
    folders, _ = prepare(tiny, placement="per_document")
    return open_views(folders, pattern="anchor")


def go(validation, steps) -> list[int]:
    """The steps that it validates at."""
    assert all(validation.at(step, stop=lambda: False) for step in steps)
    return [step for step, _ in validation.log.said]


def test_every_so_many_steps_and_at_the_end_and_never_twice(tiny, views, monkeypatch):
    monkeypatch.setattr(Validation, "measure", lambda self, stop: {"eval_loss": 1.0})
    assert go(make_validation(tiny, views), [0, 1, 2, 2, 3, 4, 5, 5]) == [2, 4, 5]
    assert go(make_validation(tiny, views, every=None), range(6)) == [5]
    assert go(make_validation(tiny, {}), range(6)) == []


def record(path, *, steps: int, validated: dict) -> None:
    file = MetricsFile(path, keep_steps=0)
    for step in range(1, steps + 1):
        file.append({"step": step} | ({"eval_loss": validated[step]} if step in validated else {}))


def test_a_resumed_run_makes_up_for_the_one_that_was_broken_off(tiny, views, tmp_path, monkeypatch):
    """And for no other: not for one that is in the record, nor in a new folder, which has no record."""
    monkeypatch.setattr(Validation, "measure", lambda self, stop: {"eval_loss": 1.0})
    metrics = tmp_path / "metrics.jsonl"
    assert go(make_validation(tiny, views, metrics=metrics, first_step=4), [4, 5]) == [5]
    record(metrics, steps=4, validated={2: 3.0})
    assert go(make_validation(tiny, views, metrics=metrics, first_step=4), [4, 5]) == [4, 5]
    record(metrics, steps=4, validated={2: 3.0, 4: 2.0})
    assert go(make_validation(tiny, views, metrics=metrics, first_step=4), [4, 5]) == [5]
    record(metrics, steps=3, validated={2: 3.0})
    assert go(make_validation(tiny, views, metrics=metrics, first_step=3), [3]) == []


@pytest.mark.parametrize("asked_at", [1, 2, 9])
def test_a_request_to_stop_breaks_it_off(asked_at, tiny, views):
    """Nothing is recorded, and it is owed still. (9: in the second view.)"""
    validation, asked = make_validation(tiny, views, most=S), []
    validation.model.train()
    assert not validation.at(2, stop=lambda: asked.append(1) or len(asked) == asked_at)
    assert len(asked) >= asked_at
    assert validation.log.said == [] and validation.owes(2)
    assert validation.model.training
    assert validation.at(2, stop=lambda: False) and not validation.owes(2)


def test_the_best_model_is_that_of_the_lowest_loss(tiny, views, tmp_path, monkeypatch):
    """Also of those before a resume; not a number is never the best."""
    losses = iter([5.0, None, 4.0, 4.5, 3.0, 9.0])
    monkeypatch.setattr(Validation, "measure", lambda self, stop: {"eval_loss": next(losses)})
    best, saved = tmp_path / "best", []

    def save(folder, *, validation):
        folder.mkdir(exist_ok=True)
        (folder / VALIDATION).write_text(json.dumps(validation))
        saved.append(validation["step"])

    more = {"every": 1, "last_step": 9, "best": best, "save": save}
    go(make_validation(tiny, views, **more), [1, 2, 3])
    assert saved == [1, 3]

    go(make_validation(tiny, views, first_step=3, **more), [4, 5])
    assert saved == [1, 3, 5], "4.5 is worse than what the run has found before"
    # Back at step 4, of another course: the model of step 5 is none of this run's.
    go(make_validation(tiny, views, first_step=4, **more), [5])
    assert saved == [1, 3, 5, 5]
    # A loss on other documents says nothing of this run's.
    rows = views["packed"].rows
    other = rows.fingerprint | {"data": [{"content": "another"}]}
    rows = replace(rows, manifest=rows.manifest | {"fingerprint": other})
    others = views | {"packed": views["packed"]._replace(rows=rows)}
    assert make_validation(tiny, views, first_step=5, **more)._lowest == 9.0
    assert make_validation(tiny, others, first_step=5, **more)._lowest is None
    # A run that begins to keep the best has none yet.
    shutil.rmtree(best)
    assert make_validation(tiny, views, first_step=5, **more)._lowest is None


def test_a_model_that_broke_is_told_and_ends_nothing(tiny, views):
    validation = make_validation(tiny, views)
    next(validation.model.parameters()).data.fill_(torch.nan)
    found = validation.measure(lambda: False)
    assert found["eval_loss"] is None and found["eval_perplexity_alone"] is None
    assert set(found["eval_loss_by_position"].values()) == {None}
    assert json.loads(json.dumps(found)) == found
    assert validation.at(5, stop=lambda: False) and validation.broken
    assert not validation.at(4, stop=lambda: True) and not validation.broken  # of that nobody knows


def test_what_attention_sends_meanwhile_is_no_steps(tiny, views):
    validation = make_validation(tiny, views)
    validation.traffic = SimpleNamespace(taken=0)
    validation.traffic.take = lambda: setattr(validation.traffic, "taken", 1)
    validation.measure(lambda: False)
    assert validation.traffic.taken == 1


# --------------------------------------------------------------------------------------------------
# The data, and the command that measures a saved model.


@pytest.mark.parametrize("held_out", [False, True])
def test_evaluate_finds_the_same_on_the_saved_model(held_out, tiny, tmp_path, capsys):
    if held_out:
        folders, training = prepare(tiny, placement="shared", dataset=None, eval_documents=4)
        data = ("--dataset", training.directory / HELD_OUT, "--data-format", "tokenized")
    else:
        folders, _ = prepare(tiny, placement="shared")
        data = ("--dataset", tiny.eval)
    views = open_views(folders, pattern="anchor")
    assert views["alone"].rows.report["documents"] == (4 if held_out else 6)
    found = make_validation(tiny, views, engine="flex").measure(lambda: False)
    command = ("ppl", "--model", tiny.model, "--lengths", f"40,{S}", "--every_document")
    evaluate.main([str(a) for a in (*command, *data, "--out", tmp_path)])
    rows = json.loads((tmp_path / "ppl.json").read_text())["results"]
    *by_position, short, whole = rows
    assert whole["kind"] == "length" and whole["targets"] == found["eval_targets_alone"]
    assert whole["loss"] == pytest.approx(found["eval_loss_alone"], rel=1e-6)
    assert whole["perplexity"] == pytest.approx(found["eval_perplexity_alone"], rel=1e-5)
    assert {str(row["first"]): row["loss"] for row in by_position} == pytest.approx(
        found["eval_loss_alone_by_position"], rel=1e-6
    )
    assert [row["last"] for row in by_position] == [63, S]
    assert short["last"] == 40 and short["targets"] < whole["targets"]
    assert f"ppl of the positions to {S}: {whole['perplexity']:.4g}" in capsys.readouterr().out


def test_prepared_rows_are_no_documents(tiny):
    _, training = prepare(tiny, placement="per_document")
    with pytest.raises(ValueError, match="--eval_dataset .* is prepared rows"):
        prepare_views(
            str(training.directory),
            DataOptions(seq_length=S),
            anchor_placement="per_document",
        )


def test_mistakes_in_the_data_name_the_flag(tiny):
    for name, said in (("nowhere", "--eval_dataset .*nowhere"), ("broken", "broken.jsonl, line 1")):
        (tiny.folder / "broken.jsonl").write_text("{}\n")
        with pytest.raises(ValueError, match=said):
            prepare(tiny, placement="per_document", dataset=name)


def test_data_without_a_target_are_refused(tiny):
    (tiny.folder / "ends.jsonl").write_text(
        '{"input_ids": [5], "source": [{"end": 1, "set": ""}]}\n'
    )
    options = DataOptions(seq_length=S, data_format="tokenized")
    how = {
        "tokenizer": tiny.tokenizer,
        "vocab_size": len(tiny.tokenizer),
        "cache_dir": tiny.folder / "rows",
    }
    folders = prepare_views(
        str(tiny.folder / "ends.jsonl"), options, anchor_placement="none", **how
    )
    with pytest.raises(ValueError, match="--eval_dataset: no token of the rows .* has a target"):
        open_views(folders, pattern="intra_doc")


def test_the_picture_has_a_curve_per_validation(tmp_path, monkeypatch):
    metrics, plot = tmp_path / "metrics.jsonl", tmp_path / "loss_by_position.png"
    plot_positions(metrics, plot)
    file = MetricsFile(metrics, keep_steps=0)
    file.append({"step": 1})
    plot_positions(metrics, plot)
    assert not plot.exists(), "there is no validation to draw"
    for step in (2, 4):
        packed = {"1": 4.0 / step, "64": 3.0, "128": None}
        file.append(
            {
                "step": step,
                "eval_loss_by_position": packed,
                "eval_loss_alone_by_position": packed | {"256": 1.0},
            }
        )
    drawn = []
    make = plots.loss_by_position
    monkeypatch.setattr(plots, "loss_by_position", lambda r: drawn.append(make(r)) or drawn[-1])
    plot_positions(metrics, plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    packed, alone = drawn[0].axes[:2]
    assert [line.get_ydata()[0] for line in packed.lines] == [2.0, 1.0]
    assert [label.get_text() for label in alone.get_xticklabels()] == [
        *("1–63", "64–127", "128–255", "from 256"),
    ]
