"""The options of the data, each once: a field has its flag's name, and default, help and choices beside it.

`train.py` and `python -m anchor_context.data prepare` inherit both classes. `prepare_rows` takes a
`DataOptions`, and from it come the fingerprint of prepared rows and the origin that a checkpoint keeps. So
another option is one line here, its name in `fingerprint.LATER`, and the place in `prepare.py` where it acts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from anchor_context.command_line import flag
from anchor_context.data.documents import DATA_FORMATS
from anchor_context.data.packing import STRATEGIES
from anchor_context.data.sampling import Upsampling, parse_mixture


@dataclass(kw_only=True)
class DataFlags:
    """Which data, and how the work of preparing them is done. See `DataOptions` for what becomes of them."""

    heading = "Data"

    dataset: str = flag("", "files, globs, folders, hub names or prepared rows, commas between")
    num_proc: int = flag(1, "processes that tokenise")
    cache_dir: str = flag("~/.cache/anchor_context", "where prepared rows are kept")


@dataclass(kw_only=True)
class DataOptions:
    """What shapes the rows, besides the data and the model: equal ones give equal rows.

    Raises:
        ValueError: a value that cannot be, or an option without another that it needs.
    """

    heading = "Data"

    data_format: str = flag(
        "raw_json", "raw_json: a text per record; tokenized: ids and document ends", DATA_FORMATS
    )
    skip_bad_documents: bool = flag(
        False, "leave out and count bad records; skipped.jsonl has them"
    )
    skip_bad_files: bool = flag(False, "also the rest of a file that breaks off or is none")
    text_column: str = flag("text", "the column of the text; a.b is the key b of the column a")
    parse_special_tokens: bool = flag(False, "take <s>, </s>, … written in a text for the tokens")
    source_column: str | None = flag(None, "the column of the source's name; may be a.b, too")
    seq_length: int = flag(65536, "tokens per row")
    packing: str = flag("concat", "fill rows in order, or cut no document that fits", STRATEGIES)
    upsample_long: str | None = flag(None, "FACTOR@TOKENS: more of each source's longer documents")
    mixture: str | None = flag(None, "source=weight,…: the sources' shares of the tokens")
    interleave_chunks: bool = flag(False, "shuffle the chunks of a row's documents")
    domain_tag: bool = flag(False, "the source's name as text before every document, not learnt")
    eval_documents: int | None = flag(
        None, "hold so many documents out of training, to validate on"
    )
    seed: int = flag(42, "of the sampling, the order of the rows, and everything else random")

    def __post_init__(self):
        for option in fields(DataOptions):
            value, choices = getattr(self, option.name), option.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(
                    f"{flag_of(option.name)} {value} is unknown; choose from {', '.join(choices)}"
                )
        if self.upsample_long is not None:
            Upsampling.parse(self.upsample_long)
        if self.mixture is not None:
            parse_mixture(self.mixture)
        if self.seq_length < 2:
            raise ValueError(
                f"--seq-length {self.seq_length} leaves no room for a target; use 2 or more"
            )
        if not 0 <= self.seed < 1 << 32:  # NumPy's limits
            raise ValueError(f"--seed {self.seed} must be from 0 to {(1 << 32) - 1:,}")
        if self.eval_documents is not None and self.eval_documents < 1:
            raise ValueError(
                f"--eval_documents {self.eval_documents} must be positive, or left out"
            )
        for name in ("mixture", "domain_tag"):
            if getattr(self, name) and self.source_column is None:
                raise ValueError(
                    f"{flag_of(name)} needs --source_column, to know each document's source"
                )

    @property
    def draws(self) -> bool:
        """Whether the seed shapes the rows, and not their order alone."""
        return bool(
            self.upsample_long or self.mixture or self.interleave_chunks or self.eval_documents
        )


def flag_of(option: str) -> str:
    """The flag as messages and checkpoints spell it: two have dashes there, as in upstream's commands."""
    dashed = option in ("data_format", "seq_length")
    return f"--{option.replace('_', '-') if dashed else option}"
