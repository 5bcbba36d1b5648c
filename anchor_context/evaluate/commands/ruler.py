"""`ruler`: the scores of RULER's tasks, by length."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchor_context.attention.patterns import find_anchor_id
from anchor_context.evaluate import ruler
from anchor_context.evaluate.commands.common import (
    add_haystack_flag,
    add_prompt_flags,
    ask,
    positive,
    text_of,
    write,
)
from anchor_context.evaluate.generation import Generate, generated_texts
from anchor_context.evaluate.plots import task_map


def add_flags(add: Callable) -> None:
    every_task = ",".join(ruler.TASKS)
    add("--tasks", type=tasks_of, default=every_task, help="some of RULER's tasks")
    add("--trials", type=positive, default=20, help="prompts per task and length")
    add_prompt_flags(add)
    add_haystack_flag(add)


def all_samples(
    flags: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, state: PartialState
) -> list[ruler.Sample]:
    return [
        sample
        for length in flags.lengths
        for task in flags.tasks
        for sample in ruler.make_samples(
            task,
            tokenizer,
            anchor_id=find_anchor_id(tokenizer),
            length=length,
            trials=flags.trials,
            seed=flags.seed,
            text=text_of(flags),
        )
    ]


def answer_samples(
    generate: Generate, samples: list[ruler.Sample], tokenizer: PreTrainedTokenizerBase, **how
) -> list[dict]:
    """Generate an answer to every sample (`generated_texts`) and score it: the lines of the CSV file."""
    return [
        {
            "task": sample.task,
            "length": sample.length,
            "trial": sample.trial,
            "answers": " ".join(sample.answers),
            "generated": text,
            "score": ruler.string_match_all(text, sample.answers),
        }
        for sample, text in generated_texts(generate, samples, tokenizer, **how)
    ]


def evaluate_ruler(
    flags: argparse.Namespace,
    state: PartialState,
    model: PreTrainedModel,
    tokenizer,
    samples: list[ruler.Sample],
) -> None:
    lines = ask(answer_samples, samples, flags, state, model, tokenizer)
    if not state.is_main_process:
        return
    order = {name: place for place, name in enumerate(ruler.TASKS)}
    lines.sort(key=lambda line: (line["length"], order[line["task"]], line["trial"]))
    results = [
        {"task": task, "length": length} | score_of(lines, task, length)
        for task in flags.tasks
        for length in flags.lengths
    ]
    scores = {(result["length"], result["task"]): result["score"] for result in results}
    print_scores(scores, flags.tasks, flags.lengths)
    figure = task_map(scores, title=f"RULER's tasks: {Path(flags.model).name}")
    write(flags, figure, lines, results)


def score_of(lines: list[dict], task: str, length: int) -> dict:
    """The mean of a task's scores at a length, and its standard error (None of a single one)."""
    scores = [line["score"] for line in lines if (line["task"], line["length"]) == (task, length)]
    error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return {"score": statistics.fmean(scores), "standard_error": error, "trials": len(scores)}


def print_scores(
    scores: dict[tuple[int, str], float], tasks: list[str], lengths: list[int]
) -> None:
    """Percent, as RULER's tables have it: a line per task, and their mean."""
    table = [(task, [scores[length, task] for length in lengths]) for task in tasks]
    means = [statistics.fmean(column) for column in zip(*(line for _, line in table), strict=True)]
    print(f"{'task':16}" + "".join(f"{length:>10,}" for length in lengths))
    for name, line in [*table, ("mean", means)]:
        print(f"{name:16}" + "".join(f"{100 * score:10.1f}" for score in line))


def tasks_of(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ruler.TASKS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no task; choose from {', '.join(ruler.TASKS)}"
            )
    return [name for name in ruler.TASKS if name in names]
