"""The token store: every document tokenised once, in shards that a killed preparation resumes from.

Guarantees: a shard holds the documents of one portion of the data, whatever the number of processes, and is
named after the portion's content; it counts as done only when it is whole on disk. So tokenising again, also
after the data were repaired, does just the shards that are missing.
Costs: 4 bytes per token on disk until the rows are laid; about 20 bytes per document in memory; per
process a few portions.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from anchor_context.data.documents import DocumentReader
from anchor_context.data.sources import Portion
from anchor_context.files import whole
from anchor_context.run.lifeline import end_with_parent


def tokenise(
    portions: Iterable[Portion], reader: DocumentReader, directory: Path, *, num_proc: int
) -> TokenStore:
    """Fill `directory` with the shards of `portions` that it lacks.

    Args:
        reader: but for what it skips, the one that made the shards that are there.
        num_proc: processes that tokenise; 1 tokenises here, with the tokenizer's own threads.

    Raises:
        ValueError: the first bad record, in the order of the data.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = []
    with _Workers(num_proc, reader) as submit, tqdm(unit=" documents", disable=None) as bar:
        waiting: deque[Future | int] = deque()
        for portion in portions:
            path = directory / f"{_digest(portion)}.npz"
            shards.append(path)
            waiting.append(_documents_in(path) if _is_done(path, reader) else submit(portion, path))
            if len(waiting) > 2 * num_proc:
                bar.update(_result(waiting.popleft()))
        while waiting:
            bar.update(_result(waiting.popleft()))
    return TokenStore(shards)


class _Workers:
    """A context that gives `submit(portion, path)`, which makes a shard and gives its document count."""

    def __init__(self, num_proc: int, reader: DocumentReader):
        self.num_proc, self.reader, self.pool = num_proc, reader, None

    def __enter__(self):
        if self.num_proc == 1:
            return lambda portion, path: _make_shard(portion, path, self.reader)
        self.pool = ProcessPoolExecutor(
            self.num_proc,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self.reader,),
        )
        return lambda portion, path: self.pool.submit(_work, portion, path)

    def __exit__(self, *_):
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def _result(done: Future | int) -> int:
    return done.result() if isinstance(done, Future) else done


_worker_reader: DocumentReader


def _start_worker(reader: DocumentReader) -> None:
    global _worker_reader
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_reader = reader
    end_with_parent()  # or it would wait for work for ever


def _work(portion: Portion, path: Path) -> int:
    return _make_shard(portion, path, _worker_reader)


def _digest(portion: Portion) -> str:
    """Of the records and of where they stand: all that a shard depends on but for its reader."""
    return xxhash.xxh3_128(pickle.dumps(portion)).hexdigest()


def _is_done(path: Path, reader: DocumentReader) -> bool:
    """Whether the shard is whole (its file is written last) and serves this reader.

    A shard that left bad records out does not serve a reader that must stop at them.
    """
    if not path.exists():
        return False
    with np.load(path) as shard:
        skipped = _note(shard)["skipped"]
    return all(
        reader.skip_bad_files if "rest_of_file" in entry else reader.skip_bad_documents
        for entry in skipped
    )


def _tokens_path(path: Path) -> Path:
    return path.with_suffix(".tokens.npy")


def _make_shard(portion: Portion, path: Path, reader: DocumentReader) -> int:
    documents = reader(portion)
    with whole(_tokens_path(path)) as unfinished, unfinished.open("wb") as file:
        np.save(file, documents.tokens)
    names = {name: i for i, name in enumerate(sorted(set(documents.sources)))}
    note = {
        "sources": list(names),
        "skipped": documents.skipped,
        "special_tokens": documents.special_tokens,
    }
    with whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez(
            file,
            lengths=documents.lengths,
            source_ids=np.array([names[name] for name in documents.sources], np.int32),
            note=np.frombuffer(json.dumps(note).encode(), np.uint8),
        )
    return len(documents.lengths)


def _note(shard: np.lib.npyio.NpzFile) -> dict:
    """What a shard says in words, as JSON: NumPy's strings lose a NUL at their end."""
    return json.loads(shard["note"].tobytes())


def _documents_in(path: Path) -> int:
    with np.load(path) as shard:
        return len(shard["lengths"])


@dataclass(frozen=True)
class TokenStore:
    """The documents of a data set, tokenised, numbered in the order of the data."""

    shards: list[Path]
    """A shard's file of lengths and sources, by the order of the data; its tokens lie beside it."""

    @cached_property
    def _index(self) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        """(source names, lengths int32, source ids int32, first document of each shard)."""
        numbers: dict[str, int] = {}
        lengths, source_ids, first = [], [], [0]
        for shard in self.shards:
            with np.load(shard) as arrays:
                note = _note(arrays)
                mine = [numbers.setdefault(name, len(numbers)) for name in note["sources"]]
                lengths.append(arrays["lengths"].astype(np.int32))
                source_ids.append(np.array(mine, np.int32)[arrays["source_ids"]])
            first.append(first[-1] + len(lengths[-1]))
        empty = [np.zeros(0, np.int32)]
        return (
            list(numbers),
            np.concatenate(lengths or empty),
            np.concatenate(source_ids or empty),
            np.array(first),
        )

    @property
    def sources(self) -> list[str]:
        """The sources' names; a source id counts into them."""
        return self._index[0]

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) int32, tokens."""
        return self._index[1]

    @property
    def source_ids(self) -> np.ndarray:
        """(documents,) int32."""
        return self._index[2]

    def skipped(self) -> Iterator[dict]:
        """What was left out, records and rests of files, in the order of the data."""
        for shard in self.shards:
            with np.load(shard) as arrays:
                yield from _note(arrays)["skipped"]

    def special_tokens(self) -> int:
        """How many were written in the texts."""
        count = 0
        for shard in self.shards:
            with np.load(shard) as arrays:
                count += _note(arrays)["special_tokens"]
        return count

    def documents(self, order: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """(tokens, source id) of the documents numbered `order`, in that order.

        The tokens, (tokens,) int32, are slices of a mapped file, which stays open as long as one lives.
        """
        first = self._index[3]
        stops = np.cumsum(self.lengths, dtype=np.int64)
        for begin in range(0, len(order), 1 << 16):
            wanted = order[begin : begin + (1 << 16)]
            shards = np.searchsorted(first, wanted, side="right") - 1
            cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1), len(wanted)]
            for i, j in pairwise(cuts):  # documents that follow each other in one shard
                shard, ids = int(shards[i]), wanted[i:j]
                tokens = np.asarray(np.load(_tokens_path(self.shards[shard]), "r"))
                ends = stops[ids] - (stops[first[shard]] - self.lengths[first[shard]])
                places = ((ends - self.lengths[ids]).tolist(), ends.tolist())
                for start, end, source in zip(*places, self.source_ids[ids].tolist(), strict=True):
                    yield tokens[start:end], source
