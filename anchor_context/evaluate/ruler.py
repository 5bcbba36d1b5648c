"""RULER's synthetic tasks (arXiv 2404.06654, section 3), made offline: the paper's definitions, our own text.

    niah_*   needles in a haystack: of a key that is hidden once, with three others, in a text of nothing but
             such needles; all values of one key; the values of several keys
    vt       variable tracking: which names stand for a number, some of them by way of others
    cwe      the ten common words of a list of words
    fwe      the three most frequent words of a coded text, whose words follow a Zeta distribution

Guarantees: a prompt and the tokens that may answer it fill the asked length exactly, so that prompts of one
task and length need no padding and the model never leaves the length under test. The first token is the
anchor, once, as in training. The same seed gives the same prompts. Answers are scored as RULER's
`string_match_all` does.

A prompt ends with the beginning of its answer, so that plain language models answer too, and `vt` and `cwe`
start with a solved example: both as RULER's do.
"""

from __future__ import annotations

import bisect
import itertools
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from anchor_context.evaluate.prompts import Haystack, passkey_sentences
from anchor_context.evaluate.words import (
    PLAIN,
    coded_words,
    distinct_words,
    long_words,
    pairs,
)


@dataclass(frozen=True)
class Sample:
    """One question of one task."""

    task: str
    length: int
    """Tokens, those that may be generated included."""
    trial: int
    token_ids: list[int]
    answers: tuple[str, ...]
    new_tokens: int
    """That may be generated."""


def string_match_all(generated: str, answers: tuple[str, ...]) -> float:
    """RULER's score of one sample: the share of the answers that stand in the text, in any case of letters.

    As a part of something longer counts: 1234567 is found in "12345678".
    """
    text = generated.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


class TooShort(Exception):
    """The room does not hold what the task asks about."""


@dataclass(frozen=True)
class Listing:
    """A text of so many words as were wanted."""

    pieces: list[str]
    answers: list[str]
    """Empty where the words are too few to tell them apart."""
    more: Iterator[str]
    """Endless pieces, some of which may follow without changing the answers."""


class Page:
    """Where a task writes one prompt: the tokenizer, the tokens that there is room for, and the chance."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        room: int,
        random: random.Random,
        text: Callable[[], Iterator[str]],
        known: dict[str, list[int]],
    ):
        """
        Args:
            room: tokens, without the anchor.
            text: makes the pieces of a haystack, from its beginning.
            known: texts that were tokenized before; pages may share it.
        """
        self.tokenizer, self.room, self.random, self.text = tokenizer, room, random, text
        self.known = known

    def ids(self, *pieces: str) -> list[int]:
        """The token ids of pieces of text, each tokenized by itself."""
        for piece in pieces:
            if piece not in self.known:
                self.known[piece] = self.tokenizer(
                    piece, add_special_tokens=False, split_special_tokens=True
                )["input_ids"]
        return [token for piece in pieces for token in self.known[piece]]

    def hidden(self, before: str, facts: list[str], filler: Iterator[str], after: str) -> list[int]:
        """`before`, the facts, in order, at random places of the filler, which is cut to fit, `after`."""
        first, last, facts_ids = self.ids(before), self.ids(after), [self.ids(f) for f in facts]
        room = self.room - len(first) - len(last) - sum(map(len, facts_ids))
        if room < 0:
            raise TooShort
        haystack = Haystack(filler, self.tokenizer, length=room)
        places = sorted(haystack.split(room, self.random.uniform(0, 100)) for _ in facts)
        token_ids, start = first, 0
        for place, fact in zip(places, facts_ids, strict=True):
            token_ids += haystack.token_ids[start:place] + fact
            start = place
        return token_ids + haystack.token_ids[start:room] + last

    def listed(
        self, before: str, listing: Callable[[int], Listing], after: str
    ) -> tuple[list[int], list[str]]:
        """`before`, the longest listing(n) that fits, of its `more` what fits, `after`; and the answers."""
        first, last = self.ids(before), self.ids(after)
        room = self.room - len(first) - len(last)
        if room < 1:
            raise TooShort

        def length(number: int) -> int:
            return len(self.ids(*listing(number).pieces))

        longest = listing(bisect.bisect_right(range(room), room, key=length) - 1)
        if not longest.answers:
            raise TooShort
        body = self.ids(*longest.pieces)
        while len(body) < room:
            body += self.ids(next(longest.more))
        return first + body[:room] + last, longest.answers


Make = Callable[[Page], tuple[list[int], list[str]]]
"""make(page) -> the prompt's token ids, as many as the page has room for, and the answers."""


# --------------------------------------------------------------------------------------------------
# Needles


@dataclass(frozen=True)
class Needles:
    """What a niah task hides and asks for."""

    haystack: str = "text"
    """text, or `repeated` sentences, or `needles` with other keys."""
    keys: int = 1
    """Hidden on purpose, beside those of the haystack."""
    values: int = 1
    """Of each key."""
    asked: int = 1
    """So many of the keys."""
    key: str = "word"
    value: str = "number"

    FACT = " A secret {kind} of {key} is {value}."
    INTRO = " Some secret {kind}s are hidden in the text below. Keep them in mind."
    ASK_ONE = (
        " Question: what is the secret {kind} of {keys}? Answer: the secret {kind} of {keys} is"
    )
    ASK_ALL = (
        " Question: what are all secret {kind}s of {keys}? Answer: the secret {kind}s of {keys} are"
    )

    def __call__(self, page: Page) -> tuple[list[int], list[str]]:
        keys, values = drawn(self.key, page.random), drawn(self.value, page.random)
        hidden = [
            (key, next(values))
            for key in itertools.islice(keys, self.keys)
            for _ in range(self.values)
        ]
        asked = list(dict(hidden))[: self.asked]
        answers = [value for key, value in hidden if key in asked]
        page.random.shuffle(hidden)

        def fact(key: str, value: str) -> str:
            return self.FACT.format(kind=self.value, key=key, value=value)

        fillers = {
            "text": page.text,
            "repeated": passkey_sentences,
            "needles": lambda: map(fact, keys, values),
        }
        question = self.ASK_ONE if len(answers) == 1 else self.ASK_ALL
        token_ids = page.hidden(
            self.INTRO.format(kind=self.value),
            list(itertools.starmap(fact, hidden)),
            fillers[self.haystack](),
            question.format(kind=self.value, keys=enumeration(asked)),
        )
        return token_ids, answers


def drawn(kind: str, random: random.Random) -> Iterator[str]:
    """Endless different keys or values."""
    if kind == "word":
        yield from pairs(random)
    elif kind == "number":
        while True:  # two of nine million hardly ever meet
            yield str(random.randrange(10**6, 10**7))
    else:
        while True:
            yield str(uuid.UUID(int=random.getrandbits(128), version=4))


def enumeration(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# --------------------------------------------------------------------------------------------------
# Variable tracking


HOPS = 4


def variable_tracking(page: Page) -> tuple[list[int], list[str]]:
    """One chain of names that stand for a number, in repeated sentences: all five are asked for."""
    words = (word.upper() for word in coded_words(page.random))

    def chain() -> tuple[list[str], list[str], str]:
        """Five names, the sentences that bind them, and the question up to the answer."""
        names = list(itertools.islice(words, HOPS + 1))
        number = str(page.random.randrange(10**4, 10**5))
        bound = [
            f" Let {name} be {value}."
            for name, value in zip(names, [number, *names[:-1]], strict=True)
        ]
        question = f" Question: which {len(names)} names stand for {number}? Answer: they are"
        return names, bound, question

    shown, sentences, shown_question = chain()
    names, bound, question = chain()
    intro = " A name is bound to a number, others to names bound before. Follow them."
    example = "".join(sentences) + f"{shown_question} {', '.join(shown)}."
    before = intro + example + intro
    return page.hidden(before, bound, passkey_sentences(), question), names


# --------------------------------------------------------------------------------------------------
# Common and frequent words

COMMON = 10
COMMON_TIMES, UNCOMMON_TIMES = 30, 3
SPARE = 20
"""Words that may follow a list."""
Words = Callable[[int, random.Random], list[str]]
"""words(count, chance) -> so many different words"""


def common_words(page: Page) -> tuple[list[int], list[str]]:
    """A numbered list in which ten words come thirty times and all others thrice: the ten are asked for."""
    intro = " In this list of words, ten come most often."
    question = " Question: which ten words come most often in the list? Answer: they are"
    example = word_list(30, page.random.random())
    solved = "".join(example.pieces) + question + "".join(numbered(example.answers))
    seed, words = page.random.random(), distinct_words
    if len(page.ids(*word_list(MOST_PLAIN, seed).pieces)) <= page.room:
        # Else the longest list of plain words might leave room, and one more word, for which all words become
        # longer ones, might be too many.
        words = long_words
    return page.listed(intro + solved + intro, partial(word_list, seed=seed, words=words), question)


def word_list(number: int, seed: float, *, words: Words = distinct_words) -> Listing:
    """So many words, drawn by `words`."""
    times, others_times = word_times(number)
    chance = random.Random(seed)
    drawn = words(different_words(number), chance)
    common, uncommon, spare = drawn[:COMMON], drawn[COMMON:-SPARE], drawn[-SPARE:]
    others = [word for word in uncommon for _ in range(others_times)]
    text = common * times + others[: number - COMMON * times]
    chance.shuffle(text)
    more = itertools.cycle(f" {word}" for word in spare)
    return Listing(numbered(text), common if times > 1 else [], more)


def word_times(number: int) -> tuple[int, int]:
    """How often a common word comes in a list of so many words, and how often another. Where they are too few
    for thirty of each of the ten, two thirds are theirs, and the others come a tenth as often, or once."""
    times = min(COMMON_TIMES, number * 2 // 3 // COMMON)
    return times, max(times * UNCOMMON_TIMES // COMMON_TIMES, 1)


def different_words(number: int) -> int:
    """How many different words are drawn for a list of so many, the spare ones included."""
    times, others_times = word_times(number)
    return COMMON - (-(number - COMMON * times) // others_times) + SPARE


MOST_PLAIN = next(n for n in itertools.count() if different_words(n + 1) > len(PLAIN))
"""The longest list of plain words."""


def numbered(words: list[str]) -> list[str]:
    pairs = ((f" {place}.", f" {word}") for place, word in enumerate(words, start=1))
    return list(itertools.chain.from_iterable(pairs))


ALPHA = 2.0
ZETA = 1.6449340668
"""Riemann's zeta of ALPHA."""
DOTS = " ...."


def frequent_words(page: Page) -> tuple[list[int], list[str]]:
    """A coded text, most of it dots: the three words that are the most frequent besides are asked for."""
    return page.listed(
        " Count the words of this coded text, but leave out the dots.",
        partial(coded_text, seed=page.random.random()),
        " Question: which three words come most often in the coded text? Answer: they are",
    )


def coded_text(number: int, seed: float) -> Listing:
    """So many words, of which the k-th makes up k^−α/ζ(α); the first are the dots."""
    chance = random.Random(seed)
    shares = (number * k**-ALPHA / ZETA for k in itertools.count(2))
    counts = [int(share) for share in itertools.takewhile(lambda share: share >= 1, shares)]
    words = list(itertools.islice(coded_words(chance), len(counts)))
    text = [f" {word}" for word, times in zip(words, counts, strict=True) for _ in range(times)]
    text += [DOTS] * (number - len(text))
    chance.shuffle(text)
    told_apart = len(counts) > 3 and counts[2] > counts[3]
    return Listing(text, words[:3] if told_apart else [], more=itertools.repeat(DOTS))


# --------------------------------------------------------------------------------------------------
# The tasks


@dataclass(frozen=True)
class Task:
    make: Make
    new_tokens: int
    """That the answer may take; RULER's numbers, and more for vt, whose names may be spelt in letters."""


TASKS = {
    "niah_single_1": Task(Needles(haystack="repeated"), 128),
    "niah_single_2": Task(Needles(), 128),
    "niah_single_3": Task(Needles(value="uuid"), 128),
    "niah_multikey_1": Task(Needles(keys=4), 128),
    "niah_multikey_2": Task(Needles(haystack="needles"), 128),
    "niah_multikey_3": Task(Needles(haystack="needles", key="uuid", value="uuid"), 128),
    "niah_multivalue": Task(Needles(values=4), 128),
    "niah_multiquery": Task(Needles(keys=4, asked=4), 128),
    "vt": Task(variable_tracking, 60),
    "cwe": Task(common_words, 120),
    "fwe": Task(frequent_words, 50),
}


def make_samples(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    anchor_id: int,
    length: int,
    trials: int,
    seed: int,
    text: Callable[[], Iterator[str]],
) -> list[Sample]:
    """The samples of one task and length.

    Args:
        text: makes the pieces of the haystack of the tasks that hide in a text (`prompts.pieces_of`).

    Raises:
        ValueError: the task does not fit into the length.
    """
    task, samples, known = TASKS[name], [], {}
    for trial in range(trials):
        page = Page(
            tokenizer,
            room=length - 1 - task.new_tokens,
            random=random.Random(f"{seed} {name} {length} {trial}"),
            text=text,
            known=known,
        )
        try:
            token_ids, answers = task.make(page)
        except TooShort:
            raise ValueError(
                f"--lengths {length} is too short for the task {name}; give longer ones, or leave it out "
                "of --tasks"
            ) from None
        assert len(token_ids) == page.room
        samples.append(
            Sample(name, length, trial, [anchor_id, *token_ids], tuple(answers), task.new_tokens)
        )
    return samples
