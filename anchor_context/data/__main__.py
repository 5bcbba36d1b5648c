"""Prepare rows without training, and look into them.

    python -m anchor_context.data prepare --dataset 'data/*.jsonl' --model_name_or_path MODEL
    python -m anchor_context.data inspect PATH

One machine prepares, many train: give `train.py` the same flags and the same `--cache_dir`, or the path
that `prepare` prints as its `--dataset`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

from anchor_context.data.packing import open_rows, prepare_rows
from anchor_context.data.rows import source_lines


@dataclass
class PrepareFlags:
    """The flags of `prepare`: those of train.py that shape the rows."""

    dataset: list[str] = field(
        metadata={"help": "files, globs, folders, save_to_disk directories or hub names"}
    )
    model_name_or_path: str = field(
        metadata={"help": "the model whose tokenizer and vocabulary count"}
    )
    data_format: Literal["raw_json", "tokenized"] = field(
        default="raw_json",
        metadata={"help": "a text per record, or pre-tokenised rows with document ends"},
    )
    seq_length: int = field(default=65536, metadata={"help": "tokens per row"})
    anchor_placement: Literal["per_document", "shared", "none"] = field(
        default="per_document",
        metadata={
            "help": "per_document for --attn_engine flash, shared for flex, none for the other patterns"
        },
    )
    text_column: str = field(default="text", metadata={"help": "of raw_json; a.b looks inside a"})
    source_column: str | None = field(
        default=None, metadata={"help": "names each document's source; a.b looks inside a"}
    )
    packing: Literal["concat", "best_fit"] = field(
        default="concat",
        metadata={"help": "fill rows in order, or cut no document that fits into a row"},
    )
    upsample_long: str | None = field(
        default=None,
        metadata={"help": "FACTOR@TOKENS: longer documents FACTOR times as often in their source"},
    )
    mixture: str | None = field(
        default=None, metadata={"help": "source=weight,...: the sources' shares of the tokens"}
    )
    interleave_chunks: bool = field(
        default=False, metadata={"help": "split short documents and shuffle the chunks (flex only)"}
    )
    domain_tag: bool = field(
        default=False, metadata={"help": "the source's name before every document, not learnt"}
    )
    skip_bad_documents: bool = field(
        default=False, metadata={"help": "leave out bad records; skipped.jsonl lists them"}
    )
    seed: int = field(default=42, metadata={"help": "of the sampling and the shuffling"})
    num_proc: int = field(default=1, metadata={"help": "processes that tokenise"})
    cache_dir: str = field(
        default="~/.cache/anchor_context", metadata={"help": "where prepared rows are kept"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run Python code that comes with the model"}
    )


@dataclass
class InspectFlags:
    """The flags of `inspect`."""

    rows: int = field(default=2, metadata={"help": "rows to show decoded"})
    png: str | None = field(
        default=None, metadata={"help": "where the plot goes; default: inspect.png in PATH"}
    )


def prepare(flags: PrepareFlags) -> None:
    """Prepare the rows, and say where they are."""
    remote = {"trust_remote_code": flags.trust_remote_code}
    config = AutoConfig.from_pretrained(flags.model_name_or_path, **remote)
    prepared = prepare_rows(
        flags.dataset,
        data_format=flags.data_format,
        tokenizer=AutoTokenizer.from_pretrained(flags.model_name_or_path, **remote),
        vocab_size=config.vocab_size,
        row_length=flags.seq_length,
        anchor_placement=flags.anchor_placement,
        cache_dir=Path(flags.cache_dir).expanduser(),
        skip_bad_documents=flags.skip_bad_documents,
        text_column=flags.text_column,
        source_column=flags.source_column,
        strategy=flags.packing,
        upsample_long=flags.upsample_long,
        mixture=flags.mixture,
        interleave_chunks=flags.interleave_chunks,
        domain_tag=flags.domain_tag,
        seed=flags.seed,
        num_proc=flags.num_proc,
    )
    for key, value in prepared.report.items():
        if not isinstance(value, dict):
            print(f"{key:<20} {value:,}" if isinstance(value, int) else f"{key:<20} {value}")
    print("", *source_lines(prepared.report), "", sep="\n")
    print(f"prepared rows: {prepared.directory}")


def inspect(path: str, flags: InspectFlags) -> None:
    """Print what is in a prepared set, and write the plot."""
    from anchor_context.data.inspection import Inspection, describe_row

    prepared = open_rows(path)
    inspection = Inspection.of(prepared)
    print(inspection)
    tokenizer = AutoTokenizer.from_pretrained(prepared.directory / "tokenizer")
    for i in range(min(flags.rows, len(prepared))):
        print(f"\nrow {i}\n{describe_row(prepared.row(i), tokenizer)}")
    png = Path(flags.png) if flags.png else prepared.directory / "inspect.png"
    inspection.plot(png)
    print(f"\nplot: {png}")


def main(arguments: list[str]) -> int:
    """Run a command; 0 for success, 1 for a user's mistake, told without a traceback."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    try:
        if command == "prepare":
            (flags,) = _parser(PrepareFlags, "prepare").parse_args_into_dataclasses(rest)
            prepare(flags)
        elif command == "inspect" and rest and not rest[0].startswith("-"):
            (flags,) = _parser(InspectFlags, "inspect PATH").parse_args_into_dataclasses(rest[1:])
            inspect(rest[0], flags)
        else:
            print(__doc__, file=sys.stderr)
            return 0 if command in ("-h", "--help") else 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser(flags: type, usage: str) -> HfArgumentParser:
    prog = f"python -m anchor_context.data {usage}"
    return HfArgumentParser(flags, prog=prog, allow_abbrev=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
