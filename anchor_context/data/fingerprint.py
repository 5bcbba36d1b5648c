"""What prepared rows were made of: names a set in the cache, and says which rows a checkpoint counts.

A fingerprint is JSON: the format of the rows, what every input file is, a hash of the tokenizer, and the
options with the model's vocabulary and the anchor placement. It stands in the set's manifest.

Guarantees: equal fingerprints, equal rows, byte for byte. Caches and checkpoints of earlier versions are
found and resumed as long as `FORMAT_VERSION` stays.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import fields, replace
from pathlib import Path

from anchor_context.data.options import DataOptions, flag_of
from anchor_context.data.rows import FORMAT_VERSION

KEPT_AS = {"seq_length": "row_length", "packing": "strategy"}
"""Two options have another name in fingerprints than as flags: the names of all cached sets hang on it."""

LATER = ("skip_bad_files", "eval_documents")
"""Options that came later: at their defaults they are no part of a fingerprint, as they were not then."""

FREE = ("seq_length", "seed", "skip_bad_documents", "skip_bad_files")
"""Of a prepared set that is named as the data, the row length is compared with the others that every run
needs. The seed is not: it orders the rows of training, too. Nor is skipping: nothing bad is left."""


LAYING = ("packing", "interleave_chunks", "domain_tag", "source_column")
"""What says how documents lie in rows, besides the row length and the anchors."""


def fingerprint(
    options: DataOptions, *, data: list[dict], tokenizer, vocab_size: int, anchor_placement: str
) -> dict:
    """The fingerprint of rows that are to be made.

    Args:
        data: what each file is, from `sources.identity`.
    """
    made = {
        option.name: getattr(options, option.name)
        for option in fields(DataOptions)
        if option.name not in LATER or getattr(options, option.name) != option.default
    }
    # Where nothing is drawn, another seed must not prepare everything again.
    made["seed"] = options.seed if options.draws else 0
    del made["parse_special_tokens"]  # it shapes the rows where texts hold some: `kept_as_text`
    length = made.pop("seq_length")
    made = {"seq_length": length, "anchor_placement": anchor_placement} | made
    return {
        "format_version": FORMAT_VERSION,
        "data": data,
        "tokenizer": tokenizer_hash(tokenizer),
        "options": {
            "vocab_size": vocab_size,
            **{KEPT_AS.get(name, name): value for name, value in made.items()},
        },
    }


def kept_as_text(made: dict) -> dict:
    """The fingerprint of rows of texts in which special tokens were written, and were text.

    `made` itself is that of rows in which they were parsed, as always once, or of texts that hold none.
    """
    return made | {"options": made["options"] | {"parse_special_tokens": False}}


def set_name(made: dict) -> str:
    """The name in the cache of the set with the fingerprint `made`."""
    return f"rows-{made['options']['row_length']}-{_digest(made)}"


def attempt_name(made: dict) -> str:
    """The name of the work on a set: the same when it is tried again after an error and its remedy.

    So what was tokenised before the error, in shards of records that did not change, is found again.
    """
    remedies = ("skip_bad_documents", "skip_bad_files", "mixture")
    attempt = made | {
        "data": [entry.get("path") or entry["hub"] for entry in made["data"]],
        "options": {k: v for k, v in made["options"].items() if k not in remedies},
    }
    return f"rows-{made['options']['row_length']}-{_digest(attempt)}"


def _digest(description: dict) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def origin(made: dict) -> dict[str, object]:
    """What shaped the rows with the fingerprint `made`, by the flag that decides it: equal ones, equal rows.

    Unlike the fingerprint, it is the same for data that were moved or touched. And it leaves out
    what was to be skipped: data that could be prepared without it give the same rows with it.
    """
    options = _by_option(made["options"])
    for name in ("skip_bad_documents", "skip_bad_files"):
        options.pop(name, None)
    vocab_size, seed = options.pop("vocab_size"), options.pop("seed")
    data = [{k: v for k, v in d.items() if k not in ("path", "mtime_ns")} for d in made["data"]]
    return {
        "--model_name_or_path (its vocabulary)": vocab_size,
        **{flag_of(name): value for name, value in options.items()},
        "--seed (of the preparation)": seed,
        "--dataset (its content)": hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12],
        "--model_name_or_path (its tokenizer)": made["tokenizer"][:12],
        "the format of prepared rows": made["format_version"],
    }


def check_fits(
    made: dict,
    options: DataOptions,
    *,
    path: Path,
    tokenizer,
    vocab_size: int,
    anchor_placement: str,
) -> None:
    """Raise `ValueError` unless the set at `path`, with the fingerprint `made`, is what this run needs.

    Options left at their defaults ask for nothing.
    """
    have = {"parse_special_tokens": True} | _by_option(made["options"])  # as `kept_as_text` says
    needed = [
        ("--seq-length", have["seq_length"], options.seq_length),
        ("--anchor_placement", have["anchor_placement"], anchor_placement),
        ("the tokenizer", made["tokenizer"], tokenizer_hash(tokenizer)),
        ("the vocabulary", have["vocab_size"], vocab_size),
    ]
    asked = [
        (flag_of(option.name), have.get(option.name, option.default), getattr(options, option.name))
        for option in fields(DataOptions)
        if option.name not in FREE and getattr(options, option.name) != option.default
    ]
    for entry in needed + asked:
        flag, there, here = entry
        if here != there:
            raise ValueError(
                f"{path} was prepared for another run: {flag} is {here} here and {there} there; "
                + ("leave the flag out, or " if entry in asked else "")
                + "prepare it again, or run with what it was prepared for"
            )


def laid_as(made: dict, options: DataOptions) -> DataOptions:
    """`options` for more rows, which lie as those with the fingerprint `made` do: options left at their
    defaults may be silent on that."""
    have = _by_option(made["options"])
    return replace(options, **{name: have[name] for name in LAYING})


def _by_option(kept: dict[str, object]) -> dict[str, object]:
    """The options of a fingerprint, by their own names."""
    own = {name: option for option, name in KEPT_AS.items()}
    return {own.get(name, name): value for name, value in kept.items()}


def tokenizer_hash(tokenizer) -> str:
    """A hash of everything that decides which tokens a text becomes; not of the tokenizer's name."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for setting in ("truncation", "padding"):  # of the last call
            del state[setting]
    else:
        with tempfile.TemporaryDirectory() as directory:
            tokenizer.save_pretrained(directory)
            files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
            state = [(path.name, path.read_bytes().hex()) for path in files]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    settings = [state, special, tokenizer.split_special_tokens]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()
