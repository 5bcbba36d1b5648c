"""From records to documents of token ids: reads the columns, checks them, tokenises.

Guarantees: whatever is wrong with a record becomes a problem that names its file and line; a record
gives all its documents or none. What a record gives depends on the record alone, not on its neighbours.
Costs: the tokenizer's own time and little else; texts go through it about a MiB at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from anchor_context.data.sources import Broken, BrokenFile, Portion, Record, decode_json

DATA_FORMATS = ("raw_json", "tokenized")
ENDS = ("source", "seq_lengths", "position_ids")
"""The columns that may say where the documents of a tokenised row end; the first that is there counts."""
MASKS = ("labels", "attention_mask", "completion_mask", "assistant_masks", "loss_mask")
"""The columns in which others say that a token of a tokenised row is not learnt, or is padding. Here every
token of a document is learnt, so they must say no such thing."""
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


class BadFile(BadRecord):
    """Why the rest of a file cannot be read."""


@dataclass
class Documents:
    """Documents of one portion, tokenised."""

    tokens: np.ndarray
    """(tokens,) int32: all documents, end to end."""
    lengths: np.ndarray
    """(documents,) int64: tokens of each, at least 1."""
    sources: list[str]
    """(documents,) the source of each."""
    skipped: list[dict] = field(default_factory=list)
    """What was left out: `file`, `line` (or `row`), `problem`; `rest_of_file` with all that follows."""
    special_tokens: int = 0
    """Special tokens written in the texts, as `<s>` in a page about HTML."""


@dataclass(frozen=True)
class DocumentReader:
    """Turns portions of records into documents. Goes to the worker processes as it is."""

    tokenizer: object
    """A transformers tokenizer. Special tokens are not added, but for EOS at the end of a text, and those
    that are written in a text are text unless `parse_special_tokens`."""
    data_format: str
    vocab_size: int
    text_column: str = "text"
    source_column: str | None = None
    skip_bad_documents: bool = False
    skip_bad_files: bool = False
    parse_special_tokens: bool = False

    @property
    def columns(self) -> list[str]:
        """The top-level columns that the format reads, as far as they are there."""
        names = (
            ["input_ids", *ENDS, *MASKS] if self.data_format == "tokenized" else [self.text_column]
        )
        names += [self.source_column] if self.source_column else []
        return sorted({name.split(".")[0] for name in names})

    def __call__(self, portion: Portion) -> Documents:
        """All documents of a portion, in order.

        Raises:
            ValueError: a bad record, unless they are to be skipped.
        """
        skipped, good = [], []
        for place, record in _records(portion):
            try:
                good.append((place, self._parse(record)))
            except BadRecord as problem:
                self._reject(place, problem, skipped)
        read = self._texts if self.data_format == "raw_json" else self._token_rows
        pieces, lengths, sources = read(good, skipped)
        texts = (text for _, (text, _) in good) if self.data_format == "raw_json" else ()
        return Documents(
            tokens=np.concatenate(pieces) if pieces else np.zeros(0, np.int32),
            lengths=np.asarray(lengths, np.int64),
            sources=sources,
            skipped=[entry for _, entry in sorted(skipped, key=lambda pair: pair[0])],
            special_tokens=sum(len(self._special_tokens.findall(text)) for text in texts),
        )

    def _reject(self, place: tuple, problem: Exception, skipped: list[tuple]) -> None:
        order, file, word, number = place
        rest = isinstance(problem, BadFile)
        if not (self.skip_bad_files if rest else self.skip_bad_documents):
            remedy = (
                "--skip_bad_files to go on without the rest of such files"
                if rest
                else "--skip_bad_documents to go on without such records"
            )
            raise ValueError(
                f"{file}, {word} {number}: {problem}; repair it, or pass {remedy}"
            ) from None
        entry = {"file": file, word: number, "problem": str(problem)}
        skipped.append((order, entry | ({"rest_of_file": True} if rest else {})))

    def _parse(self, record: Record) -> tuple:
        if isinstance(record, bytes):
            record = decode_json(record)
        if isinstance(record, BrokenFile):
            raise BadFile(record)
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
        parse = self.parse_special_tokens
        if len(texts) == 1 and len(texts[0]) > WINDOW:
            return [
                encode_long(self.tokenizer, texts[0], window=WINDOW, overlap=OVERLAP, parse=parse)
            ]
        return [np.asarray(ids, np.int32) for ids in token_ids(self.tokenizer, texts, parse=parse)]

    @cached_property
    def _special_tokens(self) -> re.Pattern:
        """Finds what the tokenizer would parse as a special token."""
        added = self.tokenizer.added_tokens_decoder.values()
        written = sorted((re.escape(token.content) for token in added if token.special), key=len)
        return re.compile("|".join(reversed(written)) or r"(?!)")

    # -- tokenized -----------------------------------------------------------------------------------

    def _parse_ids(self, record: dict) -> tuple[np.ndarray, np.ndarray, list[str]]:
        ids = token_array(_column(record, "input_ids"))
        check_vocabulary(ids, self.vocab_size)
        _check_masks(record)
        entries = self._entries(record, len(ids))
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

    def _entries(self, record: dict, length: int) -> list:
        """What `source` says of the row's documents, or would say: `{"end": …}` of each."""
        column = next((name for name in ENDS if name in record), None)
        if column is None:
            raise BadRecord(
                "no `source`, `seq_lengths` or `position_ids` says where its documents end, only "
                f'{sorted(record)[:8]}. `source` would as [{{"end": 812}}, …], `seq_lengths` as the tokens '
                "of each document, `position_ids` by counting from 0 in each. A row that is one document, "
                f"and only such a row, has `seq_lengths` [{length}]"
            )
        value = _column(record, column)
        if column == "source":
            # `datasets` keeps a sequence of objects as an object of sequences.
            if isinstance(value, dict) and all(isinstance(v, list) for v in value.values()):
                if len({len(v) for v in value.values()}) > 1:
                    raise BadRecord(f"`source` has lists of different lengths: {sorted(value)[:8]}")
                value = [dict(zip(value, v, strict=True)) for v in zip(*value.values())]  # noqa: B905
            if not isinstance(value, list) or not value:
                raise BadRecord(
                    "`source` is not a list of document ends; a row that is one document, and only such a "
                    f'row, has "source": [{{"end": {length}}}]'
                )
            return value
        numbers = token_array(value, column)
        if column == "position_ids":
            starts = np.append(np.flatnonzero(numbers == 0), len(numbers))
            lengths = np.diff(starts)
            counted = np.concatenate([np.arange(n) for n in (starts[0], *lengths)])
            if starts[0] or not np.array_equal(counted, numbers):
                raise BadRecord("`position_ids` do not count each document's tokens from 0")
        else:
            lengths = numbers
        names = {} if self.source_column is None else {self.source_column: self._source(record)}
        return [{"end": int(end)} | names for end in np.cumsum(lengths, dtype=np.int64)]

    def _token_rows(
        self, good: list, skipped: list
    ) -> tuple[list[np.ndarray], list[int], list[str]]:
        pieces, lengths, sources = [], [], []
        for _, (ids, ends, names) in good:
            pieces.append(ids)
            lengths.extend(np.diff(ends, prepend=0))
            sources.extend(names)
        return pieces, lengths, sources


def _records(portion: Portion) -> Iterator[tuple[tuple, Record]]:
    """((order in the portion, file, "line" or "row", number), record), without blank lines."""
    order = 0
    for stretch in portion:
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


def token_array(ids: object, column: str = "input_ids") -> np.ndarray:
    """A column's list of whole numbers -> int32. Raises `BadRecord` unless it is one, and not empty."""
    if not isinstance(ids, list) or not ids:
        raise BadRecord(
            f"`{column}` is empty" if ids == [] else f"`{column}` is {_kind(ids)}, not a list"
        )
    if set(map(type, ids)) != {int}:  # NumPy would take `true` for 1
        odd = next(i for i, value in enumerate(ids) if type(value) is not int)
        raise BadRecord(
            f"`{column}` must be whole numbers, but has {str(ids[odd])[:40]!r} at index {odd}"
        )
    try:
        array = np.array(ids, np.int64)
    except OverflowError:
        raise BadRecord(
            f"`{column}` has numbers beyond 64 bits, outside every vocabulary"
        ) from None
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        index = int(np.argmax((array < 0) | (array > np.iinfo(np.int32).max)))
        what = "token id" if column == "input_ids" else f"`{column}`:"
        raise BadRecord(f"{what} {array[index]} at index {index} is outside every vocabulary")
    return array.astype(np.int32)


def _check_masks(record: dict) -> None:
    """Raise `BadRecord` for a tokenised row that says that some of its tokens are not to be learnt."""
    ids = record["input_ids"]
    for column in MASKS:
        value = record.get(column)
        if value is None:
            continue
        if not isinstance(value, list) or len(value) != len(ids):
            raise BadRecord(f"`{column}` is not a list of {len(ids)}, one for each of `input_ids`")
        if value == ids if column == "labels" else all(value):
            continue  # as nearly always, and many times as fast as what follows
        if column == "labels":
            value = [told == own for told, own in zip(value, ids, strict=True)]
        if out := [i for i, learnt in enumerate(value) if not learnt]:
            raise BadRecord(
                f"`{column}` leaves {len(out)} of the row's {len(ids)} tokens out (the first at index "
                f"{out[0]}), but every token is learnt here: cut padding off, or drop the column to learn all"
            )


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


def token_ids(tokenizer, texts: list[str], *, parse: bool = False) -> list[list[int]]:
    """The texts' token ids, nothing added, nothing cut off.

    As `tokenizer(texts, add_special_tokens=False)["input_ids"]`; with a fast tokenizer straight from its
    backend, without the offsets and masks that nobody here reads: two thirds of the time.

    Args:
        parse: let special tokens that are written in a text be those tokens, if the tokenizer does so.
    """
    if not tokenizer.is_fast:
        return tokenizer(texts, **_as_text(tokenizer, parse))["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = _as_text(tokenizer, parse)["split_special_tokens"]
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _as_text(tokenizer, parse: bool) -> dict[str, bool]:
    """How a tokenizer is called for a text and nothing else; `parse` as in `token_ids`."""
    split = tokenizer.split_special_tokens or not parse
    return {"add_special_tokens": False, "split_special_tokens": split, "verbose": False}


def encode_long(
    tokenizer, text: str, *, window: int, overlap: int, parse: bool = False
) -> np.ndarray:
    """Token ids of a text of any length, (tokens,) int32, in memory that the window bounds.

    Neighbouring windows share `overlap` characters and are joined in the middle of them, where both
    must agree on every token of a quarter of the overlap: what a tokenizer does there no longer depends
    on where the window began or ends. Where they never agree (a run of digits as long as the overlap),
    and for tokenizers without offsets, the whole text goes through at once. `parse` as in `token_ids`.
    """
    if not tokenizer.is_fast:
        return np.asarray(token_ids(tokenizer, [text], parse=parse)[0], np.int32)
    parts, start, keep_from = [], 0, 0
    ids, begins = _encode_window(tokenizer, text, 0, window, parse)
    while start + window < len(text):
        next_start = start + window - overlap
        next_ids, next_begins = _encode_window(tokenizer, text, next_start, window, parse)
        low, high = next_start + overlap // 2, next_start + overlap // 2 + overlap // 4
        here = slice(*np.searchsorted(begins, [low, high]))
        there = slice(*np.searchsorted(next_begins, [low, high]))
        agree = np.array_equal(ids[here], next_ids[there]) and np.array_equal(
            begins[here], next_begins[there]
        )
        if not agree or here.start == here.stop:
            return np.asarray(token_ids(tokenizer, [text], parse=parse)[0], np.int32)
        parts.append(ids[keep_from : here.start])
        start, ids, begins, keep_from = next_start, next_ids, next_begins, there.start
    parts.append(ids[keep_from:])
    return np.concatenate(parts)


def _encode_window(
    tokenizer, text: str, start: int, window: int, parse: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of `text[start : start + window]`, and where each token begins in `text`, in characters."""
    encoded = tokenizer(
        text[start : start + window], return_offsets_mapping=True, **_as_text(tokenizer, parse)
    )
    begins = np.array([begin for begin, _ in encoded["offset_mapping"]], np.int64)
    return np.asarray(encoded["input_ids"], np.int32), begins + start
