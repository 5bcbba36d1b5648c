"""The evaluator itself: a copying model scores 1 everywhere, a random one 0, perplexity is the model's."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import subprocess
import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rigged_model import RiggedModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from anchor_context.attention.patterns import find_anchor_id, make_layout
from anchor_context.attention.reference import attend
from anchor_context.demo import standard_library_texts, tiny_llama, train_tokenizer
from anchor_context.evaluate import __main__ as evaluate
from anchor_context.evaluate import perplexity
from anchor_context.evaluate.generation import greedy
from anchor_context.evaluate.perplexity import (
    every_document_rows,
    perplexity_rows,
    position_ranges,
    token_losses,
)
from anchor_context.evaluate.plots import heat_map, loss_by_position, perplexity_curve
from anchor_context.evaluate.prompts import (
    TASKS,
    Haystack,
    make_prompts,
    passkey_sentences,
    pieces_of,
    varied_sentences,
)
from anchor_context.evaluate.retrieval import Answer, accuracies, answer_prompts, first_number
from anchor_context.integrations.models import set_attention
from tests.model_coverage import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with model/ (random weights) and documents.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = standard_library_texts(at_most_characters=60_000)
    with (folder / "documents.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in ["short", *texts])
    tokenizer = train_tokenizer(texts, vocab_size=512)
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(tokenizer, hidden=32, layers=2).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny / "model")


def copied(prompt: str) -> str:
    """The number that the prompt hides, as a model that retrieves perfectly would answer."""
    # A prompt that the estimate cuts short may hide nothing.
    number = re.search(r"(?:secret number of \w+|pass key) is (\d+)|$", prompt)[1]
    return f" {number}. And so on, 12."


def prompts_of(tokenizer, task: str, length: int, depths: list[float], trials: int = 2) -> list:
    filler = passkey_sentences() if task == "passkey" else varied_sentences(0)
    return make_prompts(
        TASKS[task],
        Haystack(filler, tokenizer, length=length),
        tokenizer,
        anchor_id=find_anchor_id(tokenizer),
        length=length,
        depths=depths,
        trials=trials,
        seed=0,
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [200, 333])
def test_prompts_fill_the_length_and_hold_the_fact_at_its_depth(tokenizer, task, length):
    prompts = prompts_of(tokenizer, task, length, [0, 25, 50, 75, 100])
    places = []
    for prompt in prompts:
        reply = tokenizer(f" {prompt.answer}", add_special_tokens=False)["input_ids"]
        assert len(prompt.token_ids) + len(reply) == length
        assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
        assert prompt.token_ids[0] == tokenizer.bos_token_id
        text = tokenizer.decode(prompt.token_ids, skip_special_tokens=True)
        assert text.count(f"{prompt.answer}") == (1 if task == "needle" else 2)
        assert text.endswith(" is")
        # The share of the filler's characters that come before the fact.
        before, after = re.split(
            r" The secret number.*?\.| The pass key is \d+\..*?the pass key\.", text, maxsplit=1
        )
        after = re.sub(r" (Question|What).*$", "", after)
        assert before == "" or before.endswith("."), "a fact stands between sentences"
        places.append(len(before) / (len(before) + len(after)))
    in_order = places[::2]
    assert in_order[0] == 0 and in_order[-1] > 0.75 and in_order == sorted(in_order)
    assert abs(in_order[2] - 0.5) < 0.2
    assert len({prompt.answer for prompt in prompts}) == len(prompts)
    assert prompts == prompts_of(tokenizer, task, length, [0, 25, 50, 75, 100])


def test_the_anchor_is_eos_where_the_tokenizer_has_no_bos():
    without = train_tokenizer(["a b c"], vocab_size=300, bos=False)
    prompt = prompts_of(without, "passkey", 300, [50])[0]
    assert prompt.token_ids[0] == without.eos_token_id


def test_a_length_too_short_for_the_question_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"--lengths 20 is too short for the question, which takes"
    ):
        prompts_of(tokenizer, "needle", 20, [0])


def test_an_answer_counts_when_its_first_number_is_the_hidden_one():
    assert first_number(" 12345. 678") == "12345"
    assert first_number(" 1,234,567!") == "1234567"
    assert first_number("the 123456 ") == "123456" != "12345"
    assert first_number("none") is None


def run(*flags: str) -> None:
    evaluate.main([str(flag) for flag in flags])


@pytest.mark.parametrize("task", TASKS)
def test_a_copying_model_finds_everything(tiny, tokenizer, task, tmp_path, monkeypatch):
    model = RiggedModel(tokenizer, copied)
    monkeypatch.setattr(evaluate, "load_model", lambda path, device: model)
    flags = ("--lengths", "192,256", "--depths", "0,30,100", "--trials", "3", "--batch-size", "4")
    run(task, "--model", tiny / "model", "--out", tmp_path, *flags)
    found = json.loads((tmp_path / f"{task}.json").read_text())["results"]
    assert [(r["length"], r["depth"]) for r in found] == [
        (s, d) for s in (192, 256) for d in (0, 30, 100)
    ]
    assert all(r["accuracy"] == 1.0 for r in found)
    with (tmp_path / f"{task}.csv").open() as stream:
        assert sum(row["correct"] == "True" for row in csv.DictReader(stream)) == 18
    assert (tmp_path / f"{task}.png").stat().st_size > 5000
    asked = [rows for rows, tokens in model.batches if tokens > 1]  # a token: the estimate's
    assert max(asked) > 1, "nothing was batched"


@pytest.mark.parametrize("task", TASKS)
def test_a_random_model_finds_nothing(tiny, task, tmp_path):
    flags = ("--lengths", "192,256", "--depths", "0,100", "--trials", "2", "--batch-size", "4")
    run(task, "--model", tiny / "model", "--out", tmp_path, *flags)
    found = json.loads((tmp_path / f"{task}.json").read_text())["results"]
    assert len(found) == 4 and all(r["accuracy"] == 0.0 for r in found)


def test_batches_do_not_change_the_answers(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny / "model").eval()
    generate = greedy(model, pad_id=tokenizer.eos_token_id)
    prompts = prompts_of(tokenizer, "passkey", 128, [0, 50, 100])
    one, three = (answer_prompts(generate, prompts, tokenizer, batch_size=size) for size in (1, 3))
    assert one == three and len(one) == 6


def test_generation_is_plain_greedy_whatever_the_models_generation_config_says(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny / "model").eval()
    prompts = torch.tensor([prompts_of(tokenizer, "passkey", 128, [50])[0].token_ids])
    expected = prompts
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
    expected = expected[:, prompts.shape[1] :]
    repeated = expected[0, 0].item()
    own = GenerationConfig(
        do_sample=True,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[repeated],
        min_new_tokens=3,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.generation_config = own
    generate = greedy(model, pad_id=tokenizer.bos_token_id)
    assert generate(prompts, new_tokens=8).tolist() == expected.tolist()
    assert model.generation_config is own
    own.eos_token_id = [repeated]  # what ends an answer is the model's own
    assert generate(prompts, new_tokens=8).tolist() == [[repeated]]


def test_the_heat_map_shows_the_accuracies_on_a_scale_from_0_to_1():
    answers = [
        Answer(
            length, depth, depth, trial, "1", "", correct=(length, depth, trial) != (8192, 50.0, 0)
        )
        for length in (4096, 8192)
        for depth in (0.0, 50.0, 100.0)
        for trial in range(4)
    ]
    axes = heat_map(accuracies(answers), title="needle").axes[0]
    image = axes.images[0]
    assert image.get_array().tolist() == [[1, 1], [1, 0.75], [1, 1]]
    assert image.get_clim() == (0, 1)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4K", "8K"]
    assert axes.get_xlabel() == "context length (tokens)"


def test_losses_are_those_of_the_plain_model(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny / "model").eval()
    ids = torch.randint(3, 500, (1500,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[None], labels=ids[None]).loss
    losses = token_losses(model, ids)
    assert losses.shape == (1499,)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "family, behind_the_head",
    [
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("opt", {}),  # its forward passes by its base model's
        ("gpt2", {}),
        ("mixtral", {}),
    ],
)
def test_logits_in_pieces_are_the_models_own(family, behind_the_head, monkeypatch):
    monkeypatch.setattr(perplexity, "CHUNK", 16)
    model = tiny_model(family, window=4096)
    for name, value in behind_the_head.items():
        assert hasattr(model.config, name)
        setattr(model.config, name, value)
        if name in vars(model):  # the model's own copy
            setattr(model, name, value)
    ids = torch.randint(3, 64, (41,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
        bare = model.get_output_embeddings()(model.base_model(ids[None]).last_hidden_state)[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    torch.testing.assert_close(token_losses(model, ids).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(logits, bare) != bool(behind_the_head), "the case shows nothing"


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")]
)
def test_a_model_is_loaded_with_an_attention_that_computes_its_scores(family, attention, tmp_path):
    """PyTorch's caps none, and has no sinks."""
    tiny_model(family, window=4096).save_pretrained(tmp_path)
    model = evaluate.load_model(str(tmp_path), torch.device("cpu"))
    assert model.config._attn_implementation == attention


def test_plain_causal_attention_is_anchor_attention_on_one_document(tiny):
    plain = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float64).eval()
    anchored = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float64).eval()
    set_attention(anchored, attend)
    ids = torch.randint(3, 500, (1, 96), generator=torch.Generator().manual_seed(1))
    ids[0, 0] = plain.config.bos_token_id
    layout = make_layout(
        torch.tensor([0]).numpy(),
        batch_size=1,
        row_length=96,
        pattern="anchor",
        anchor_placement="per_document",
    )
    with torch.no_grad():
        expected = anchored(ids, position_ids=layout.position_ids, layout=layout).logits
        torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-10)


def test_perplexity_by_position():
    losses = [torch.linspace(1, 2, 255), torch.linspace(2, 3, 255)]
    rows = perplexity_rows(losses, [100, 256])
    by_range = {(row["kind"], row["first"], row["last"]): row for row in rows}
    assert set(by_range) == {
        ("position", 1, 63),
        ("position", 64, 127),
        ("position", 128, 255),
        ("length", 1, 99),
        ("length", 1, 255),
    }
    expected = torch.stack(losses)[:, 63:127].double().mean().item()
    row = by_range["position", 64, 127]
    assert row["loss"] == pytest.approx(expected)
    assert row["perplexity"] == pytest.approx(math.exp(expected))
    assert row["loss_standard_error"] == pytest.approx(0.5)  # |1 − 2| / √2 / √2
    assert all(a[1] == b[0] for a, b in pairwise(position_ranges(300)))
    figure = perplexity_curve(rows, title="ppl")
    assert figure.axes[0].lines[0].get_ydata().tolist() == pytest.approx(
        [row["perplexity"] for row in rows if row["kind"] == "position"]
    )
    alone = perplexity_curve(perplexity_rows(losses[:1], [256]), title="ppl").axes[0]
    assert [text.get_text() for text in alone.get_legend().get_texts()] == ["1 document"]
    every = perplexity_curve(every_document_rows(losses, [256]), title="ppl").axes[0]
    assert [text.get_text() for text in every.get_legend().get_texts()] == ["2 documents"]


def test_steps_beside_the_curves_are_whole_numbers():
    curves = {"eval_loss_by_position": {"1": 2.0}, "eval_loss_alone_by_position": {"1": 2.0}}
    *_, bar = loss_by_position([{"step": step, **curves} for step in (2, 4)]).axes
    assert all(tick == int(tick) for tick in bar.get_yticks())


def test_perplexity_of_a_checkpoint(tiny, tmp_path, capsys):
    flags = ("--model", tiny / "model", "--dataset", tiny / "documents.jsonl", "--out", tmp_path)
    run("ppl", *flags, "--lengths", "128,512", "--documents", "3")
    rows = json.loads((tmp_path / "ppl.json").read_text())["results"]
    assert {row["documents"] for row in rows} == {3}
    # Random weights know nothing: the perplexity is near the vocabulary's size.
    assert all(300 < row["perplexity"] < 900 for row in rows)
    said = capsys.readouterr().out
    assert "ppl of the first 512 tokens" in said
    assert all(f"{tmp_path}/ppl.{kind}\n" in said for kind in ("png", "csv", "json"))
    with pytest.raises(
        ValueError, match=r"no document fills --lengths 1000000; the longest has \d+ tokens: give"
    ):
        run("ppl", *flags, "--lengths", "1000000")


def test_a_document_that_brings_its_anchor_gets_no_second_one(tiny, tokenizer, tmp_path):
    texts = [json.loads(line)["text"] for line in (tiny / "documents.jsonl").open()]
    flags = ["ppl", "--model", tiny / "model", "--lengths", "256", "--out", tmp_path]
    run(*flags, "--dataset", tiny / "documents.jsonl")
    found = json.loads((tmp_path / "ppl.json").read_text())["results"]
    rows = (tokenizer(text)["input_ids"] for text in texts)  # each behind a BOS
    lines = [json.dumps({"input_ids": row, "seq_lengths": [len(row)]}) + "\n" for row in rows]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    run(*flags, "--dataset", tmp_path / "t.jsonl", "--data_format", "tokenized")
    assert json.loads((tmp_path / "ppl.json").read_text())["results"] == found


def test_perplexity_of_another_column_with_damaged_records(tiny, tmp_path, capsys):
    texts = [json.loads(line)["text"] for line in (tiny / "documents.jsonl").open()]
    lines = ["{damaged", *(json.dumps({"body": {"raw": text}}) for text in texts)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["ppl", "--model", tiny / "model", "--dataset", tmp_path / "d.jsonl", "--out", tmp_path]
    flags += ["--lengths", "128", "--documents", "2", "--text_column", "body.raw"]
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: .*pass --skip_bad_documents"):
        run(*flags)
    run(*flags, "--skip_bad_documents")
    assert "note: bad documents skipped: 1; the first: " in capsys.readouterr().out
    found = json.loads((tmp_path / "ppl.json").read_text())["results"]
    run(*flags, "--dataset", tiny / "documents.jsonl", "--text-column", "text")
    assert json.loads((tmp_path / "ppl.json").read_text())["results"] == found


def test_special_tokens_written_in_a_haystack_are_text(tokenizer):
    haystack = Haystack(
        pieces_of("The tag <s> opens, and </s> closes. " * 20), tokenizer, length=99
    )
    assert not set(tokenizer.all_special_ids) & set(haystack.token_ids)


def test_a_haystack_of_ones_own(tiny, tokenizer, tmp_path):
    pieces = pieces_of("One sentence here. And another! Is it?")
    assert [next(pieces) for _ in range(4)] == [
        " One sentence here.",
        " And another!",
        " Is it?",
        " One sentence here.",
    ]
    with pytest.raises(ValueError, match="--haystack is empty"):
        pieces_of(" ")


@pytest.mark.parametrize(
    "text",
    [
        "天地玄黄，宇宙洪荒，日月盈昃，辰宿列张；" * 40,  # not one sentence's end
        "山高水长。" * 150,
        "".join(f"def f{i}(x):\n    return x[{i}] + {{'k': x}}\n" for i in range(80)),
        "x" * 3000,
        "A short one. " + "and then " * 400,
    ],
    ids=["Chinese clauses", "Chinese sentences", "code", "one word", "one long sentence"],
)
def test_a_fact_stands_at_its_depth_in_any_text(tokenizer, text):
    pieces = list(itertools.islice(pieces_of(text), 30))
    assert (" " + text.strip()).startswith("".join(pieces)) and max(map(len, pieces)) <= 64
    haystack = Haystack(pieces_of(text), tokenizer, length=1000)
    prompts = make_prompts(
        TASKS["passkey"],
        haystack,
        tokenizer,
        anchor_id=find_anchor_id(tokenizer),
        length=1000,
        depths=[0, 25, 50, 75, 100],
        trials=1,
        seed=0,
    )
    for prompt in prompts:
        before = tokenizer.decode(prompt.token_ids).split(" The pass key is")[0]
        fact, question = (
            len(tokenizer(t.format(number=prompt.answer), add_special_tokens=False)["input_ids"])
            for t in (TASKS["passkey"].fact, TASKS["passkey"].question)
        )
        room = len(prompt.token_ids) - 1 - fact - question
        real = len(tokenizer(before, add_special_tokens=False)["input_ids"]) - 1  # less the BOS
        assert "\ufffd" not in before, "a character was cut in two"
        assert prompt.real_depth == pytest.approx(100 * real / room, abs=2)
        assert prompt.real_depth == pytest.approx(prompt.depth, abs=6)


def test_the_nearest_sentences_end_is_taken_unless_it_is_far_off(tokenizer):
    text = "one two three four. " * 12 + "five six seven eight " * 60
    haystack = Haystack(pieces_of(text), tokenizer, length=600)
    early, late = haystack.split(600, 10), haystack.split(600, 80)
    assert early in haystack.sentence_ends and abs(early - 60) <= 0.05 * 600
    assert late not in haystack.sentence_ends and abs(late - 480) <= 0.05 * 600


def test_the_real_depth_is_recorded(tiny, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda path, device: RiggedModel(tokenizer, copied))
    (tmp_path / "text.txt").write_text("天地玄黄宇宙洪荒" * 200)
    flags = ("--lengths", "512", "--depths", "0,50", "--trials", "1", "--out", tmp_path)
    run("needle", "--model", tiny / "model", *flags, "--haystack", tmp_path / "text.txt")
    results = json.loads((tmp_path / "needle.json").read_text())["results"]
    with (tmp_path / "needle.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [float(line["real_depth"]) for line in lines] == [r["real_depth"] for r in results]
    assert results[0]["real_depth"] == 0 and 30 < results[1]["real_depth"] != 50


def test_two_processes_share_the_work_and_agree_with_one(tiny, tmp_path):
    flags = ["--lengths", "160,192", "--depths", "0,50,100", "--trials", "1", "--batch-size", "2"]
    run("passkey", "--model", tiny / "model", "--out", tmp_path / "one", *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "anchor_context.evaluate", "passkey"]
    command += ["--model", str(tiny / "model"), "--out", str(tmp_path / "two"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one/passkey.csv").read_text() == (tmp_path / "two/passkey.csv").read_text()
    assert "3/3" in done.stderr and "6/6" not in done.stderr, "process 0 did not do half"


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--lengths", "0"], "must be at least 1"),
        (["--depths", "0,120"], "percentages from 0 to 100"),
        (["--trials", "0"], "must be at least 1"),
    ],
)
def test_bad_values_are_named(flags, said):
    with pytest.raises(ValueError, match=said):
        run("needle", "--model", "m", "--out", "o", "--lengths", "64", *flags)


@pytest.mark.parametrize("cuda", [False, True])
def test_processes_that_are_done_early_wait_for_hours(cuda, monkeypatch):
    """Prompts of one length may take one process hours longer; NCCL would give up after ten minutes."""
    asked = []
    monkeypatch.setattr(evaluate, "PartialState", lambda **settings: asked.append(settings))
    monkeypatch.setattr(evaluate.torch.cuda, "is_available", lambda: cuda)
    for processes in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        evaluate.start_processes()
    alone, several = asked
    assert "timeout" not in alone and several["timeout"] > timedelta(hours=12)
