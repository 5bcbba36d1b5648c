"""`needle` and `passkey`: the share of hidden numbers that a model finds, by length and depth."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchor_context.attention.patterns import find_anchor_id
from anchor_context.evaluate.commands.common import (
    add_haystack_flag,
    add_prompt_flags,
    ask,
    positive,
    text_of,
    write,
)
from anchor_context.evaluate.plots import heat_map
from anchor_context.evaluate.prompts import TASKS, Haystack, Prompt, make_prompts, passkey_sentences
from anchor_context.evaluate.retrieval import accuracies, answer_prompts, mean_by_cell


def add_passkey_flags(add: Callable) -> None:
    every_tenth = ",".join(map(str, range(0, 101, 10)))
    add("--depths", type=depths_of, default=every_tenth, help="percent of the text before")
    add("--trials", type=positive, default=4, help="numbers hidden per length and depth")
    add_prompt_flags(add)


def add_needle_flags(add: Callable) -> None:
    add_passkey_flags(add)
    add_haystack_flag(add)


def all_prompts(
    flags: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, state: PartialState
) -> list[Prompt]:
    pieces = passkey_sentences if flags.command == "passkey" else text_of(flags)
    haystack = Haystack(pieces(), tokenizer, length=max(flags.lengths))
    return [
        prompt
        for length in flags.lengths
        for prompt in make_prompts(
            TASKS[flags.command],
            haystack,
            tokenizer,
            anchor_id=find_anchor_id(tokenizer),
            length=length,
            depths=flags.depths,
            trials=flags.trials,
            seed=flags.seed,
        )
    ]


def evaluate_retrieval(
    flags: argparse.Namespace,
    state: PartialState,
    model: PreTrainedModel,
    tokenizer,
    prompts: list[Prompt],
) -> None:
    answers = ask(answer_prompts, prompts, flags, state, model, tokenizer)
    if not state.is_main_process:
        return
    answers.sort(key=lambda answer: (answer.length, answer.depth, answer.trial))
    accuracy = accuracies(answers)
    real_depths = mean_by_cell(answers, "real_depth")
    results = [
        {"length": s, "depth": d, "real_depth": real_depths[s, d], "accuracy": a}
        for (s, d), a in accuracy.items()
    ]
    by_length = {
        s: sum(a for (length, _), a in accuracy.items() if length == s) / len(flags.depths)
        for s in flags.lengths
    }
    for length, share in by_length.items():
        print(f"{flags.command} at {length:,} tokens: {share:.1%} right")
    figure = heat_map(accuracy, title=f"{flags.command}: {Path(flags.model).name}")
    write(flags, figure, [asdict(answer) for answer in answers], results)


def depths_of(text: str) -> list[float]:
    depths = sorted({float(part) for part in text.split(",")})
    if not all(0 <= depth <= 100 for depth in depths):
        raise argparse.ArgumentTypeError(f"{text!r} must hold percentages from 0 to 100")
    return depths
