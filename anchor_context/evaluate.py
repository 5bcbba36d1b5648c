"""What training bought: retrieval by length and depth, and perplexity by position.

    python -m anchor_context.evaluate needle  --model PATH --lengths 4096,16384 --out DIR [--haystack FILE]
    python -m anchor_context.evaluate passkey --model PATH --lengths 4096,16384 --out DIR
    python -m anchor_context.evaluate ppl     --model PATH --lengths 4096,16384 --out DIR --dataset FILE
    accelerate launch --num_processes 8 -m anchor_context.evaluate needle …

A checkpoint trained with any pattern is evaluated as a plain causal Hugging Face model with the anchor
token (BOS, or EOS where the tokenizer has no BOS) at position 0: for one document, AnchorAttention is
that. The work is divided over the launched processes; process 0 writes a picture, a CSV file and a JSON
file, named after the command.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from anchor_context.command_line import FlagParser, model_errors, one_line_errors, read_text
from anchor_context.data.documents import DocumentReader
from anchor_context.data.packing import find_anchor_id
from anchor_context.data.sources import find_inputs, read_units
from anchor_context.evaluation.perplexity import perplexity_rows, token_losses
from anchor_context.evaluation.plots import heat_map, perplexity_curve
from anchor_context.evaluation.prompts import (
    TASKS,
    Haystack,
    make_prompts,
    passkey_sentences,
    pieces_of,
    varied_sentences,
)
from anchor_context.evaluation.retrieval import accuracies, answer_prompts, greedy, mean_by_cell


def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    with model_errors(flags.model, "--model"):
        tokenizer = AutoTokenizer.from_pretrained(flags.model)
    state = start_processes()
    # Everything that can be refused is refused before the model is loaded.
    if flags.command == "ppl":
        work = list(long_documents(flags, tokenizer, state))
    else:
        work = all_prompts(flags, tokenizer)
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    with model_errors(flags.model, "--model"):
        model = load_model(flags.model, state.device)
    note_long_lengths(model, flags.lengths, state)
    evaluate = evaluate_perplexity if flags.command == "ppl" else evaluate_retrieval
    evaluate(flags, state, model, tokenizer, work)
    state.destroy_process_group()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(
        prog="python -m anchor_context.evaluate", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (
        ("needle", "find a number hidden in a text"),
        ("passkey", "find a number hidden in repeated sentences"),
        ("ppl", "perplexity by position"),
    ):
        add = commands.add_parser(name, help=help).add_argument
        add("--model", required=True, help="a Hugging Face model, such as a run's step-N")
        add(
            "--lengths", type=lengths_of, required=True, help="context lengths in tokens: 4096,8192"
        )
        add("--out", required=True, help="the folder for picture, CSV and JSON")
        if name == "ppl":
            add("--dataset", required=True, help="raw text documents, in any form train.py reads")
            add("--text_column", "--text-column", default="text", help="the column of the text")
            add(
                "--skip_bad_documents",
                "--skip-bad-documents",
                action="store_true",
                help="leave out records that are damaged or have no text, and say how many",
            )
            add("--documents", type=positive, default=50, help="at most so many, from the start")
            continue
        every_tenth = ",".join(map(str, range(0, 101, 10)))
        add("--depths", type=depths_of, default=every_tenth, help="percent of the text before it")
        add("--trials", type=positive, default=4, help="numbers hidden per length and depth")
        add("--batch-size", "--batch_size", type=positive, default=1, help="prompts at a time")
        add("--seed", type=int, default=42, help="of numbers and filler")
        if name == "needle":
            add("--haystack", help="a UTF-8 text to hide in; default: made-up sentences")
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
    """The checkpoint in the type it is stored in, with PyTorch's own causal attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="sdpa")
    return model.to(device).eval()


def note_long_lengths(model: PreTrainedModel, lengths: list[int], state: PartialState) -> None:
    known = getattr(model.config, "max_position_embeddings", None)
    beyond = [length for length in lengths if known and length > known]
    if beyond:
        state.print(
            f"note: lengths {beyond} go beyond the model's max_position_embeddings, {known}"
        )


# --------------------------------------------------------------------------------------------------
# needle and passkey


def all_prompts(flags: argparse.Namespace, tokenizer) -> list:
    if flags.command == "passkey":
        pieces = passkey_sentences()
    elif flags.haystack:
        pieces = pieces_of(read_text(flags.haystack, "--haystack"))
    else:
        pieces = varied_sentences(flags.seed)
    haystack = Haystack(pieces, tokenizer, length=max(flags.lengths))
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
    flags: argparse.Namespace, state: PartialState, model: PreTrainedModel, tokenizer, prompts: list
) -> None:
    # Every process takes every n-th prompt, so that each has its part of the long ones.
    mine = prompts[state.process_index :: state.num_processes]
    with tqdm(total=len(mine), unit="prompt", disable=not state.is_main_process) as bar:
        answers = answer_prompts(
            greedy(model, pad_id=find_anchor_id(tokenizer)),
            mine,
            tokenizer,
            batch_size=flags.batch_size,
            seen=bar.update,
        )
    answers = gather_object(answers)
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


# --------------------------------------------------------------------------------------------------
# ppl


def long_documents(flags: argparse.Namespace, tokenizer, state: PartialState) -> Iterator[Tensor]:
    """(longest,) int64 of each document that fills the longest length: the anchor, then its tokens.

    Raises:
        ValueError: there is none, or a record is bad and --skip_bad_documents was not given.
    """
    reader = DocumentReader(
        tokenizer,
        "raw_json",
        vocab_size=len(tokenizer),
        text_column=flags.text_column,
        skip_bad_documents=flags.skip_bad_documents,
    )
    anchor, needed = torch.tensor([find_anchor_id(tokenizer)]), max(flags.lengths) - 1
    found, longest = 0, 0
    for unit in read_units(find_inputs(flags.dataset), reader.columns):
        documents = reader(unit)
        if bad := documents.skipped:
            first = (
                f"{bad[0]['file']}, {bad[0].get('line', bad[0].get('row'))}: {bad[0]['problem']}"
            )
            state.print(f"note: bad documents skipped: {len(bad)}; the first: {first}")
        tokens = torch.from_numpy(documents.tokens).long()
        for document in tokens.split(documents.lengths.tolist()):
            document = document[:-1]  # the reader's EOS: a document's end is not what is asked
            longest = max(longest, len(document))
            if len(document) >= needed:
                yield torch.cat((anchor, document[:needed]))
                found += 1
                if found == flags.documents:
                    return
    if not found:
        raise ValueError(
            f"--dataset {flags.dataset}: no document fills --lengths {max(flags.lengths)}; the longest "
            f"has {longest} tokens: give shorter --lengths or longer documents"
        )


def evaluate_perplexity(
    flags: argparse.Namespace,
    state: PartialState,
    model: PreTrainedModel,
    tokenizer,
    documents: list[Tensor],
) -> None:
    mine = range(state.process_index, len(documents), state.num_processes)
    losses = [
        (number, token_losses(model, documents[number]))
        for number in tqdm(mine, unit="document", disable=not state.is_main_process)
    ]
    losses = [loss for _, loss in sorted(gather_object(losses), key=lambda pair: pair[0])]
    if not state.is_main_process:
        return
    rows = perplexity_rows(losses, flags.lengths)
    for row in rows:
        if row["kind"] == "length":
            print(f"ppl of the first {row['last'] + 1:,} tokens: {row['perplexity']:.4g}")
    figure = perplexity_curve(rows, title=f"perplexity by position: {Path(flags.model).name}")
    write(flags, figure, rows, rows)


# --------------------------------------------------------------------------------------------------


def write(flags: argparse.Namespace, figure, lines: list[dict], results: list[dict]) -> None:
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


def lengths_of(text: str) -> list[int]:
    return sorted({positive(part) for part in text.split(",")})


def depths_of(text: str) -> list[float]:
    depths = sorted({float(part) for part in text.split(",")})
    if not all(0 <= depth <= 100 for depth in depths):
        raise argparse.ArgumentTypeError(f"{text!r} must hold percentages from 0 to 100")
    return depths


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


if __name__ == "__main__":
    with one_line_errors():
        main()
