"""Prepared rows on disk: what the packer writes, what the loader reads, and the labels that follow.

A prepared set is a directory:

    tokens.npy          (rows, S + 1) int32: S tokens, then the target of the last one, or -1 for none
    piece_offsets.npy   (rows + 1,) int64: row i has the pieces [offsets[i], offsets[i + 1])
    starts.npy          (pieces,) int32: where a piece of a document starts in its row
    untargeted.npy      (pieces,) int32: how many of its first positions have no target
    documents.npy       (pieces,) int32: its document, counted within the row
    pad_counts.npy      (rows,) int32: pad tokens at the row's end; if any, they are its last piece
    target_counts.npy   (rows,) int32
    document_lengths.npy (documents,) int32: tokens of each document laid, as read
    skipped.jsonl       the records left out
    held_out.jsonl      the documents kept out of training, if any (`held_out.py`)
    tokenizer/          the tokenizer that made the tokens
    manifest.json       the report and the fingerprint; written last

Guarantees: a directory with this name is whole (it is written elsewhere, synced and renamed); boundaries
are data, never inferred from token ids.
Costs: nothing in memory but what is read; a row costs one read of 4 (S + 1) bytes.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from anchor_context.files import put_in_place
from anchor_context.layout import IGNORE_INDEX

FORMAT_VERSION = 2
"""Counts up when prepared rows or their report change for the same data and options."""

MANIFEST = "manifest.json"
DOCUMENT_LENGTHS = "document_lengths.npy"
ARRAYS = (
    "tokens",
    "piece_offsets",
    "starts",
    "untargeted",
    "documents",
    "pad_counts",
    "target_counts",
)
NO_TOKEN = -1
"""The extra token of a row whose last token has no target."""

PAD_PIECE = 128
"""Padding is attended to as documents of at most so many tokens. As one it would cost a long document's work,
and count as the longest document of its row."""

BLANK_ROW = -1
"""The id of a row of padding without targets, which fills up the last step of a run."""


@dataclass(frozen=True)
class Row:
    """One row. With documents A (ends here) and B (goes on in another row), one pad-free row of 8:

    tokens      ^ A A A ^ B B B | B'     `|` the extra token, the target of the last one
    starts      0       4
    untargeted  0       0
    documents   0       1
    labels      A A A - B B B B'
    """

    tokens: np.ndarray
    """(S + 1,) int32."""
    starts: np.ndarray
    """(pieces,) int32, increasing, the first 0."""
    untargeted: np.ndarray
    """(pieces,) int32. For instance 1 for a document that goes on here behind a new anchor: its
    first token here was already the target of its last token in the other row."""
    documents: np.ndarray
    """(pieces,) int32: pieces of one document, in its order, have one number; the pad's is its own."""
    pad_count: int

    @property
    def length(self) -> int:
        """S: the tokens of the row, the extra one apart."""
        return len(self.tokens) - 1

    @property
    def ends(self) -> np.ndarray:
        """(pieces,) int64: where each piece ends."""
        return np.append(self.starts[1:], self.length)

    @property
    def document_pieces(self) -> int:
        """How many of the pieces are documents': the last one is the padding, if there is any."""
        return len(self.starts) - (self.pad_count > 0)

    def labels(self) -> np.ndarray:
        """(S,) int64: the next token of the same document, or `IGNORE_INDEX`."""
        labels = self.tokens[1:].astype(np.int64)
        labels[-1:][labels[-1:] == NO_TOKEN] = IGNORE_INDEX
        labels[self.starts[1:] - 1] = IGNORE_INDEX
        if self.documents[-1] != len(self.documents) - 1:  # interleaved chunks
            order = np.argsort(self.documents, kind="stable")
            same = np.diff(self.documents[order]) == 0
            here, following = order[:-1][same], order[1:][same]
            labels[self.starts[here + 1] - 1] = self.tokens[self.starts[following]]
        if self.pad_count:
            labels[self.length - self.pad_count :] = IGNORE_INDEX
        for piece in np.flatnonzero(self.untargeted):
            start = self.starts[piece]
            labels[start : start + self.untargeted[piece]] = IGNORE_INDEX
        return labels

    def pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """(starts, documents) of what attention keeps apart: as stored, but padding as short documents."""
        pad_start = self.length - self.pad_count
        cuts = np.arange(pad_start + PAD_PIECE, self.length, PAD_PIECE, dtype=np.int32)
        if not self.pad_count or not len(cuts):
            return self.starts, self.documents
        more = np.arange(1, len(cuts) + 1, dtype=np.int32) + self.documents[-1]
        return np.concatenate([self.starts, cuts]), np.concatenate([self.documents, more])

    def document_lengths(self) -> np.ndarray:
        """(documents,) int64: tokens of each document in the row, padding as the last, short ones."""
        starts, documents = self.pieces()
        lengths = np.diff(starts, append=self.length)
        return np.bincount(documents, weights=lengths).astype(np.int64)


@dataclass(frozen=True)
class PreparedRows:
    """A prepared set, memory-mapped. Pickles as its path, so it goes to workers at no cost."""

    directory: Path
    manifest: dict = field(repr=False)

    @property
    def row_length(self) -> int:
        """Tokens in a row, S."""
        return self.report["row_length"]

    @property
    def anchor_placement(self) -> str:
        return self.report["anchor_placement"]

    @property
    def interleaved(self) -> bool:
        """Whether documents lie in several pieces, shuffled within their row."""
        return self.fingerprint["options"]["interleave_chunks"]

    @property
    def report(self) -> dict:
        """The account: `document_tokens + anchors_added + pad_tokens == rows * row_length`."""
        return self.manifest["report"]

    @property
    def fingerprint(self) -> dict:
        """What the rows were made of (`fingerprint.py`)."""
        return self.manifest["fingerprint"]

    @property
    def pad_id(self) -> int:
        return self.manifest["pad_id"]

    @property
    def target_counts(self) -> np.ndarray:
        """(rows,) int32: targets in each row."""
        return self._arrays["target_counts"]

    @property
    def pad_counts(self) -> np.ndarray:
        """(rows,) int32: pad tokens in each row."""
        return self._arrays["pad_counts"]

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document in a row, its anchor included: what of it lies in one row, with all
        its chunks where rows are interleaved. Reads all boundaries."""
        starts, offsets = self._arrays["starts"], self._arrays["piece_offsets"]
        ends = np.append(starts[1:], 0).astype(np.int64)
        last = offsets[1:] - 1  # of each row; where a row is padded, the padding
        ends[last] = self.row_length
        lengths = ends - starts
        lengths[last[self.pad_counts > 0]] = 0
        if (
            self.interleaved
        ):  # documents are numbered within their row, which has no more than pieces
            first = np.repeat(offsets[:-1], np.diff(offsets))
            lengths = np.bincount(first + self._arrays["documents"], weights=lengths)
        return int(lengths.max())

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        """The files, mapped. As plain arrays: NumPy's memmap class makes every slice slow."""
        return {
            name: np.asarray(np.load(self.directory / f"{name}.npy", mmap_mode="r"))
            for name in ARRAYS
        }

    def __len__(self) -> int:
        return self.report["rows"]

    def row(self, i: int) -> Row:
        """Row `i`, 0 <= i < len(self); or `BLANK_ROW`."""
        if i == BLANK_ROW:
            return blank_row(self.row_length, self.pad_id)
        arrays = self._arrays
        pieces = slice(arrays["piece_offsets"][i], arrays["piece_offsets"][i + 1])
        return Row(
            tokens=arrays["tokens"][i],
            starts=arrays["starts"][pieces],
            untargeted=arrays["untargeted"][pieces],
            documents=arrays["documents"][pieces],
            pad_count=int(arrays["pad_counts"][i]),
        )

    def __reduce__(self):
        return _reopen, (self.directory, self.anchor_placement)


def blank_row(row_length: int, pad_id: int) -> Row:
    """A row of padding: no targets, one piece."""
    tokens = np.full(row_length + 1, pad_id, np.int32)
    tokens[-1] = NO_TOKEN
    zero = np.zeros(1, np.int32)
    return Row(tokens, zero, zero, zero, pad_count=row_length)


def is_prepared(path: Path) -> bool:
    """Whether this is a whole prepared set."""
    return os.path.isfile(path / MANIFEST)  # False, too, where `path` is a list too long for a path


def _reopen(path: Path, anchor_placement: str) -> PreparedRows:
    return open_rows(path, anchor_placement=anchor_placement)


def open_rows(path: Path | str, *, anchor_placement: str | None = None) -> PreparedRows:
    """Open a prepared set.

    Args:
        anchor_placement: None: as the rows were laid. "none", of rows with an anchor per document: to a
            pattern without anchors these are their documents' own first tokens.

    Raises:
        ValueError: there is none at `path`, its preparation was cut off, or another version made it.
    """
    path = Path(path)
    if not is_prepared(path):
        raise ValueError(
            f"{path} holds no prepared rows (no {MANIFEST}); make them with "
            "`python -m anchor_context.data prepare`"
        )
    manifest = json.loads((path / MANIFEST).read_text())
    version = manifest["fingerprint"]["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} was prepared in format {version}, and this version of the code reads format "
            f"{FORMAT_VERSION}; prepare it again"
        )
    if anchor_placement is not None:
        manifest["report"]["anchor_placement"] = anchor_placement
    return PreparedRows(path, manifest)


class RowsWriter:
    """Writes a prepared set row by row into a directory that nobody else looks at."""

    def __init__(self, path: Path, row_length: int):
        path.mkdir(parents=True)
        self.path = path
        self._files = {
            name: _NpyFile(
                path / f"{name}.npy",
                np.int64 if name == "piece_offsets" else np.int32,
                (row_length + 1,) if name == "tokens" else (),
            )
            for name in ARRAYS
        }
        self._files["piece_offsets"].append([0])
        self.rows = self.targets = self.pad_tokens = self.pieces = 0

    def append(self, row: Row) -> None:
        targets = int((row.labels() != IGNORE_INDEX).sum())
        self.rows += 1
        self.targets += targets
        self.pad_tokens += row.pad_count
        self.pieces += len(row.starts)
        for name, items in (
            ("tokens", row.tokens[None]),
            ("piece_offsets", [self.pieces]),
            ("starts", row.starts),
            ("untargeted", row.untargeted),
            ("documents", row.documents),
            ("pad_counts", [row.pad_count]),
            ("target_counts", [targets]),
        ):
            self._files[name].append(items)

    def finish(self, target: Path, manifest: dict) -> None:
        """Close the set, sync it, and give it its name."""
        for file in self._files.values():
            file.close()
        (self.path / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        put_in_place(self.path, target)


class _NpyFile:
    """An .npy file that grows; NumPy keeps room in the header for a longer first axis."""

    def __init__(self, path: Path, dtype: type, item_shape: tuple[int, ...]):
        self._file = path.open("wb")
        self._dtype, self._item_shape, self._count = np.dtype(dtype), item_shape, 0
        self._file.write(self._header())

    def _header(self) -> bytes:
        buffer = io.BytesIO()
        shape = (self._count, *self._item_shape)
        entry = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, entry)
        return buffer.getvalue()

    def append(self, items: np.ndarray | list[int]) -> None:
        items = np.ascontiguousarray(items, self._dtype)
        assert items.shape[1:] == self._item_shape
        self._file.write(items.data)
        self._count += len(items)

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(self._header())
        self._file.close()
