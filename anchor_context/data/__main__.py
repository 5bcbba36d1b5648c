"""Prepare rows without training, and look into them.

    python -m anchor_context.data prepare --dataset 'data/*.jsonl' --model_name_or_path MODEL
    python -m anchor_context.data inspect PATH

One machine prepares, many train: give `train.py` the same flags and the same `--cache_dir`, or the path
that `prepare` prints as its `--dataset`.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import AutoConfig, AutoTokenizer

from anchor_context.command_line import FlagParser, model_errors, one_line_errors
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


def prepare(flags: Namespace) -> None:
    """Prepare the rows by the fields of `PrepareFlags`, and say where they are."""
    remote = {"trust_remote_code": flags.trust_remote_code}
    with model_errors(flags.model_name_or_path, "--model_name_or_path"):
        config = AutoConfig.from_pretrained(flags.model_name_or_path, **remote)
        tokenizer = AutoTokenizer.from_pretrained(flags.model_name_or_path, **remote)
    prepared = prepare_rows(
        flags.dataset,
        data_format=flags.data_format,
        tokenizer=tokenizer,
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


def inspect(flags: Namespace) -> None:
    """Print what is in the prepared set `path`, `rows` of it decoded, and write the plot to `png`."""
    from anchor_context.data.inspection import Inspection, describe_row

    prepared = open_rows(flags.path)
    inspection = Inspection.of(prepared)
    print(inspection)
    tokenizer = AutoTokenizer.from_pretrained(prepared.directory / "tokenizer")
    for i in range(min(flags.rows, len(prepared))):
        print(f"\nrow {i}\n{describe_row(prepared.row(i), tokenizer)}")
    png = Path(flags.png) if flags.png else prepared.directory / "inspect.png"
    inspection.plot(png)
    print(f"\nplot: {png}")


def main(arguments: list[str] | None = None) -> None:
    """Run a command.

    Raises:
        ValueError: what the user did wrong.
    """
    parser = FlagParser(prog="python -m anchor_context.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", flags=PrepareFlags, help="make rows of a data set")
    add = commands.add_parser("inspect", help="look into prepared rows").add_argument
    add("path", help="the folder that `prepare` printed")
    add("--rows", type=int, default=2, help="rows to show decoded")
    add("--png", help="where the plot goes; default: inspect.png in the folder")
    flags = parser.parse_args(arguments)
    {"prepare": prepare, "inspect": inspect}[flags.command](flags)


if __name__ == "__main__":
    with one_line_errors():
        main()
