"""What training bought: retrieval by length and depth, RULER's tasks by length, perplexity by position.

    python -m anchor_context.evaluate needle  --model PATH --lengths 4096,16384 --out DIR [--haystack FILE]
    python -m anchor_context.evaluate passkey --model PATH --lengths 4096,16384 --out DIR
    python -m anchor_context.evaluate ruler   --model PATH --lengths 4096,16384 --out DIR [--tasks vt,cwe]
    python -m anchor_context.evaluate ppl     --model PATH --lengths 4096,16384 --out DIR --dataset FILE
    accelerate launch --num_processes 8 -m anchor_context.evaluate needle …

A checkpoint trained with any pattern is evaluated as a plain causal Hugging Face model with the anchor
token (BOS, or EOS where the tokenizer has no BOS) at position 0: for one document, AnchorAttention is
that. The work is divided over the launched processes, on GPUs where there are any; process 0 says how long
it will take, and writes a picture, a CSV file and a JSON file, named after the command.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel

from anchor_context.command_line import FlagParser, model_errors, one_line_errors
from anchor_context.data.tokenizer import load_tokenizer
from anchor_context.evaluate.commands import needle, ppl, ruler
from anchor_context.evaluate.commands.common import positive
from anchor_context.run.lifeline import end_with_launcher


class Command(NamedTuple):
    """A command, and the functions of its file in `commands/`."""

    help: str
    add_flags: Callable[[Callable], None]
    """Its own flags, by the parser's `add_argument`."""
    find_work: Callable[..., Iterable]
    """(flags, tokenizer, state) -> prompts, or documents: all, in the same order on every process."""
    evaluate: Callable[..., None]
    """(flags, state, model, tokenizer, work): does this process's part, and on process 0 writes of all."""


COMMANDS = {
    "needle": Command(
        "find a number hidden in a text",
        needle.add_needle_flags,
        needle.all_prompts,
        needle.evaluate_retrieval,
    ),
    "passkey": Command(
        "find a number hidden in repeated sentences",
        needle.add_passkey_flags,
        needle.all_prompts,
        needle.evaluate_retrieval,
    ),
    "ruler": Command(
        "RULER's synthetic tasks (arXiv 2404.06654)",
        ruler.add_flags,
        ruler.all_samples,
        ruler.evaluate_ruler,
    ),
    "ppl": Command(
        "perplexity by position",
        ppl.add_flags,
        ppl.documents_to_measure,
        ppl.evaluate_perplexity,
    ),
}


def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    with model_errors(flags.model, "--model"):
        tokenizer = load_tokenizer(flags.model)
    state = start_processes()
    command = COMMANDS[flags.command]
    # Everything that can be refused is refused before the model is loaded.
    work = list(command.find_work(flags, tokenizer, state))
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    with model_errors(flags.model, "--model"):
        model = load_model(flags.model, state.device)
    note_long_lengths(model, flags.lengths, state)
    command.evaluate(flags, state, model, tokenizer, work)
    state.destroy_process_group()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(
        prog="python -m anchor_context.evaluate", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        add = commands.add_parser(name, help=command.help).add_argument
        add("--model", required=True, help="a Hugging Face model, such as a run's step-N")
        add(
            "--lengths", type=lengths_of, required=True, help="context lengths in tokens: 4096,8192"
        )
        add("--out", required=True, help="the folder for picture, CSV and JSON")
        command.add_flags(add)
    return parser.parse_args(arguments)


def start_processes() -> PartialState:
    """The launched processes: one per GPU, or gloo processes on the CPU."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # They meet once, at the end, and those that are done early wait for the one with the longest prompts.
    patience = {"timeout": timedelta(days=7)} if several else {}
    if torch.cuda.is_available():
        return PartialState(**patience)
    # Named, because without a GPU Accelerate would take every process for the only one.
    return PartialState(cpu=True, backend="gloo" if several else None, **patience)


def load_model(path: str, device: torch.device) -> PreTrainedModel:
    """The checkpoint in the type it is stored in, with PyTorch's own causal attention, or transformers' eager
    one where a family has scores that this cannot compute."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return model.to(device).eval()


def note_long_lengths(model: PreTrainedModel, lengths: list[int], state: PartialState) -> None:
    known = getattr(model.config, "max_position_embeddings", None)
    beyond = [length for length in lengths if known and length > known]
    if beyond:
        state.print(
            f"note: lengths {beyond} go beyond the model's max_position_embeddings, {known}"
        )


def lengths_of(text: str) -> list[int]:
    return sorted({positive(part) for part in text.split(",")})


if __name__ == "__main__":
    end_with_launcher()
    with one_line_errors():
        main()
