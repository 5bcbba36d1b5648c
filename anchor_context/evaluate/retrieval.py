"""Asks a model for hidden numbers and counts how often it finds them, by length and depth.

Guarantees: an answer counts when the first number of the generated text is the hidden one, all of its
digits and no others.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from anchor_context.evaluate.generation import Generate, generated_texts
from anchor_context.evaluate.prompts import Prompt


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt: a line of the CSV file."""

    length: int
    depth: float
    real_depth: float
    """`depth` as asked for, and as the text allowed (`prompts.Prompt`)."""
    trial: int
    answer: str
    generated: str
    correct: bool


def answer_prompts(
    generate: Generate,
    prompts: list[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int | None,
    seen: Callable[[int], None] = lambda number: None,
) -> list[Answer]:
    """Generate an answer to every prompt (`generated_texts`) and say whether it is right."""
    return [
        Answer(
            prompt.length,
            prompt.depth,
            prompt.real_depth,
            prompt.trial,
            prompt.answer,
            text,
            first_number(text) == prompt.answer,
        )
        for prompt, text in generated_texts(
            generate, prompts, tokenizer, batch_size=batch_size, seen=seen
        )
    ]


def first_number(text: str) -> str | None:
    """The first run of digits, thousands separators left out."""
    found = re.search(r"\d[\d,]*", text)
    return found.group().replace(",", "") if found else None


def accuracies(answers: list[Answer]) -> dict[tuple[int, float], float]:
    """(length, depth) -> the share of correct answers."""
    return mean_by_cell(answers, "correct")


def mean_by_cell(answers: list[Answer], field: str) -> dict[tuple[int, float], float]:
    """(length, depth) -> the mean of a field of its answers."""
    cells: dict[tuple[int, float], list[float]] = {}
    for answer in answers:
        cells.setdefault((answer.length, answer.depth), []).append(getattr(answer, field))
    return {cell: sum(found) / len(found) for cell, found in sorted(cells.items())}
