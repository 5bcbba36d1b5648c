"""What `paper.py` trains on and asks: a tokenizer, short and long rows, whole held-out files, prompts.

Text: Python's standard library. Its files are cut at line ends into documents of log-normal length, so
that a row packs several, as rows of web text do; every `HELD_OUT`-th file stays whole and untrained, for
perplexity. A model of this size does not learn retrieval from such text, so a stated share of the text
are documents that ask for numbers which they hid: the evaluation's own sentences, with other numbers. What
is compared is therefore how a pattern *extends* a skill to longer rows, not whether it teaches one.

Guarantees: the same Python and size give the same files. Each phase has one set of rows for all
patterns, with a BOS (the anchor) before every document and every continued piece, so that patterns differ
in masks and positions alone.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from anchor_context.attention.patterns import find_anchor_id
from anchor_context.data.documents import token_ids
from anchor_context.data.options import DataOptions
from anchor_context.data.prepare import prepare_rows
from anchor_context.data.rows import PreparedRows
from anchor_context.demo import standard_library_texts, train_tokenizer
from anchor_context.evaluate.prompts import (
    TASKS,
    Haystack,
    Prompt,
    Task,
    make_prompts,
    passkey_sentences,
    varied_sentences,
)

HELD_OUT = 6
"""One file in so many is never trained on."""
TASK = replace(TASKS["needle"], digits=2)
"""What the prompts ask. A number of two digits is one token, and finding it is one hop of attention; to copy
seven digits piece by piece takes a model of this size longer than the smallest setting has."""


@dataclass(frozen=True)
class DataSize:
    short: int
    """Tokens in a row of the first phase."""
    long: int
    """Tokens in a row of the extension, and of the longest prompt."""
    characters: int
    """Of the standard library."""
    median_document: int
    """Tokens."""
    questions_share: float
    """Of the characters in documents that ask for hidden numbers."""
    vocabulary: int
    depths: tuple[float, ...]
    trials: int
    held_out_documents: int

    @property
    def lengths(self) -> list[int]:
        """Of the prompts: the short row, doubling up to the long row."""
        lengths = [self.short]
        while lengths[-1] < self.long:
            lengths.append(lengths[-1] * 2)
        return lengths


@dataclass(frozen=True)
class Data:
    tokenizer: object
    short: PreparedRows
    long: PreparedRows
    held_out: list[Tensor]
    """(long,) int64 each: BOS and the beginning of a file."""
    prompts: list[Prompt]


def make_data(size: DataSize, folder: Path) -> Data:
    """Write and prepare everything in `folder`."""
    texts = standard_library_texts(at_most_characters=size.characters)
    trained = [text for i, text in enumerate(texts) if i % HELD_OUT]
    tokenizer = train_tokenizer(
        [*trained, *islice(question_documents(1, sentences=8), 2000)],
        vocab_size=size.vocabulary,
    )
    tokenizer.add_tokens([str(number) for number in range(10, 100)])
    token_characters = len(trained[0]) / len(tokenizer(trained[0])["input_ids"])

    def rows(row_length: int, seed: int) -> PreparedRows:
        pieces = cut(trained, median=int(size.median_document * token_characters), seed=seed)
        documents = mixed(pieces, tokenizer, size.questions_share, row_length, seed)
        path = folder / f"documents-{row_length}.jsonl"
        with path.open("w") as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in documents)
        # best_fit: a question stays with what it asks for
        return rows_of(path, DataOptions(seq_length=row_length, packing="best_fit"), tokenizer)

    return Data(
        tokenizer=tokenizer,
        short=rows(size.short, seed=2),
        long=rows(size.long, seed=3),
        held_out=held_out_documents(texts[::HELD_OUT], tokenizer, size),
        prompts=prompts_of(TASK, tokenizer, size, longest=size.long),
    )


def rows_of(documents: Path, options: DataOptions, tokenizer) -> PreparedRows:
    """A file of documents as rows with an anchor per document, prepared once, beside the file."""
    return prepare_rows(
        str(documents),
        options,
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        anchor_placement="per_document",
        cache_dir=documents.parent,
    )


def cut(texts: list[str], *, median: int, seed: int) -> list[str]:
    """Every text cut at line ends into pieces of log-normal length (`median` in characters, sigma 1.0)."""
    rng = random.Random(seed)
    pieces = []
    for text in texts:
        wanted, piece = rng.lognormvariate(0, 1) * median, ""
        for line in text.splitlines(keepends=True):
            piece += line
            if len(piece) >= wanted:
                pieces.append(piece)
                wanted, piece = rng.lognormvariate(0, 1) * median, ""
        pieces += [piece] if piece else []
    return pieces


def mixed(pieces: list[str], tokenizer, share: float, row_length: int, seed: int) -> list[str]:
    """The pieces, shuffled, with documents that ask until they hold `share` of all characters.

    Those have up to a row's length of tokens.
    """
    rng = random.Random(seed)
    sample = "".join(islice(varied_sentences(seed), 100))
    sentence_tokens = len(tokenizer(sample)["input_ids"]) / 100
    questions, left = [], sum(map(len, pieces)) * share / (1 - share)
    # The fact and its question are about as long as three sentences.
    most = int(row_length / sentence_tokens) - 3
    assert most > 0, f"rows of {row_length} tokens have no room for a question"
    for text in question_documents(seed, sentences=most) if share else ():
        questions.append(text)
        left -= len(text)
        if left <= 0:
            break
    documents = pieces + questions
    rng.shuffle(documents)
    return documents


def question_documents(seed: int, *, sentences: int) -> Iterator[str]:
    """Endless documents that hide a number in 1 … `sentences` sentences and then ask for it.

    What teaches a small model to look for it: the shorter, the more there are of them, and every other
    one is in the passkey's words, which say the number twice.
    """
    rng = random.Random(f"questions {seed}")
    for task in itertools.cycle(TASKS.values()):
        fillers = {"needle": varied_sentences(rng.randrange(10**9)), "passkey": passkey_sentences()}
        lines = list(islice(fillers[task.name], int((sentences + 1) ** rng.random())))
        key, number = rng.choice(task.keys), rng.randrange(10, 100)
        lines.insert(rng.randint(0, len(lines)), task.fact.format(key=key, number=number))
        yield "".join(lines) + f"{task.question.format(key=key)} {number}."


def held_out_documents(texts: list[str], tokenizer, size: DataSize) -> list[Tensor]:
    """The beginnings of the texts that fill a long row."""
    anchor, documents = find_anchor_id(tokenizer), []
    for text in texts:
        beginning = token_ids(tokenizer, [text])[0][: size.long - 1]
        if len(beginning) == size.long - 1:
            documents.append(torch.tensor([anchor, *beginning]))
    assert len(documents) > 1, f"no held-out file fills {size.long} tokens"
    return documents[: size.held_out_documents]


def prompts_of(task: Task, tokenizer, size, *, longest: int) -> list[Prompt]:
    """Of every length, the same for every seed, pattern and precision.

    Args:
        size: has the prompts' `lengths`, `depths` and `trials`.
        longest: tokens of the text that they hide in.
    """
    fillers = {"needle": varied_sentences(0), "passkey": passkey_sentences()}
    haystack = Haystack(fillers[task.name], tokenizer, length=longest)
    return [
        prompt
        for length in size.lengths
        for prompt in make_prompts(
            task,
            haystack,
            tokenizer,
            anchor_id=find_anchor_id(tokenizer),
            length=length,
            depths=list(size.depths),
            trials=size.trials,
            seed=0,
        )
    ]
