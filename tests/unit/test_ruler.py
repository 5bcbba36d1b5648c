"""RULER's tasks: a model that reads the prompt solves every one, a random one none; scores are RULER's."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from rigged_model import RiggedModel
from transformers import AutoTokenizer

from anchor_context.demo import standard_library_texts, tiny_llama, train_tokenizer
from anchor_context.evaluate import __main__ as evaluate
from anchor_context.evaluate import generation
from anchor_context.evaluate.generation import batches_of, estimated_seconds
from anchor_context.evaluate.plots import task_map
from anchor_context.evaluate.prompts import varied_sentences
from anchor_context.evaluate.ruler import TASKS, make_samples, string_match_all
from anchor_context.evaluate.words import ADJECTIVES, NOUNS, distinct_words

LENGTH = 1400
"""In which a tokenizer of 512 tokens has room for every task."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A model of random weights."""
    folder = tmp_path_factory.mktemp("ruler")
    tokenizer = train_tokenizer(standard_library_texts(at_most_characters=60_000), vocab_size=512)
    tokenizer.save_pretrained(folder)
    tiny_llama(tokenizer, hidden=32, layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


def samples_of(tokenizer, task: str, *, length: int = LENGTH, trials: int = 2, seed: int = 0):
    return make_samples(
        task,
        tokenizer,
        anchor_id=tokenizer.bos_token_id,
        length=length,
        trials=trials,
        seed=seed,
        text=lambda: varied_sentences(0),
    )


def solved(prompt: str) -> list[str]:
    """The answers, found in the prompt as a reader finds them."""
    text, question = prompt.rsplit(" Question: ", 1)
    if "secret" in question:
        keys = re.search(r" of (.*)\? Answer", question)[1].replace(" and ", ", ").split(", ")
        facts = re.findall(r" A secret \w+ of (\S+) is (\S+)\.", text)
        return [value for key, value in facts if key in keys]
    if "stand for" in question:
        number = re.search(r"stand for (\d+)", question)[1]
        stands_for = {number: number}
        for name, value in re.findall(r" Let (\w+) be (\w+)\.", text):
            if value in stands_for:
                stands_for[name] = number
        return list(stands_for)[1:]
    wanted = 3 if "coded" in question else 10
    listed = text.rsplit("most often.", 1)[-1].split("leave out the dots.")[-1]
    counts = Counter(re.findall(r"[a-z]+(?:-[a-z]+)*", listed)).most_common()
    assert counts[wanted - 1][1] > counts[wanted][1], "the answer is not the only one"
    return [word for word, _ in counts[:wanted]]


def read(prompt: str) -> str:
    """What `solved` finds, among other words."""
    # The prompts that the estimate cuts short have no question.
    found = solved(prompt) if " Question: " in prompt else []
    return f" {', '.join(found)}. And so on."


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_fills_its_length_and_holds_its_answers(tokenizer, task):
    first, second = samples_of(tokenizer, task)
    for sample in (first, second):
        assert len(sample.token_ids) + sample.new_tokens == LENGTH
        assert sample.token_ids[0] == tokenizer.bos_token_id
        assert sample.token_ids.count(tokenizer.bos_token_id) == 1
        prompt = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        assert set(solved(prompt)) == set(sample.answers)
        reply = tokenizer(f" {', '.join(sample.answers)}", add_special_tokens=False)["input_ids"]
        assert len(reply) <= sample.new_tokens
    assert set(first.answers) != set(second.answers)
    assert samples_of(tokenizer, task) == [first, second]
    assert samples_of(tokenizer, task, trials=1, seed=1)[0].answers != first.answers


@pytest.mark.parametrize(
    "task, hidden, answers",
    [
        ("niah_single_1", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
        ("vt", 5, 5),
    ],
)
def test_so_many_facts_are_hidden_and_asked_for(tokenizer, task, hidden, answers):
    (sample,) = samples_of(tokenizer, task, trials=1)
    prompt = tokenizer.decode(sample.token_ids)
    facts = re.findall(r" A secret \w+ of (\S+) is|Follow them.*? Let (\w+) be", prompt)
    if task == "vt":
        facts = re.findall(r" Let (\w+) be", prompt.rsplit("Follow them.", 1)[1])
    assert len(facts) == hidden and len(sample.answers) == answers
    assert len(set(facts)) == (1 if task == "niah_multivalue" else hidden)
    values = {"niah_single_3": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "vt": "[A-Z]{6}"}
    assert all(re.fullmatch(values.get(task, r"\d{7}"), answer) for answer in sample.answers)


def test_a_haystack_of_needles_is_nothing_else(tokenizer):
    (sample,) = samples_of(tokenizer, "niah_multikey_2", trials=1)
    prompt = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    text = prompt.split("Keep them in mind.")[1].split(" Question: ")[0]
    keys = re.findall(r" A secret number of (\S+) is \d{7}\.", text)
    assert len(set(keys)) == len(keys) > 20
    rest = re.sub(r" A secret number of (\S+) is \d{7}\.", "", text)
    assert len(rest) < 45, "all but the needle that is cut off"


def test_common_words_come_ten_times_as_often_and_frequent_ones_by_zetas_law(tokenizer):
    (sample,) = samples_of(tokenizer, "cwe", length=6000, trials=1)
    prompt = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    words = re.findall(r"\d+\. (\S+)", prompt.rsplit("most often.", 1)[1].split(" Question")[0])
    counts = Counter(Counter(words).values())
    assert counts[30] == 10 and counts[3] > 50 and sum(counts.values()) - 10 - counts[3] <= 12

    (sample,) = samples_of(tokenizer, "fwe", length=6000, trials=1)
    prompt = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    text = prompt.split("leave out the dots.")[1].split(" Question")[0].split()
    (dots, most), *others = Counter(text).most_common(5)
    assert dots == "...." and tuple(word for word, _ in others[:3]) == sample.answers
    assert most > 0.6 * len(text)
    for rank, (_, count) in enumerate(others, start=2):
        assert count == pytest.approx(len(text) * 6 / math.pi**2 / rank**2, abs=1.5)


@pytest.mark.parametrize("task", ["cwe", "fwe"])
def test_a_list_fills_every_length(tokenizer, task):
    """Also those at which a list of plain words, all that there are, is too short, and one of longer words
    just as long would be too long."""
    for length in range(1600, 16_000, 2400):
        (sample,) = samples_of(tokenizer, task, length=length, trials=1)
        assert len(sample.token_ids) + sample.new_tokens == length
        prompt = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        assert set(solved(prompt)) == set(sample.answers)


def test_no_word_stands_in_another(tokenizer):
    words = ADJECTIVES + NOUNS
    assert len(set(words)) == len(words)
    assert not [(a, b) for a in words for b in words if a != b and a in b]
    for count in (50, 2000, 20_000):
        drawn = distinct_words(count, random.Random(0))
        assert len(set(drawn)) == count


def test_scores_are_rulers():
    assert string_match_all(" It is 1234567.", ("1234567",)) == 1.0
    # By RULER's rule an answer counts inside a longer, wrong one; and the case of letters does not matter.
    assert string_match_all("12345678", ("1234567",)) == 1.0
    assert string_match_all("the names are dapiro", ("DAPIRO", "KOGEBA")) == 0.5
    assert string_match_all("123456", ("1234567",)) == 0.0
    assert string_match_all("b, a", ("a", "b", "c", "d")) == 0.5


def run(*flags: str) -> None:
    evaluate.main(["ruler", *map(str, flags)])


def test_a_reading_model_solves_everything(model_folder, tokenizer, tmp_path, monkeypatch, capsys):
    model = RiggedModel(tokenizer, read)
    monkeypatch.setattr(evaluate, "load_model", lambda path, device: model)
    flags = ("--model", model_folder, "--out", tmp_path, "--lengths", f"{LENGTH},1600")
    run(*flags, "--trials", "3")
    found = json.loads((tmp_path / "ruler.json").read_text())["results"]
    assert [(r["task"], r["length"]) for r in found] == [
        (task, length) for task in TASKS for length in (LENGTH, 1600)
    ]
    assert all((r["score"], r["standard_error"], r["trials"]) == (1, 0, 3) for r in found)
    with (tmp_path / "ruler.csv").open() as stream:
        assert sum(float(row["score"]) for row in csv.DictReader(stream)) == 3 * len(found)
    assert (tmp_path / "ruler.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert re.search(r"^66 prompts of [\d,]+ tokens on cpu: about \d+ seconds$", said, re.M)
    assert re.search(r"^mean +100\.0 +100\.0$", said, re.M)
    assert (12, LENGTH - 128) in model.batches, "prompts of a size were not answered together"


def test_a_random_model_solves_nothing(model_folder, tmp_path):
    run("--model", model_folder, "--out", tmp_path, "--lengths", LENGTH, "--trials", "1")
    found = json.loads((tmp_path / "ruler.json").read_text())["results"]
    assert len(found) == len(TASKS) and all(r["score"] == 0.0 for r in found)


def test_bad_flags_are_named(model_folder, tmp_path):
    flags = ("--model", model_folder, "--out", tmp_path)
    with pytest.raises(ValueError, match="'niah' is no task; choose from niah_single_1, "):
        run(*flags, "--lengths", "2048", "--tasks", "vt,niah")
    for task, length in itertools.product(TASKS, ("20", "160")):
        with pytest.raises(
            ValueError, match=f"--lengths {length} is too short for the task {task}; "
        ):
            run(*flags, "--lengths", length, "--tasks", task)


def test_the_picture_has_a_line_per_task_and_a_column_per_length():
    scores = {(length, task): 0.5 for length in (4096, 8192) for task in ("vt", "cwe")}
    scores[8192, "vt"] = 1.0
    axes = task_map(scores, title="RULER").axes[0]
    assert axes.images[0].get_array().tolist() == [[0.5, 1], [0.5, 0.5]]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["vt", "cwe"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4K", "8K"]


def prompt(tokens: int, new_tokens: int) -> SimpleNamespace:
    return SimpleNamespace(token_ids=[5] * tokens, new_tokens=new_tokens)


def test_batches_hold_prompts_of_one_size_and_no_more_than_the_memory_for_them():
    prompts = [prompt(9000, 3), *[prompt(4000, 3)] * 5, *[prompt(4000, 7)] * 2, prompt(20_000, 3)]
    sizes = [
        [(len(p.token_ids), p.new_tokens) for p in batch] for batch in batches_of(prompts, None)
    ]
    assert sizes == [
        [(4000, 3)] * 4,
        [(4000, 3)],
        [(4000, 7)] * 2,
        [(9000, 3)],
        [(20_000, 3)],
    ]
    assert [len(batch) for batch in batches_of(prompts, 2)] == [2, 2, 1, 2, 1, 1]


def test_the_estimate_adds_up_prefills_and_steps(monkeypatch):
    """On a clock that a model moves by 2 s a token, and 0.01 s a squared one, of each prompt of a batch."""
    now = [0.0]
    monkeypatch.setattr(generation.time, "perf_counter", lambda: now[0])

    def generate(prompts, *, new_tokens):
        assert new_tokens == 1
        number, tokens = prompts.shape
        now[0] += number * (2 * tokens + 0.01 * tokens**2)
        return prompts

    prompts = [prompt(400, 10), prompt(400, 10), prompt(800, 5)]
    estimate = estimated_seconds(generate, prompts, batch_size=2)
    prefills = sum(2 * tokens + 0.01 * tokens**2 for tokens in (400, 400, 800))
    assert estimate == pytest.approx(prefills + (2 * 10 + 5) * 2.01)
    assert now[0] < 0.4 * estimate
