"""Prompts that hide a number in a long text: the needle in a haystack, and the passkey.

Guarantees: a prompt and its answer fill the asked length to the token, so that prompts of one length
need no padding and the model never leaves the length under test. The first token is the anchor (BOS, or
EOS where the tokenizer has no BOS), once, as in training. The same seed gives the same prompts.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """What is hidden, and how it is asked for. `{key}` and `{number}` are filled in anew each time."""

    name: str
    fact: str
    question: str
    keys: tuple[str, ...]
    digits: int


TASKS = {
    "needle": Task(
        "needle",
        fact=" The secret number of {key} is {number}.",
        question=" Question: what is the secret number of {key}? Answer: the secret number of {key} is",
        keys=("Lisbon", "Nairobi", "Osaka", "Quito", "Tallinn", "Perth", "Hanoi", "Bergen"),
        digits=7,
    ),
    "passkey": Task(
        "passkey",
        fact=" The pass key is {number}. Keep it in mind: {number} is the pass key.",
        question=" What is the pass key? The pass key is",
        keys=("",),
        digits=5,
    ),
}


@dataclass(frozen=True)
class Prompt:
    """One question, and where its answer was hidden."""

    length: int
    """Tokens, the answer's included."""
    depth: float
    """Percent of the text to come before the fact: 0 the beginning, 100 the end."""
    real_depth: float
    """Percent that does: the fact stands between sentences, or words."""
    trial: int
    token_ids: list[int]
    answer: str

    @property
    def new_tokens(self) -> int:
        """That may be generated: digits take at most a token each; the rest shows where the number ends."""
        return len(self.answer) + 3


def passkey_sentences() -> Iterator[str]:
    """The passkey's filler: the same three sentences again and again."""
    return itertools.cycle(
        (" The river runs to the sea.", " The lamp burns all night.", " Nobody is on the road.")
    )


def varied_sentences(seed: int) -> Iterator[str]:
    """Filler for the needle where no text is given: plain sentences that hold no number."""
    choose = random.Random(seed).choice
    who = (
        "The baker",
        "A young clerk",
        "My neighbour",
        "The captain",
        "An old teacher",
        "The twins",
    )
    did = ("carried", "painted", "looked for", "sold", "remembered", "hid", "repaired", "drew")
    what = (
        "a wooden boat",
        "the garden wall",
        "two brass keys",
        "an empty letter",
        "the red bicycle",
    )
    when = (
        "before the rain came",
        "in early spring",
        "without a word",
        "after supper",
        "near the bridge",
    )
    while True:
        yield f" {choose(who)} {choose(did)} {choose(what)} {choose(when)}."


PIECE = re.compile(
    r"(?s).{1,64}?[.!?](?=\s|$)|.{1,64}?[。！？]"  # to a sentence's end, if it is near
    r"|.{1,64}(?=\n)|.{1,64}(?=\s)|.{1,16}"  # else to the end of a line, of a word, or anywhere
)
SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces of at most 64 characters, its sentences where they are as short as that, from
    the start again where it ends."""
    if not text.strip():
        raise ValueError("--haystack is empty; give a file with text")
    return itertools.cycle(PIECE.findall(" " + text.strip()))


class Haystack:
    """The pieces of a filler (sentences, or parts of them) as tokens, as many as the longest prompt
    asks for."""

    NEAR = 0.05
    """Of the text: so near to the depth, a sentence's end is better than any other place."""

    def __init__(self, pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, *, length: int):
        self.token_ids: list[int] = []
        self.places = [0]
        """Token counts after which a fact may stand: the ends of pieces."""
        self.sentence_ends = [0]
        known: dict[str, list[int]] = {}
        for piece in pieces:
            if piece not in known:
                known[piece] = tokenizer(
                    piece, add_special_tokens=False, split_special_tokens=True
                )["input_ids"]
            self.token_ids += known[piece]
            self.places.append(len(self.token_ids))
            if piece.endswith(SENTENCE_ENDS):
                self.sentence_ends.append(len(self.token_ids))
            if len(self.token_ids) >= length:
                return

    def split(self, room: int, depth: float) -> int:
        """After how many of the first `room` tokens the fact stands: the sentence's end nearest to the
        depth, or where that is far off, the nearest place. The piece that `room` cuts off comes last,
        before the question."""
        wanted = room * depth / 100

        def nearest(places: list[int]) -> int:
            return min(
                (place for place in places if place <= room), key=lambda place: abs(place - wanted)
            )

        end = nearest(self.sentence_ends)
        return end if abs(end - wanted) <= self.NEAR * room else nearest(self.places)


def make_prompts(
    task: Task,
    haystack: Haystack,
    tokenizer: PreTrainedTokenizerBase,
    *,
    anchor_id: int,
    length: int,
    depths: list[float],
    trials: int,
    seed: int,
) -> list[Prompt]:
    """All prompts of one length: trials × depths.

    Raises:
        ValueError: the fact and the question do not fit into the length.
    """
    prompts = []
    for depth, trial in itertools.product(depths, range(trials)):
        choose = random.Random(f"{seed} {task.name} {length} {depth} {trial}")
        key = choose.choice(task.keys)
        answer = str(choose.randrange(10 ** (task.digits - 1), 10**task.digits))
        fact, question, reply = (
            tokenizer(text.format(key=key, number=answer), add_special_tokens=False)["input_ids"]
            for text in (task.fact, task.question, " {number}")
        )
        room = length - 1 - len(fact) - len(question) - len(reply)
        if room < 0:
            raise ValueError(
                f"--lengths {length} is too short for the question, which takes {length - room} tokens"
            )
        assert room <= len(haystack.token_ids), "the haystack was made for shorter prompts"
        at = haystack.split(room, depth)
        before, after = haystack.token_ids[:at], haystack.token_ids[at:room]
        token_ids = [anchor_id, *before, *fact, *after, *question]
        real_depth = 100 * at / room if room else depth
        prompts.append(Prompt(length, depth, real_depth, trial, token_ids, answer))
    return prompts
