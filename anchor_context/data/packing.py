"""Packs documents end to end into rows of fixed length, once, onto disk.

Guarantees: no token is lost. Every token of every document lands in exactly one row, and is a target
exactly once (a document's first token is one where an anchor stands before it). The account closes:
document_tokens + anchors_added + pad_tokens = rows × row length. Rows on disk are complete or absent:
they are written under a temporary name and renamed, by one process while the others wait, in a folder
named by a fingerprint of everything that shapes them.
Costs: one pass over the data; afterwards rows are memory-mapped, so that a run starts at once.

How a document D of 7 tokens lies in rows of 6, anchors per document (`^`; `·` no target):

    row 0   ^ d0 d1 d2 d3 d4 | d5      the extra token is the target of the row's last
    row 1   ^ d5 d6 _  _  _            the anchor of a continued piece has no target: d5 had its turn
    target  ·  d6 ·  ·  ·  ·
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from anchor_context.data.sources import DATA_FORMATS, Skipped, read_documents, resolve_files

FORMAT_VERSION = 1
"""Part of the fingerprint: raise it when rows are laid out differently."""

NO_TOKEN = -1
"""The extra token of a row whose last document ends with the row."""


@dataclass
class PackingReport:
    """What a preparation made of its documents."""

    documents: int = 0
    document_tokens: int = 0
    """Tokens of documents that lie in rows."""
    rows: int = 0
    anchors_added: int = 0
    anchors_merged: int = 0
    """Leading anchors of documents that a row's shared anchor stands for."""
    pad_tokens: int = 0
    targets: int = 0
    skipped_documents: int = 0
    row_length: int = 0
    anchor_placement: str = "none"


@dataclass(frozen=True)
class PreparedRows:
    """Packed rows on disk, memory-mapped. Cheap to send to loader workers."""

    directory: Path
    row_length: int
    report: dict
    _arrays: dict = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.report["rows"]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_arrays": {}}  # a worker maps the files itself

    @property
    def anchor_placement(self) -> str:
        return self.report["anchor_placement"]

    @property
    def tokens(self) -> np.ndarray:
        """(rows, S + 1) int32: a row, and the target of its last token or `NO_TOKEN`."""
        return self._array("tokens", np.int32).reshape(-1, self.row_length + 1)

    @property
    def piece_offsets(self) -> np.ndarray:
        """(rows + 1,) int64: row r's pieces are piece_offsets[r] … piece_offsets[r + 1]."""
        return self._array("piece_offsets", np.int64)

    @property
    def starts(self) -> np.ndarray:
        """(pieces,) int32: where each piece starts in its row."""
        return self._array("starts", np.int32)

    @property
    def untargeted(self) -> np.ndarray:
        """(pieces,) int32: how many leading tokens of each piece have no target."""
        return self._array("untargeted", np.int32)

    @property
    def target_counts(self) -> np.ndarray:
        """(rows,) int32: targets per row."""
        return self._array("target_counts", np.int32)

    @property
    def pad_counts(self) -> np.ndarray:
        """(rows,) int32: pad tokens per row."""
        return self._array("pad_counts", np.int32)

    def _array(self, name: str, dtype: type) -> np.ndarray:
        if name not in self._arrays:
            path = self.directory / f"{name}.bin"
            self._arrays[name] = np.memmap(path, dtype=dtype, mode="r")
        return self._arrays[name]


class RowWriter:
    """Lays documents into rows and appends full rows to files in `directory`."""

    FILES = ("tokens", "piece_offsets", "starts", "untargeted", "target_counts", "pad_counts")

    def __init__(self, directory: Path, *, row_length: int, anchor_placement: str, anchor: int):
        self.report = PackingReport(row_length=row_length, anchor_placement=anchor_placement)
        self._files = {name: (directory / f"{name}.bin").open("wb") for name in self.FILES}
        self._length, self._placement, self._anchor = row_length, anchor_placement, anchor
        self._row = np.empty(row_length + 1, dtype=np.int32)
        self._pieces_written = 0
        self._write("piece_offsets", np.int64, [0])
        self._start_row()

    def add(self, document: np.ndarray) -> None:
        """Lay one document, (tokens,) int32; what does not fit in the row goes on in new ones."""
        assert len(document)
        self.report.documents += 1
        anchored = self._placement != "none" and document[0] == self._anchor
        rest = document[1:] if anchored else document
        if self._placement == "shared":
            self.report.anchors_merged += anchored
            if not len(rest):
                return
        continued = False
        while len(rest) or not continued:
            if self._filled == self._length:
                self._finish_row(extra=rest[0] if continued else NO_TOKEN)
            start = self._filled
            if self._placement == "per_document":
                self._row[start] = self._anchor
                self._filled += 1
                if anchored and not continued:
                    self.report.document_tokens += 1
                else:
                    self.report.anchors_added += 1
            end = min(self._filled + len(rest), self._length)
            taken = end - self._filled
            self._row[self._filled : end] = rest[:taken]
            self._filled, rest = end, rest[taken:]
            self.report.document_tokens += taken
            # The first token of a continued piece was the extra target of the row before, so the
            # anchor that stands before it has none.
            untargeted = int(continued and self._placement == "per_document")
            self._pieces.append((start, untargeted))
            continued = True

    def close(self) -> PackingReport:
        """Pad and write the last row, flush everything to disk, and report."""
        if self._filled > self._first:
            self._finish_row(extra=NO_TOKEN)
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return self.report

    def _start_row(self) -> None:
        self._pieces: list[tuple[int, int]] = []
        self._filled = self._first = 0
        if self._placement == "shared":
            self._row[0] = self._anchor
            self._pieces.append((0, 1))  # a document of its own, without a target
            self._filled = self._first = 1

    def _finish_row(self, *, extra: int) -> None:
        padding = self._length - self._filled
        if padding:
            self._row[self._filled : self._length] = self._anchor
            self._pieces.append((self._filled, padding))
        self._row[self._length] = extra
        starts, untargeted = np.array(self._pieces, dtype=np.int32).T
        # A piece of n tokens has n - 1 targets inside itself, and the extra one behind the last.
        within = np.diff(starts, append=self._length) - 1
        within[-1] += extra != NO_TOKEN
        targets = int(np.maximum(within - untargeted, 0).sum())
        self._pieces_written += len(starts)

        self._write("tokens", np.int32, self._row)
        self._write("starts", np.int32, starts)
        self._write("untargeted", np.int32, untargeted)
        self._write("piece_offsets", np.int64, [self._pieces_written])
        self._write("target_counts", np.int32, [targets])
        self._write("pad_counts", np.int32, [padding])
        self.report.rows += 1
        self.report.targets += targets
        self.report.pad_tokens += padding
        self.report.anchors_added += self._first
        self._start_row()

    def _write(self, name: str, dtype: type, values) -> None:
        np.asarray(values, dtype=dtype).tofile(self._files[name])


def anchor_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The anchor's id: BOS, or EOS where the tokenizer has no BOS (Qwen's).

    Raises:
        ValueError: it has neither, or no EOS to end documents with.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no EOS token; set eos_token")
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def prepare_rows(
    dataset: str,
    *,
    data_format: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    row_length: int,
    anchor_placement: str,
    cache_dir: Path,
    skip_bad_documents: bool = False,
) -> PreparedRows:
    """The packed rows of `dataset`, from the cache if the very same were prepared before.

    Every process may call it at once: the first to take the lock prepares, the others wait for it.

    Args:
        dataset: files, globs or folders, see `sources.resolve_files`.
        vocab_size: rows of the model's embedding; larger token ids are refused.
        row_length: S in tokens.
        cache_dir: holds one folder per fingerprint.

    Raises:
        ValueError: unreadable or faulty data, named by file and line, or no usable document at all.
    """
    assert data_format in DATA_FORMATS
    files = resolve_files(dataset)
    shape = {
        "version": FORMAT_VERSION,
        "files": [_identity(file) for file in files],
        "tokenizer": _tokenizer_identity(tokenizer),
        "vocab_size": vocab_size,
        "data_format": data_format,
        "row_length": row_length,
        "anchor_placement": anchor_placement,
        "skip_bad_documents": skip_bad_documents,
    }
    fingerprint = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
    cache_dir.mkdir(parents=True, exist_ok=True)
    target = cache_dir / f"rows-{fingerprint}"
    with FileLock(cache_dir / f"rows-{fingerprint}.lock"):
        if not target.exists():
            unfinished = cache_dir / f".unfinished-{fingerprint}"
            shutil.rmtree(unfinished, ignore_errors=True)  # of a preparation that was killed
            unfinished.mkdir()
            _pack(
                unfinished,
                files,
                data_format=data_format,
                tokenizer=tokenizer,
                vocab_size=vocab_size,
                row_length=row_length,
                anchor_placement=anchor_placement,
                skip_bad_documents=skip_bad_documents,
                shape=shape,
            )
            unfinished.rename(target)
    return open_rows(target)


def open_rows(directory: Path) -> PreparedRows:
    """Rows that `prepare_rows` wrote earlier."""
    manifest = json.loads((directory / "manifest.json").read_text())
    report = manifest["report"]
    return PreparedRows(directory=directory, row_length=report["row_length"], report=report)


def _pack(
    directory: Path,
    files: list[Path],
    *,
    data_format: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    row_length: int,
    anchor_placement: str,
    skip_bad_documents: bool,
    shape: dict,
) -> None:
    """Write the rows of `files`, what was skipped, and last the manifest, into `directory`."""
    skipped: list[Skipped] | None = [] if skip_bad_documents else None
    writer = RowWriter(
        directory,
        row_length=row_length,
        anchor_placement=anchor_placement,
        anchor=anchor_token(tokenizer),
    )
    for document in read_documents(
        files,
        data_format=data_format,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        skipped=skipped,
    ):
        writer.add(document)
    report = writer.close()
    if skipped:
        report.skipped_documents = len(skipped)
        lines = [json.dumps(asdict(item)) + "\n" for item in skipped]
        (directory / "skipped.jsonl").write_text("".join(lines))
    if not report.targets:
        names = ", ".join(str(file) for file in files[:3])
        raise ValueError(f"--dataset: no document with a token to learn in {names}")
    manifest = directory / "manifest.json"
    with manifest.open("w") as stream:
        json.dump({"report": asdict(report), "shape": shape}, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())


def _identity(file: Path) -> dict:
    """What tells one version of a file from another: its size, time and content.

    Up to 64 MiB the whole content counts; of larger files 64 blocks of 1 MiB, evenly spread.
    """
    block = 2**20
    status = file.stat()
    blocks = min(64, -(-status.st_size // block))
    digest = hashlib.blake2b()
    with file.open("rb") as stream:
        for place in np.linspace(0, max(0, status.st_size - block), max(blocks, 1), dtype=int):
            stream.seek(int(place))
            digest.update(stream.read(block))
    return {
        "name": str(file),
        "size": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "digest": digest.hexdigest(),
    }


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of the tokenizer's whole state, not of its name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    special = json.dumps([tokenizer.bos_token_id, tokenizer.eos_token_id])
    return hashlib.sha256((state + special).encode()).hexdigest()
