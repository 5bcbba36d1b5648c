"""Packs documents into rows of fixed length: the preparation from end to end.

`prepare_rows` reads and tokenises the data once into shards (`store`), decides which piece of which
document goes into which row (`strategies`), lays the rows, and leaves a prepared set on disk (`rows`).

How a document D of 7 tokens lies in rows of 6, anchors per document (`^`; `·` no target):

    row 0   ^ d0 d1 d2 d3 d4 | d5      the extra token is the target of the row's last
    row 1   ^ d5 d6 _  _  _            the anchor of a continued piece has no target: d5 had its turn
    target  ·  d6 ·  ·  ·  ·

Guarantees: no token is lost; every document token is laid exactly once per copy of its document; the
same data and options give byte-identical rows, whatever the number of processes; a set is prepared
by one process while the others wait, and reused only under the fingerprint of all that shaped it.
Costs: the tokenizer's time; disk for the tokens twice until the rows are laid.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from filelock import FileLock
from termcolor import colored
from tqdm import tqdm

from anchor_context.attention.patterns import ANCHOR_PLACEMENTS
from anchor_context.data import sampling, strategies
from anchor_context.data.documents import DATA_FORMATS, DocumentReader
from anchor_context.data.interleaving import interleave
from anchor_context.data.rows import (
    DOCUMENT_LENGTHS,
    FORMAT_VERSION,
    NO_TOKEN,
    PreparedRows,
    Row,
    RowsWriter,
    is_prepared,
    open_rows,
)
from anchor_context.data.sources import find_inputs, identity, read_units
from anchor_context.data.store import TokenStore, tokenise
from anchor_context.data.strategies import STRATEGIES, Body, Piece

__all__ = ["PreparedRows", "open_rows", "prepare_rows"]

SHARE_TOLERANCE = 0.01
"""How far sampling may move a source's share, relative to it, before a warning says so."""


@dataclass(frozen=True)
class Options:
    """Everything but the data and the tokenizer that shapes the rows."""

    vocab_size: int
    row_length: int
    anchor_placement: str
    data_format: str = "raw_json"
    skip_bad_documents: bool = False
    text_column: str = "text"
    source_column: str | None = None
    strategy: str = "concat"
    upsample_long: str | None = None
    mixture: str | None = None
    interleave_chunks: bool = False
    domain_tag: bool = False
    seed: int = 0

    def __post_init__(self):
        placements = (*ANCHOR_PLACEMENTS, "none")
        for flag, value, choices in (
            ("--data-format", self.data_format, DATA_FORMATS),
            ("--anchor_placement", self.anchor_placement, placements),
            ("--packing", self.strategy, STRATEGIES),
        ):
            if value not in choices:
                raise ValueError(f"{flag} {value} is unknown; choose from {', '.join(choices)}")
        if self.upsample_long is not None:
            sampling.Upsampling.parse(self.upsample_long)
        if self.mixture is not None:
            sampling.parse_mixture(self.mixture)
        if self.row_length < 2:
            raise ValueError(
                f"--seq-length {self.row_length} leaves no room for a target; use 2 or more"
            )
        for flag, needed in (
            ("--mixture", self.mixture),
            ("--domain_tag", self.domain_tag),
        ):
            if needed and self.source_column is None:
                raise ValueError(f"{flag} needs --source_column, to know each document's source")


SHAPING_FLAGS = {
    "--data-format": "data_format",
    "--text_column": "text_column",
    "--source_column": "source_column",
    "--packing": "strategy",
    "--upsample_long": "upsample_long",
    "--mixture": "mixture",
    "--interleave_chunks": "interleave_chunks",
    "--domain_tag": "domain_tag",
}
"""What a prepared set that is named as the data must have been made with, if it is asked for. Not the seed,
which orders the rows of training too, nor `--skip_bad_documents`: no bad record is left to skip."""


def prepare_rows(
    dataset: list[str] | str,
    *,
    data_format: str,
    tokenizer,
    vocab_size: int,
    row_length: int,
    anchor_placement: str,
    cache_dir: Path,
    skip_bad_documents: bool = False,
    text_column: str = "text",
    source_column: str | None = None,
    strategy: str = "concat",
    upsample_long: str | None = None,
    mixture: str | None = None,
    interleave_chunks: bool = False,
    domain_tag: bool = False,
    seed: int = 0,
    num_proc: int = 1,
) -> PreparedRows:
    """The data set as rows of `row_length` tokens: prepared now, or opened if that was done before.

    Safe to call from all ranks at once: the first to take the lock prepares, the others wait. A
    preparation that was killed, or stopped by an error, goes on where it was.

    Args:
        dataset: files, globs, folders, `save_to_disk` directories, hub names (`sources.find_inputs`),
            or one prepared set, which options left at their defaults accept as it is.
        data_format: "raw_json" (a text per record) or "tokenized" (`input_ids` and `source` ends).
        tokenizer: the model's transformers tokenizer.
        vocab_size: rows of the model's embedding; larger token ids are refused.
        anchor_placement: "per_document", "shared", or "none" for the patterns without an anchor.
        cache_dir: where prepared sets are kept.
        text_column, source_column: columns; `a.b` is the key `b` of the column `a`. In `tokenized` data
            the source is looked up in each entry of `source`.
        strategy: "concat" or "best_fit" (`strategies`).
        upsample_long: "FACTOR@TOKENS"; see `sampling.copies`.
        mixture: "source=weight,..."; see `sampling.copies`.
        interleave_chunks: split short documents and shuffle the chunks in each row.
        domain_tag: put the source's name in front of every document, without targets on it.
        seed: of the sampling and the shuffling.
        num_proc: processes that tokenise.

    Raises:
        ValueError: bad data (names file and line), a bad option, an anchor or EOS outside the
            vocabulary, no document at all.
    """
    options = Options(
        data_format=data_format,
        vocab_size=vocab_size,
        row_length=row_length,
        anchor_placement=anchor_placement,
        skip_bad_documents=skip_bad_documents,
        text_column=text_column,
        source_column=source_column,
        strategy=strategy,
        upsample_long=upsample_long,
        mixture=mixture,
        interleave_chunks=interleave_chunks,
        domain_tag=domain_tag,
        # Where nothing is drawn, another seed must not prepare everything again.
        seed=seed if upsample_long or mixture or interleave_chunks else 0,
    )
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    if len(names) == 1 and is_prepared(Path(names[0])):
        return _open_given(Path(names[0]), options, tokenizer)

    anchor_id = find_anchor_id(tokenizer)
    if data_format == "raw_json" and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token to end a document with; set its eos_token")
    for token in (anchor_id, tokenizer.eos_token_id if data_format == "raw_json" else anchor_id):
        if token >= vocab_size:
            raise ValueError(
                f"the tokenizer's {tokenizer.convert_ids_to_tokens(token)} has the id {token}, outside the "
                f"model's vocabulary of {vocab_size}: the tokenizer belongs to another model, or was "
                "extended; resize the model's embedding, or set bos_token and eos_token to tokens inside"
            )
    inputs = find_inputs(names)
    fingerprint = {
        "format_version": FORMAT_VERSION,
        "data": identity(inputs),
        "tokenizer": tokenizer_hash(tokenizer),
        "options": asdict(options),
    }
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    target = cache_dir / f"rows-{row_length}-{_digest(fingerprint)}"
    attempt = cache_dir / f"rows-{row_length}-{_digest(_attempt(fingerprint))}"

    with FileLock(f"{attempt}.lock"):
        work = cache_dir / f".{attempt.name}.work"
        finished = work.with_suffix(".finished")
        laying = work / "laying"  # names the rows that come of this work
        if is_prepared(target):
            if laying.exists() and laying.read_text() == target.name:  # a kill left it behind
                work.rename(finished)
            shutil.rmtree(finished, ignore_errors=True)
            return open_rows(target)
        reader = DocumentReader(
            tokenizer, data_format, vocab_size, text_column, source_column, skip_bad_documents
        )
        store = tokenise(read_units(inputs, reader.columns), reader, work, num_proc=num_proc)
        if not len(store.lengths):
            raise ValueError(
                f"--dataset {', '.join(names)[:200]} holds no document"
                + (
                    f"; {store.skipped_count} bad records were skipped"
                    if store.skipped_count
                    else ""
                )
            )
        laying.write_text(target.name)
        lay_rows(store, work / "rows", target, options, tokenizer, anchor_id, fingerprint)
        shutil.rmtree(finished, ignore_errors=True)
        work.rename(finished)  # first, or a kill would leave half of it for work to go on with
        shutil.rmtree(finished)
        return open_rows(target)


def _digest(description: dict) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def _attempt(fingerprint: dict) -> dict:
    """What stays when a preparation that an error stopped is tried again, the error's remedy applied.

    Its work folder goes by this: shards of records that did not change are there already.
    """
    options = fingerprint["options"]
    return fingerprint | {
        "data": [entry.get("path") or entry["hub"] for entry in fingerprint["data"]],
        "options": {k: options[k] for k in options if k not in ("skip_bad_documents", "mixture")},
    }


def find_anchor_id(tokenizer) -> int:
    """The anchor token: BOS, or EOS where the tokenizer has no BOS, as Qwen's."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        "the tokenizer has neither BOS nor EOS to serve as the anchor; set its eos_token"
    )


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


def _open_given(path: Path, options: Options, tokenizer) -> PreparedRows:
    """A prepared set that was named as the data: it must be what this run needs."""
    prepared = open_rows(path)
    made = prepared.manifest["fingerprint"]
    needed = [
        ("--seq-length", prepared.row_length, options.row_length),
        ("--anchor_placement", prepared.anchor_placement, options.anchor_placement),
        ("the tokenizer", made["tokenizer"], tokenizer_hash(tokenizer)),
        ("the vocabulary", made["options"]["vocab_size"], options.vocab_size),
    ]
    default = {option.name: option.default for option in fields(Options)}
    for flag, name in SHAPING_FLAGS.items():
        if (want := getattr(options, name)) != default[name]:
            needed.append((flag, made["options"][name], want))
    for flag, have, want in needed:
        if have != want:
            raise ValueError(
                f"{path} was prepared for another run: {flag} is {want} here and {have} there; "
                + ("leave the flag out, or " if flag in SHAPING_FLAGS else "")
                + "prepare it again, or run with what it was prepared for"
            )
    return prepared


def lay_rows(
    store: TokenStore,
    unfinished: Path,
    target: Path,
    options: Options,
    tokenizer,
    anchor_id: int,
    fingerprint: dict,
) -> None:
    """Lay all rows of the store's documents and leave them at `target`."""
    for leftover in (unfinished, target):  # of a preparation that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    length, placement = options.row_length, options.anchor_placement
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id >= options.vocab_size:  # a `[PAD]` added without an embedding
        pad_id = anchor_id
    order = _laying_order(store, options)
    shares = _source_shares(store, order)
    _warn_of_moved_shares(shares, options)
    layer = _RowLayer(options, anchor_id, pad_id)
    writer = RowsWriter(unfinished, length)
    pack = {"concat": strategies.concat, "best_fit": strategies.best_fit}[options.strategy]
    rows = pack(
        layer.bodies(store, order, _tags(store.sources, tokenizer) if options.domain_tag else None),
        room=length - (placement == "shared"),
        anchor=int(placement == "per_document"),
    )
    for pieces in tqdm(rows, unit=" rows", disable=None):
        writer.append(layer.lay(pieces))
    if not writer.rows:
        raise ValueError("the documents are nothing but anchors; there is nothing to train on")

    report = {
        "documents": len(order),
        "documents_read": len(store.lengths),
        "documents_left_out": len(store.lengths) - len(np.unique(order)),
        "documents_cut": layer.documents_cut,
        "document_tokens": layer.document_tokens,
        "rows": writer.rows,
        "anchors_added": layer.anchors_added,
        "pad_tokens": writer.pad_tokens,
        "skipped_documents": store.skipped_count,
        "targets": writer.targets,
        "row_length": length,
        "anchor_placement": placement,
        "strategy": options.strategy,
        "anchors_merged": layer.anchors_merged,
        "tag_tokens": layer.tag_tokens,
        "sources": dict(zip(store.sources, _tokens_per_source(store, order).tolist(), strict=True)),
        "source_shares": shares,
    }
    laid = report["document_tokens"] + report["anchors_added"] + report["pad_tokens"]
    assert laid == writer.rows * length, report
    read = int(store.lengths[order].sum(dtype=np.int64))
    assert layer.document_tokens + layer.anchors_merged == read + layer.tag_tokens, report
    with (unfinished / "skipped.jsonl").open("w") as file:
        for entry in store.skipped():
            file.write(json.dumps(entry) + "\n")
    np.save(unfinished / DOCUMENT_LENGTHS, store.lengths[order])
    tokenizer.save_pretrained(unfinished / "tokenizer")
    writer.finish(target, {"report": report, "pad_id": pad_id, "fingerprint": fingerprint})


def _laying_order(store: TokenStore, options: Options) -> np.ndarray:
    """The numbers of the documents to lay, in order."""
    if options.upsample_long is None and options.mixture is None:
        return np.arange(len(store.lengths))
    times = sampling.copies(
        store.lengths,
        store.source_ids,
        store.sources,
        upsampling=options.upsample_long and sampling.Upsampling.parse(options.upsample_long),
        mixture=options.mixture and sampling.parse_mixture(options.mixture),
        seed=options.seed,
    )
    return sampling.laying_order(times)


def _tokens_per_source(store: TokenStore, order: np.ndarray) -> np.ndarray:
    """(sources,) int64: tokens of these documents; as read, without anchors and tags."""
    count = len(store.sources)
    tokens = np.bincount(store.source_ids[order], weights=store.lengths[order], minlength=count)
    return tokens.astype(np.int64)


def _source_shares(store: TokenStore, order: np.ndarray) -> dict[str, dict[str, float]]:
    """Each source's share of the tokens, `before` sampling and `after`."""
    before, after = (
        (tokens / tokens.sum()).tolist()
        for tokens in (
            _tokens_per_source(store, np.arange(len(store.lengths))),
            _tokens_per_source(store, order),
        )
    )
    return {name: {"before": before[i], "after": after[i]} for i, name in enumerate(store.sources)}


def _warn_of_moved_shares(shares: dict[str, dict[str, float]], options: Options) -> None:
    """Say where sampling missed a source's share: documents are laid whole, and some are huge."""
    if options.mixture is None:
        wanted = {name: share["before"] for name, share in shares.items()}
    else:
        wanted = sampling.parse_mixture(options.mixture)
    off = {name: abs(shares[name]["after"] - wanted[name]) for name in wanted}
    moved = [name for name in off if off[name] > SHARE_TOLERANCE * wanted[name]]
    if moved:
        worst = max(moved, key=off.get)
        message = (
            f"sampling moved the share of {len(moved)} of {len(shares)} sources by more than "
            f"{SHARE_TOLERANCE:.0%}: {worst} has {shares[worst]['after']:.1%} of the tokens instead of "
            f"{wanted[worst]:.1%}; its documents are too few or too long to be sampled finer"
        )
        print(colored(message, "yellow"), file=sys.stderr, flush=True)


def _tags(sources: list[str], tokenizer) -> list[np.ndarray]:
    """Each source's name as tokens."""
    encoded = tokenizer(sources, add_special_tokens=False)["input_ids"]
    return [np.asarray(ids, np.int32) for ids in encoded]


class _RowLayer:
    """Turns documents into bodies and lists of pieces into rows, and keeps the account."""

    def __init__(self, options: Options, anchor_id: int, pad_id: int):
        self.options, self.anchor_id, self.pad_id = options, anchor_id, pad_id
        self.document_tokens = 0
        """Tokens of documents in the rows, anchors that they brought and tags included."""
        self.anchors_added = 0
        self.anchors_merged = 0
        """Anchors that documents brought, for which the row's shared one stands."""
        self.documents_cut = 0
        self.tag_tokens = 0
        self._rows = 0

    def bodies(
        self, store: TokenStore, order: np.ndarray, tags: list[np.ndarray] | None
    ) -> Iterator[Body]:
        placement = self.options.anchor_placement
        for block in store.blocks(order):
            own = (block.tokens[block.starts] == self.anchor_id) & (placement != "none")
            starts = block.starts + own
            for start, stop, brought, source in zip(
                starts.tolist(), block.stops.tolist(), own.tolist(), block.source_ids, strict=True
            ):
                self.anchors_merged += brought and placement == "shared"
                tokens = block.tokens[start:stop]
                if tags is None:
                    # A copy: a slice that waits for its row would hold its shard's file open.
                    yield Body(tokens.copy(), 0, brought)
                else:
                    tag = tags[source]
                    yield Body(np.concatenate([tag, tokens]), len(tag), brought)

    def lay(self, pieces: list[Piece]) -> Row:
        """One row of the pieces, padded at its end."""
        length, placement = self.options.row_length, self.options.anchor_placement
        tokens = np.full(length + 1, self.pad_id, np.int32)
        starts, untargeted, at = [], [], 0
        if placement == "shared":
            tokens[0] = self.anchor_id
            starts, untargeted, at = [0], [0], 1
            self.anchors_added += 1
        for body, start, stop, first in pieces:
            starts.append(at)
            if placement == "per_document":
                tokens[at] = self.anchor_id
                at += 1
                # The piece before this one predicted its first token already.
                untargeted.append(max(body.tag - start, int(not first)))
                own = int(first and body.own_anchor)
                self.anchors_added += 1 - own
                self.document_tokens += own
            else:
                untargeted.append(max(body.tag - start - 1, 0))
            tokens[at : at + stop - start] = body.tokens[start:stop]
            at += stop - start
            self.document_tokens += stop - start
            self.tag_tokens += max(0, min(stop, body.tag) - start)
        last = pieces[-1]
        self.documents_cut += last.first and last.goes_on
        tokens[length] = last.body.tokens[last.stop] if last.goes_on else NO_TOKEN
        pad_count = length - at
        if pad_count:
            starts.append(at)
            untargeted.append(0)
        row = Row(
            tokens=tokens,
            starts=np.array(starts, np.int32),
            untargeted=np.minimum(untargeted, np.diff([*starts, length])).astype(np.int32),
            documents=np.arange(len(starts), dtype=np.int32),
            pad_count=pad_count,
        )
        self._rows += 1
        if self.options.interleave_chunks:
            rng = np.random.default_rng((self.options.seed, self._rows))
            row = interleave(row, rng, goes_on=last.goes_on, shared=placement == "shared")
        return row
