"""Asks a model for hidden numbers and counts how often it finds them, by length and depth.

Guarantees: greedy, so that the same model gives the same score. An answer counts when the first number of
the generated text is the hidden one, all of its digits and no others.
Costs: one prefill per prompt and a dozen decoding steps; only the last token's logits are computed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from anchor_context.evaluation.prompts import Prompt

Generate = Callable[..., Tensor]
"""generate(prompts (N, S) int64, new_tokens=int) -> (N, new tokens) int64"""


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
    batch_size: int,
    seen: Callable[[int], None] = lambda number: None,
) -> list[Answer]:
    """Generate an answer to every prompt, `batch_size` of equal token count at a time.

    `seen` is told how many prompts are done, after each batch.
    """
    answers = []
    by_size = itertools.groupby(
        sorted(prompts, key=lambda p: len(p.token_ids)), key=lambda p: len(p.token_ids)
    )
    for _, same_size in by_size:
        while batch := list(itertools.islice(same_size, batch_size)):
            # Digits take at most a token each; the rest shows where the number ends.
            new_tokens = max(len(prompt.answer) for prompt in batch) + 3
            generated = generate(
                torch.tensor([prompt.token_ids for prompt in batch]), new_tokens=new_tokens
            )
            for prompt, token_ids in zip(batch, generated.tolist(), strict=True):
                text = tokenizer.decode(token_ids, skip_special_tokens=True)
                answers.append(
                    Answer(
                        prompt.length,
                        prompt.depth,
                        prompt.real_depth,
                        prompt.trial,
                        prompt.answer,
                        text,
                        first_number(text) == prompt.answer,
                    )
                )
            seen(len(batch))
    return answers


def first_number(text: str) -> str | None:
    """The first run of digits, thousands separators left out."""
    found = re.search(r"\d[\d,]*", text)
    return found.group().replace(",", "") if found else None


def greedy(model: PreTrainedModel, *, pad_id: int) -> Generate:
    """The model's own `generate`, plainly greedy: nothing of its generation config but the end token.

    `pad_id`, a special token, stands behind the answers that end before others of their batch.
    """

    @torch.inference_mode()
    def generate(prompts: Tensor, *, new_tokens: int) -> Tensor:
        prompts, own = prompts.to(model.device), model.generation_config
        plain = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad_id,
            eos_token_id=own.eos_token_id,
        )
        # transformers fills what a config leaves unset (penalties, suppressed tokens) from the model's.
        model.generation_config = plain
        try:
            output = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), generation_config=plain
            )
        finally:
            model.generation_config = own
        return output[:, prompts.shape[1] :]

    return generate


def accuracies(answers: list[Answer]) -> dict[tuple[int, float], float]:
    """(length, depth) -> the share of correct answers."""
    return mean_by_cell(answers, "correct")


def mean_by_cell(answers: list[Answer], field: str) -> dict[tuple[int, float], float]:
    """(length, depth) -> the mean of a field of its answers."""
    cells: dict[tuple[int, float], list[float]] = {}
    for answer in answers:
        cells.setdefault((answer.length, answer.depth), []).append(getattr(answer, field))
    return {cell: sum(found) / len(found) for cell, found in sorted(cells.items())}
