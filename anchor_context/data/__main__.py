"""Prepare rows without training, and look into them; collect long text that this machine has.

    python -m anchor_context.data prepare --dataset 'data/*.jsonl' --model_name_or_path MODEL
    python -m anchor_context.data inspect PATH
    python -m anchor_context.data collect FOLDER

One machine prepares, many train: give `train.py` the same flags and the same `--cache_dir`, or the path
that `prepare` prints as its `--dataset`.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from anchor_context.attention.patterns import ANCHOR_PLACEMENTS, PATTERNS
from anchor_context.command_line import FlagParser, flag, model_errors, one_line_errors
from anchor_context.data.inspection import Inspection, describe_row, source_lines
from anchor_context.data.options import DataFlags, DataOptions
from anchor_context.data.prepare import check_targets, prepare_rows
from anchor_context.data.ranks import describe_ways, ways_to_share
from anchor_context.data.rows import open_rows
from anchor_context.data.texts import collect_texts, describe_collected
from anchor_context.data.tokenizer import load_tokenizer


@dataclass(kw_only=True)
class PrepareFlags(DataOptions, DataFlags):
    """The flags of `prepare`: those of train.py that shape the rows."""

    heading = "Model"

    dataset: list[str] = flag(help="files, globs, folders, save_to_disk directories or hub names")
    model_name_or_path: str = flag(help="the model whose tokenizer and vocabulary count")
    trust_remote_code: bool = flag(False, "run Python code that comes with the model")
    anchor_placement: str = flag(
        "per_document",
        "per_document for --attn_engine flash, shared for flex, none for the patterns without anchors",
        (*ANCHOR_PLACEMENTS, "none"),
    )


def prepare(given: Namespace) -> None:
    """Prepare the rows by the fields of `PrepareFlags`, and say where they are."""
    flags = PrepareFlags(**{f.name: getattr(given, f.name) for f in fields(PrepareFlags)})
    remote = {"trust_remote_code": flags.trust_remote_code}
    with model_errors(flags.model_name_or_path, "--model_name_or_path"):
        config = AutoConfig.from_pretrained(flags.model_name_or_path, **remote)
        tokenizer = load_tokenizer(flags.model_name_or_path, **remote)
    prepared = prepare_rows(
        flags.dataset,
        flags,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        anchor_placement=flags.anchor_placement,
        cache_dir=flags.cache_dir,
        num_proc=flags.num_proc,
    )
    for key, value in prepared.report.items():
        if not isinstance(value, dict):
            print(f"{key:<20} {value:,}" if isinstance(value, int) else f"{key:<20} {value}")
    print("", *source_lines(prepared.report), "", sep="\n")
    print(f"prepared rows: {prepared.directory}")
    check_targets(prepared)


def inspect(flags: Namespace) -> None:
    """Print what is in the prepared set `path`, how it would lie on `ranks`, `rows` of it decoded, and write
    the plot to `png`."""
    for name in ("ranks", "rows_per_rank", "micro_batch_tokens"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise ValueError(f"--{name} {getattr(flags, name)} must be at least 1")
    prepared = open_rows(flags.path)
    inspection = Inspection.of(prepared)
    print(inspection)
    if flags.ranks is not None:
        anchors = prepared.anchor_placement
        ways = ways_to_share(
            prepared,
            pattern=flags.attention_pattern or ("intra_doc" if anchors == "none" else "anchor"),
            ranks=flags.ranks,
            rows_per_rank=flags.rows_per_rank,
            micro_batch_tokens=flags.micro_batch_tokens,
        )
        print(
            f"\non {flags.ranks} ranks, {flags.rows_per_rank} rows each in a step, longest document "
            f"{prepared.longest_document:,} tokens\n{describe_ways(ways)}"
        )
    tokenizer = AutoTokenizer.from_pretrained(prepared.directory / "tokenizer")
    for i in range(min(flags.rows, len(prepared))):
        print(f"\nrow {i}\n{describe_row(prepared.row(i), tokenizer)}")
    png = Path(flags.png) if flags.png else prepared.directory / "inspect.png"
    inspection.plot(png)
    print(f"\nplot: {png}")


def collect(flags: Namespace) -> None:
    """Write the documents that this machine has into `folder`, and say what was taken."""
    if not 0 < flags.shortest <= flags.longest:
        raise ValueError(
            f"--shortest {flags.shortest} and --longest {flags.longest} leave no document; give 1 or more "
            "characters, the shortest first"
        )
    found = collect_texts(
        Path(flags.folder),
        characters_per_tree=flags.characters_per_tree,
        shortest=flags.shortest,
        longest=flags.longest,
    )
    print(describe_collected(found))


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
    add("--ranks", type=int, help="tell how evenly a step's work would lie on so many")
    add(
        "--rows_per_rank", type=int, default=1, help="with --ranks: rows of a step for each of them"
    )
    add(
        "--micro_batch_tokens", type=int, default=32_768, help="with --ranks: tokens of one forward"
    )
    add(
        "--attention_pattern",
        choices=PATTERNS,
        help="with --ranks; default: what the anchors allow",
    )
    add("--png", help="where the plot goes; default: inspect.png in the folder")
    add = commands.add_parser(
        "collect", help="write long documents of this machine as JSON lines"
    ).add_argument
    add("folder", help="where train.jsonl, held_out.jsonl and packages.csv go")
    add("--characters_per_tree", type=int, default=16_000_000, help="at most so many of each kind")
    add("--shortest", type=int, default=8_000, help="characters of a document")
    add("--longest", type=int, default=2_000_000, help="characters of a document")
    flags = parser.parse_args(arguments)
    {"prepare": prepare, "inspect": inspect, "collect": collect}[flags.command](flags)


if __name__ == "__main__":
    with one_line_errors():
        main()
