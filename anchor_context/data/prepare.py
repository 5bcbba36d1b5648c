"""Packs documents into rows of fixed length: the preparation from end to end.

`prepare_rows` reads and tokenises the data once into shards (`store`), decides which piece of which
document goes into which row (`packing`), lays the rows, and leaves a prepared set on disk (`rows`).

How a document D of 7 tokens lies in rows of 6, anchors per document (`^`; `·` no target):

    row 0   ^ d0 d1 d2 d3 d4 | d5      the extra token is the target of the row's last
    row 1   ^ d5 d6 _  _  _            the anchor of a continued piece has no target: d5 had its turn
    target  ·  d6 ·  ·  ·  ·

Guarantees: no token is lost; every document token is laid exactly once per copy of its document; the
same data and options give byte-identical rows, whatever the number of processes; a set is prepared
by one process while the others wait, and reused only under the fingerprint of all that shaped it. Whole
rows are opened wherever they can be read.
Costs: the tokenizer's time; disk for the tokens twice until the rows are laid.
"""

from __future__ import annotations

import json
import shutil
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout
from tqdm import tqdm

from anchor_context.attention.patterns import ANCHOR_PLACEMENTS, find_anchor_id
from anchor_context.data import sampling
from anchor_context.data.documents import DocumentReader, token_ids
from anchor_context.data.fingerprint import (
    attempt_name,
    check_fits,
    fingerprint,
    kept_as_text,
    set_name,
)
from anchor_context.data.held_out import HELD_OUT, hold_out, write_held_out
from anchor_context.data.options import DataOptions
from anchor_context.data.packing import RowLayer
from anchor_context.data.rows import (
    DOCUMENT_LENGTHS,
    PreparedRows,
    RowsWriter,
    is_prepared,
    open_rows,
)
from anchor_context.data.sources import check_unchanged, find_inputs, identity, read_portions
from anchor_context.data.store import TokenStore, tokenise
from anchor_context.files import disk_errors, warn

LAYING = "laying"
"""The file in the work on a set that names the rows which are being laid of it."""

SHARE_TOLERANCE = 0.01
"""How far sampling may move a source's share, relative to it, before a warning says so."""


def prepare_rows(
    dataset: list[str] | str,
    options: DataOptions,
    *,
    tokenizer,
    vocab_size: int,
    anchor_placement: str,
    cache_dir: Path | str,
    num_proc: int = 1,
) -> PreparedRows:
    """The data set as rows of `options.seq_length` tokens: prepared now, or opened if that was done before.

    Safe to call from all ranks at once: the first to take the lock prepares, the others wait. A
    preparation that was killed, or stopped by an error, goes on where it was.

    Args:
        dataset: files, globs, folders, `save_to_disk` directories, hub names (`sources.find_inputs`),
            or one prepared set, which options left at their defaults accept as it is.
        options: what shapes the rows; the flags of `train.py` are one.
        tokenizer: the model's transformers tokenizer.
        vocab_size: rows of the model's embedding; larger token ids are refused.
        anchor_placement: "per_document", "shared", or "none" for the patterns without an anchor.
        cache_dir: where prepared sets are kept; `~` is the user's home.
        num_proc: processes that tokenise.

    Raises:
        ValueError: bad data (names file and line), an anchor or EOS outside the vocabulary, no document
            at all, or a prepared set that was made otherwise.
    """
    placements = (*ANCHOR_PLACEMENTS, "none")
    if anchor_placement not in placements:
        raise ValueError(
            f"--anchor_placement {anchor_placement} is unknown; choose from {', '.join(placements)}"
        )
    model = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "anchor_placement": anchor_placement,
    }
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    if len(names) == 1 and is_prepared(Path(names[0])):
        check_fits(open_rows(names[0]).fingerprint, options, path=Path(names[0]), **model)
        return _open(Path(names[0]), options)

    check_special_tokens(tokenizer, options.data_format, vocab_size)
    inputs = find_inputs(names)
    made = fingerprint(options, data=identity(inputs), **model)
    cache_dir = Path(cache_dir).expanduser()
    attempt = cache_dir / attempt_name(made)
    as_wanted = made if options.parse_special_tokens else kept_as_text(made)
    work = cache_dir / f".{attempt_name(as_wanted)}.work"
    lock = FileLock(f"{attempt}.lock")
    if (target := _cached(cache_dir, made, options)) is not None:
        # Whole rows need no lock: it may be another user's, or lie on a disk that is read only.
        with suppress(OSError, Timeout), lock.acquire(timeout=0):
            _clear_up(work, target)
        return _open(target, options)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        held = _acquire(lock)
    except OSError as error:
        raise ValueError(
            f"--cache_dir {cache_dir} holds no rows of these data and options, and cannot be written "
            f"({error.strerror}): name another"
        ) from error
    with disk_errors(attempt, "--cache_dir"), held:
        if (target := _cached(cache_dir, made, options)) is None:
            reader = DocumentReader(
                tokenizer,
                options.data_format,
                vocab_size=vocab_size,
                text_column=options.text_column,
                source_column=options.source_column,
                skip_bad_documents=options.skip_bad_documents,
                skip_bad_files=options.skip_bad_files,
                parse_special_tokens=options.parse_special_tokens,
            )
            # Closed at once, also at an early end: what a library reads ahead must not outlive it.
            with closing(read_portions(inputs, reader.columns)) as portions:
                try:
                    store = tokenise(portions, reader, work, num_proc=num_proc)
                except ValueError:
                    check_unchanged(made["data"])  # then that is the reason
                    raise
            check_unchanged(made["data"])
            if not len(store.lengths):
                documents, files = count_skipped(store)
                raise ValueError(
                    f"--dataset {', '.join(names)[:200]} holds no document"
                    + (f"; {documents} bad records were skipped" if documents else "")
                    + (f"; {files} files broke off" if files else "")
                )
            if store.special_tokens():
                made = as_wanted
            target = cache_dir / set_name(made)
            (work / LAYING).write_text(target.name)
            lay_rows(store, options, work / "rows", target, made, **model)
        _clear_up(work, target)
        return _open(target, options)


QUIET_SECONDS = 5.0
"""How long a preparation waits for another one of the same rows without a word."""


def _acquire(lock: FileLock) -> AcquireReturnProxy:
    try:
        return lock.acquire(timeout=QUIET_SECONDS)
    except Timeout:
        warn(
            f"another process prepares these rows (it holds {lock.lock_file}): waiting for its end"
        )
        return lock.acquire()


def _cached(cache_dir: Path, made: dict, options: DataOptions) -> Path | None:
    """The prepared set of the fingerprint `made` that reads special tokens in texts as `options` say."""
    parsed = cache_dir / set_name(made)
    if options.parse_special_tokens:
        return parsed if is_prepared(parsed) else None
    kept = cache_dir / set_name(kept_as_text(made))
    if is_prepared(kept):
        return kept
    ours = is_prepared(parsed) and not open_rows(parsed).report.get("special_tokens_parsed")
    return parsed if ours else None


def _open(directory: Path, options: DataOptions) -> PreparedRows:
    """Open a set, and say so where nobody counted the special tokens in its texts."""
    prepared = open_rows(directory)
    of_texts = prepared.fingerprint["options"]["data_format"] == "raw_json"
    counted = "special_tokens_parsed" in prepared.report
    if of_texts and not counted and not options.parse_special_tokens:
        warn(
            f"{directory} was prepared by an earlier version, which took special tokens written in texts "
            "(<s> in a page about HTML) for the tokens: remove it to prepare them as text, or pass "
            "--parse_special_tokens if that is wanted"
        )
    return prepared


def check_targets(prepared: PreparedRows) -> None:
    """Raise `ValueError` where the rows hold nothing to learn."""
    if not prepared.report["targets"]:
        raise ValueError(
            f"--dataset: no token of the rows ({prepared.directory}) has a target, for every document is a "
            "single token, and nothing follows it; there is nothing to train on"
        )


def count_skipped(store: TokenStore) -> tuple[int, int]:
    """(records, files) that were left out; a file counts from where it could not be read."""
    rest_of_file = ["rest_of_file" in entry for entry in store.skipped()]
    return rest_of_file.count(False), rest_of_file.count(True)


def _clear_up(work: Path, target: Path) -> None:
    """Remove the work that the rows at `target` came of, now or before a kill."""
    finished, laying = work.with_suffix(".finished"), work / LAYING
    shutil.rmtree(finished, ignore_errors=True)
    if laying.exists() and laying.read_text() == target.name:
        work.rename(finished)  # first, or a kill would leave half of it for work to go on with
        shutil.rmtree(finished)


def check_special_tokens(tokenizer, data_format: str, vocab_size: int) -> None:
    """Raise `ValueError` if the tokenizer lacks the anchor or the EOS, or the model an embedding of them."""
    tokens = [find_anchor_id(tokenizer)]
    if data_format == "raw_json":
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token to end a document with; set its eos_token"
            )
        tokens.append(tokenizer.eos_token_id)
    for token in tokens:
        if token >= vocab_size:
            raise ValueError(
                f"the tokenizer's {tokenizer.convert_ids_to_tokens(token)} has the id {token}, outside the "
                f"model's vocabulary of {vocab_size}: the tokenizer belongs to another model, or was "
                "extended; resize the model's embedding, or set bos_token and eos_token to tokens inside"
            )


def lay_rows(
    store: TokenStore,
    options: DataOptions,
    unfinished: Path,
    target: Path,
    made: dict,
    *,
    tokenizer,
    vocab_size: int,
    anchor_placement: str,
) -> None:
    """Lay all rows of the store's documents in `unfinished`, and leave them at `target`.

    Args:
        made: the fingerprint of the rows.
    """
    for leftover in (unfinished, target):  # of a preparation that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    anchor_id, pad_id = find_anchor_id(tokenizer), tokenizer.pad_token_id
    if pad_id is None or pad_id >= vocab_size:  # a `[PAD]` added without an embedding
        pad_id = anchor_id
    held_out = hold_out(store, documents=options.eval_documents or 0, seed=options.seed)
    order = _laying_order(store, held_out.rest, options)
    shares = _source_shares(store, held_out.rest, order)
    _warn_of_moved_shares(shares, options)
    layer = RowLayer(
        row_length=options.seq_length,
        anchor_placement=anchor_placement,
        anchor_id=anchor_id,
        pad_id=pad_id,
        interleave_seed=options.seed if options.interleave_chunks else None,
    )
    writer = RowsWriter(unfinished, options.seq_length)
    tags = None
    if options.domain_tag:
        names = token_ids(tokenizer, store.sources, parse=options.parse_special_tokens)
        tags = [np.asarray(ids, np.int32) for ids in names]
    rows = layer.rows(store.documents(order), strategy=options.packing, tags=tags)
    for row in tqdm(rows, unit=" rows", disable=None):
        writer.append(row)
    if not writer.rows:
        raise ValueError("the documents are nothing but anchors; there is nothing to train on")

    skipped_documents, skipped_files = count_skipped(store)
    written = store.special_tokens()
    report = {
        "documents": len(order),
        "documents_read": len(store.lengths),
        "documents_left_out": len(held_out.rest) - len(np.unique(order)),
        "documents_cut": layer.documents_cut,
        "document_tokens": layer.document_tokens,
        "rows": writer.rows,
        "anchors_added": layer.anchors_added,
        "pad_tokens": writer.pad_tokens,
        "skipped_documents": skipped_documents,
        "skipped_files": skipped_files,
        "special_tokens_as_text": 0 if options.parse_special_tokens else written,
        "special_tokens_parsed": written if options.parse_special_tokens else 0,
        "targets": writer.targets,
        "row_length": options.seq_length,
        "anchor_placement": anchor_placement,
        "strategy": options.packing,
        "anchors_merged": layer.anchors_merged,
        "tag_tokens": layer.tag_tokens,
        "sources": dict(zip(store.sources, _tokens_per_source(store, order).tolist(), strict=True)),
        "source_shares": shares,
    }
    if options.eval_documents:
        report |= {
            "held_out_documents": len(held_out.documents),
            "held_out_tokens": int(store.lengths[held_out.documents].sum(dtype=np.int64)),
            "held_out_copies": len(held_out.copies),
        }
        path = unfinished / HELD_OUT
        write_held_out(path, store, held_out.documents, source=options.source_column)
    laid = report["document_tokens"] + report["anchors_added"] + report["pad_tokens"]
    assert laid == writer.rows * options.seq_length, report
    read = int(store.lengths[order].sum(dtype=np.int64))
    assert layer.document_tokens + layer.anchors_merged == read + layer.tag_tokens, report
    with (unfinished / "skipped.jsonl").open("w") as file:
        for entry in store.skipped():
            file.write(json.dumps(entry) + "\n")
    np.save(unfinished / DOCUMENT_LENGTHS, store.lengths[order])
    tokenizer.save_pretrained(unfinished / "tokenizer")
    writer.finish(target, {"report": report, "pad_id": pad_id, "fingerprint": made})


def _laying_order(store: TokenStore, documents: np.ndarray, options: DataOptions) -> np.ndarray:
    """The numbers of the documents to lay, in order, out of `documents`."""
    if options.upsample_long is None and options.mixture is None:
        return documents
    times = sampling.copies(
        store.lengths[documents],
        store.source_ids[documents],
        store.sources,
        upsampling=options.upsample_long and sampling.Upsampling.parse(options.upsample_long),
        mixture=options.mixture and sampling.parse_mixture(options.mixture),
        seed=options.seed,
    )
    return documents[sampling.laying_order(times)]


def _tokens_per_source(store: TokenStore, order: np.ndarray) -> np.ndarray:
    """(sources,) int64: tokens of these documents; as read, without anchors and tags."""
    count = len(store.sources)
    tokens = np.bincount(store.source_ids[order], weights=store.lengths[order], minlength=count)
    return tokens.astype(np.int64)


def _source_shares(
    store: TokenStore, documents: np.ndarray, order: np.ndarray
) -> dict[str, dict[str, float]]:
    """Each source's share of the tokens: of `documents`, `before` sampling, and of `order`, `after`."""
    before, after = (
        (tokens / tokens.sum()).tolist()
        for tokens in (
            _tokens_per_source(store, documents),
            _tokens_per_source(store, order),
        )
    )
    return {name: {"before": before[i], "after": after[i]} for i, name in enumerate(store.sources)}


def _warn_of_moved_shares(shares: dict[str, dict[str, float]], options: DataOptions) -> None:
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
        warn(message)
