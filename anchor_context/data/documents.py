"""From records to documents of token ids: reads the columns, checks them, tokenises.

Guarantees: whatever is wrong with a record becomes a problem that names its file and line; a record
gives all its documents or none. What a record gives depends on the record alone, not on its neighbours.
Costs: the tokenizer's own time and little else; texts go through it about a MiB at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from anchor_context.data.sources import Broken, Record, Unit, decode_json

DATA_FORMATS = ("raw_json", "tokenized")
NO_SOURCE = "all"
"""The source of every document when no source column is named."""

BATCH_CHARACTERS = 1 << 20
"""Text per call of the tokenizer; its encodings take about 50 times as much memory as the text."""
WINDOW = 1 << 20
"""Characters of a longer text that go through the tokenizer at once."""
OVERLAP = 1 << 12
"""Characters that two neighbouring windows share."""


class BadRecord(ValueError):
    """What is wrong with a record."""


@dataclass
class Documents:
    """Documents of one unit of work, tokenised."""

    tokens: np.ndarray
    """(tokens,) int32: all documents, end to end."""
    lengths: np.ndarray
    """(documents,) int64: tokens of each, at least 1."""
    sources: list[str]
    """(documents,) the source of each."""
    skipped: list[dict] = field(default_factory=list)
    """The records left out: `file`, `line` (or `row`), `problem`."""


@dataclass(frozen=True)
class DocumentReader:
    """Turns units of records into documents. Goes to the worker processes as it is."""

    tokenizer: object
    """A transformers tokenizer. Special tokens are not added, but for EOS at the end of a text."""
    data_format: str
    vocab_size: int
    text_column: str = "text"
    source_column: str | None = None
    skip_bad_documents: bool = False

    @property
    def columns(self) -> list[str]:
        """The top-level columns that the format reads."""
        if self.data_format == "tokenized":
            return ["input_ids", "source"]
        names = [self.text_column] + ([self.source_column] if self.source_column else [])
        return sorted({name.split(".")[0] for name in names})

    def __call__(self, unit: Unit) -> Documents:
        """All documents of a unit, in order.

        Raises:
            ValueError: a bad record, unless they are to be skipped.
        """
        skipped, good = [], []
        for place, record in _records(unit):
            try:
                good.append((place, self._parse(record)))
            except BadRecord as problem:
                self._reject(place, problem, skipped)
        read = self._texts if self.data_format == "raw_json" else self._token_rows
        pieces, lengths, sources = read(good, skipped)
        return Documents(
            tokens=np.concatenate(pieces) if pieces else np.zeros(0, np.int32),
            lengths=np.asarray(lengths, np.int64),
            sources=sources,
            skipped=[entry for _, entry in sorted(skipped, key=lambda pair: pair[0])],
        )

    def _reject(self, place: tuple, problem: Exception, skipped: list[tuple]) -> None:
        order, file, word, number = place
        if not self.skip_bad_documents:
            raise ValueError(
                f"{file}, {word} {number}: {problem}; repair it, or pass --skip_bad_documents to go on "
                "without such records"
            ) from None
        skipped.append((order, {"file": file, word: number, "problem": str(problem)}))

    def _parse(self, record: Record) -> tuple:
        if isinstance(record, bytes):
            record = decode_json(record)
        if isinstance(record, Broken):
            raise BadRecord(record)
        if not isinstance(record, dict):
            raise BadRecord(f"{_kind(record)}, not an object")
        return (
            self._parse_text(record) if self.data_format == "raw_json" else self._parse_ids(record)
        )

    # -- raw_json ------------------------------------------------------------------------------------

    def _parse_text(self, record: dict) -> tuple[str, str]:
        text = _column(record, self.text_column)
        if not isinstance(text, str):
            raise BadRecord(f"`{self.text_column}` is {_kind(text)}, not a string")
        if not text:
            raise BadRecord(f"`{self.text_column}` is empty")
        check_characters(text, self.text_column)
        return text, self._source(record)

    def _source(self, record: dict) -> str:
        if self.source_column is None:
            return NO_SOURCE
        source = _column(record, self.source_column)
        if not isinstance(source, str | int) or isinstance(source, bool):
            raise BadRecord(f"`{self.source_column}` is {_kind(source)}, not a name")
        check_characters(str(source), self.source_column)
        return str(source)

    def _texts(self, good: list, skipped: list) -> tuple[list[np.ndarray], list[int], list[str]]:
        eos = self.tokenizer.eos_token_id
        pieces, lengths, sources = [], [], []
        for batch in _batches(good):
            encoded = self._encode([text for _, (text, _) in batch])
            for (place, (_, source)), ids in zip(batch, encoded, strict=True):
                if not len(ids) or ids[-1] != eos:
                    ids = np.append(ids, np.int32(eos))
                try:
                    check_vocabulary(ids, self.vocab_size)
                except BadRecord as problem:
                    self._reject(place, problem, skipped)
                    continue
                pieces.append(ids)
                lengths.append(len(ids))
                sources.append(source)
        return pieces, lengths, sources

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        if len(texts) == 1 and len(texts[0]) > WINDOW:
            return [encode_long(self.tokenizer, texts[0], window=WINDOW, overlap=OVERLAP)]
        return [np.asarray(ids, np.int32) for ids in token_ids(self.tokenizer, texts)]

    # -- tokenized -----------------------------------------------------------------------------------

    def _parse_ids(self, record: dict) -> tuple[np.ndarray, np.ndarray, list[str]]:
        ids = token_array(_column(record, "input_ids"))
        check_vocabulary(ids, self.vocab_size)
        entries = _column(record, "source")
        if not isinstance(entries, list) or not entries:
            raise BadRecord(
                '`source` is not a list of document ends; a row that is one document has "source": '
                f'[{{"end": {len(ids)}}}]'
            )
        ends, sources = np.empty(len(entries), np.int64), []
        for i, entry in enumerate(entries):
            end = entry.get("end") if isinstance(entry, dict) else None
            if not isinstance(end, int) or isinstance(end, bool):
                raise BadRecord(f"`source` entry {i} has no whole number `end`: {str(entry)[:80]}")
            start = int(ends[i - 1]) if i else 0
            if end <= start:
                raise BadRecord(
                    f"`source` ends must increase: entry {i} ends at {end}, the one before at {start}"
                )
            if end > len(ids):
                raise BadRecord(
                    f"`source` entry {i} ends at {end}, but the row has {len(ids)} tokens"
                )
            ends[i] = end
            sources.append(self._source(entry))
        if ends[-1] != len(ids):
            raise BadRecord(
                f"`source` ends at {ends[-1]}, but the row has {len(ids)} tokens: the last "
                f"{len(ids) - ends[-1]} belong to no document"
            )
        return ids, ends, sources

    def _token_rows(
        self, good: list, skipped: list
    ) -> tuple[list[np.ndarray], list[int], list[str]]:
        pieces, lengths, sources = [], [], []
        for _, (ids, ends, names) in good:
            pieces.append(ids)
            lengths.extend(np.diff(ends, prepend=0))
            sources.extend(names)
        return pieces, lengths, sources


def _records(unit: Unit) -> Iterator[tuple[tuple, Record]]:
    """((order in the unit, file, "line" or "row", number), record), without blank lines."""
    order = 0
    for stretch in unit:
        for number, record in enumerate(stretch.records, stretch.first):
            order += 1
            if not (isinstance(record, bytes) and record.isspace()):
                yield (order, stretch.file, stretch.word, number), record


def _column(record: dict, name: str) -> object:
    """The value of a column; `meta.set` is the key `set` of the object `meta`."""
    value = record
    for key in [name] if name in record else name.split("."):
        if not isinstance(value, dict) or key not in value:
            raise BadRecord(f"no `{name}`, only {sorted(record)[:8]}")
        value = value[key]
    if isinstance(value, Broken):
        raise BadRecord(value)
    return value


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number"}
    names |= {str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def check_characters(text: str, column: str) -> None:
    """Raise `BadRecord` for text that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"`{column}` has half a character (a lone surrogate) at {error.start}"
        ) from None


def token_array(ids: object) -> np.ndarray:
    """A list of token ids -> (tokens,) int32. Raises `BadRecord` unless it is one, and not empty."""
    if not isinstance(ids, list) or not ids:
        raise BadRecord(
            "`input_ids` is empty" if ids == [] else f"`input_ids` is {_kind(ids)}, not a list"
        )
    if set(map(type, ids)) != {int}:  # NumPy would take `true` for 1
        odd = next(i for i, value in enumerate(ids) if type(value) is not int)
        raise BadRecord(
            f"`input_ids` must be whole numbers, but has {str(ids[odd])[:40]!r} at index {odd}"
        )
    try:
        array = np.array(ids, np.int64)
    except OverflowError:
        raise BadRecord(
            "`input_ids` has numbers beyond 64 bits, outside every vocabulary"
        ) from None
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        index = int(np.argmax((array < 0) | (array > np.iinfo(np.int32).max)))
        raise BadRecord(f"token id {array[index]} at index {index} is outside every vocabulary")
    return array.astype(np.int32)


def check_vocabulary(ids: np.ndarray, vocab_size: int) -> None:
    """Raise `BadRecord` for a token id that the model has no embedding for."""
    if ids.max() >= vocab_size:
        index = int(np.argmax(ids >= vocab_size))
        raise BadRecord(
            f"token id {ids[index]} at index {index} is outside the model's vocabulary of {vocab_size} "
            "(the data or the tokenizer belong to another model)"
        )


def _batches(good: list) -> Iterator[list]:
    """Texts in groups of about `BATCH_CHARACTERS`; a text longer than `WINDOW` alone."""
    batch, size = [], 0
    for item in good:
        length = len(item[1][0])
        if batch and (size + length > BATCH_CHARACTERS or length > WINDOW):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += length
    if batch:
        yield batch


def token_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """The texts' token ids, nothing added, nothing cut off.

    As `tokenizer(texts, add_special_tokens=False)["input_ids"]`; with a fast tokenizer straight from its
    backend, without the offsets and masks that nobody here reads: two thirds of the time.
    """
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_long(tokenizer, text: str, *, window: int, overlap: int) -> np.ndarray:
    """Token ids of a text of any length, (tokens,) int32, in memory that the window bounds.

    Neighbouring windows share `overlap` characters and are joined in the middle of them, where both
    must agree on every token of a quarter of the overlap: what a tokenizer does there no longer depends
    on where the window began or ends. Where they never agree (a run of digits as long as the overlap),
    and for tokenizers without offsets, the whole text goes through at once.
    """
    if not tokenizer.is_fast:
        return np.asarray(token_ids(tokenizer, [text])[0], np.int32)
    parts, start, keep_from = [], 0, 0
    ids, begins = _encode_window(tokenizer, text, 0, window)
    while start + window < len(text):
        next_start = start + window - overlap
        next_ids, next_begins = _encode_window(tokenizer, text, next_start, window)
        low, high = next_start + overlap // 2, next_start + overlap // 2 + overlap // 4
        here = slice(*np.searchsorted(begins, [low, high]))
        there = slice(*np.searchsorted(next_begins, [low, high]))
        agree = np.array_equal(ids[here], next_ids[there]) and np.array_equal(
            begins[here], next_begins[there]
        )
        if not agree or here.start == here.stop:
            return np.asarray(token_ids(tokenizer, [text])[0], np.int32)
        parts.append(ids[keep_from : here.start])
        start, ids, begins, keep_from = next_start, next_ids, next_begins, there.start
    parts.append(ids[keep_from:])
    return np.concatenate(parts)


def _encode_window(tokenizer, text: str, start: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of `text[start : start + window]`, and where each token begins in `text`, in characters."""
    encoded = tokenizer(
        text[start : start + window],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    begins = np.array([begin for begin, _ in encoded["offset_mapping"]], np.int64)
    return np.asarray(encoded["input_ids"], np.int32), begins + start
