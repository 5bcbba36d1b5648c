"""What the commands share: flags, the text to hide in, asking a model for answers, and what is written."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchor_context.attention.patterns import find_anchor_id
from anchor_context.command_line import read_text
from anchor_context.evaluate.generation import estimated_seconds, greedy
from anchor_context.evaluate.prompts import pieces_of, varied_sentences

# --------------------------------------------------------------------------------------------------
# Flags


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def add_prompt_flags(add: Callable) -> None:
    """Of the commands that ask questions."""
    at_once = "prompts at a time; default: as many as have 16,384 tokens, at least one"
    add("--batch-size", "--batch_size", type=positive, help=at_once)
    add("--seed", type=int, default=42, help="of numbers and filler")


def add_haystack_flag(add: Callable) -> None:
    """Of those that hide something in a text; what it says, `text_of` reads."""
    add("--haystack", help="a UTF-8 text to hide in; default: made-up sentences")


def text_of(flags: argparse.Namespace) -> Callable[[], Iterator[str]]:
    """Makes the pieces of the text to hide in, from its beginning."""
    if not flags.haystack:
        return lambda: varied_sentences(flags.seed)
    text = read_text(flags.haystack, "--haystack")
    return lambda: pieces_of(text)


# --------------------------------------------------------------------------------------------------
# Answers


def ask(
    answers_of: Callable[..., list],
    prompts: list,
    flags: argparse.Namespace,
    state: PartialState,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list:
    """All answers, on every process; process 0 says how long it will take.

    Args:
        answers_of: makes the answers to some of the prompts, as `retrieval.answer_prompts` does.
    """
    # Every process takes every n-th prompt, so that each has its part of the long ones.
    mine = prompts[state.process_index :: state.num_processes]
    generate = greedy(model, pad_id=find_anchor_id(tokenizer))
    if state.is_main_process:
        seconds = estimated_seconds(generate, mine, batch_size=flags.batch_size)
        print(
            f"{len(mine):,} prompts of {sum(len(p.token_ids) for p in mine):,} tokens on "
            f"{state.device.type}: about {duration(seconds)}",
            flush=True,
        )
    with tqdm(total=len(mine), unit="prompt", disable=not state.is_main_process) as bar:
        answers = answers_of(
            generate, mine, tokenizer, batch_size=flags.batch_size, seen=bar.update
        )
    return gather_object(answers)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} seconds"
    return f"{math.ceil(seconds / 60)} minutes"


# --------------------------------------------------------------------------------------------------
# Results


def write(
    flags: argparse.Namespace, figure: Figure, lines: list[dict], results: list[dict]
) -> None:
    """The picture, every measured line as CSV, and the results with their flags as JSON; say where."""
    picture, table, summary = (
        Path(flags.out) / f"{flags.command}.{kind}" for kind in ("png", "csv", "json")
    )
    figure.savefig(picture, dpi=120)
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    found = {"flags": vars(flags), "results": results}
    summary.write_text(json.dumps(found, indent=2) + "\n")
    print(f"picture  {picture}\ntable    {table}\nresults  {summary}")
