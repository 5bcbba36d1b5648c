"""The token store: every document tokenised once, in shards that a killed preparation resumes from.

Guarantees: a shard holds the documents of one unit of the data, whatever the number of processes, and is
named after the unit's content; it counts as done only when it is whole on disk. So tokenising again, also
after the data were repaired, does just the shards that are missing.
Costs: 4 bytes per token on disk until the rows are laid; about 20 bytes per document in memory; per
process a few units of work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import threading
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
from anchor_context.data.sources import Unit


def tokenise(
    units: Iterable[Unit], reader: DocumentReader, directory: Path, *, num_proc: int
) -> TokenStore:
    """Fill `directory` with the shards of `units` that it lacks.

    Args:
        reader: but for `skip_bad_documents`, the one that made the shards that are there.
        num_proc: processes that tokenise; 1 tokenises here, with the tokenizer's own threads.

    Raises:
        ValueError: the first bad record, in the order of the data.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = []
    with _workers(num_proc, reader) as submit, tqdm(unit=" documents", disable=None) as bar:
        waiting: deque[Future | int] = deque()
        for unit in units:
            path = directory / f"{_digest(unit)}.npz"
            shards.append(path)
            waiting.append(_documents_in(path) if _is_done(path, reader) else submit(unit, path))
            if len(waiting) > 2 * num_proc:
                bar.update(_result(waiting.popleft()))
        while waiting:
            bar.update(_result(waiting.popleft()))
    return TokenStore(shards)


class _workers:
    """A context that gives `submit(unit, path)`, which makes a shard and gives its document count."""

    def __init__(self, num_proc: int, reader: DocumentReader):
        self.num_proc, self.reader, self.pool = num_proc, reader, None

    def __enter__(self):
        if self.num_proc == 1:
            return lambda unit, path: _make_shard(unit, path, self.reader)
        self.pool = ProcessPoolExecutor(
            self.num_proc,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self.reader,),
        )
        return lambda unit, path: self.pool.submit(_work, unit, path)

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
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(unit: Unit, path: Path) -> int:
    return _make_shard(unit, path, _worker_reader)


def _digest(unit: Unit) -> str:
    """Of the records and of where they stand: all that a shard depends on but for its reader."""
    return xxhash.xxh3_128(pickle.dumps(unit)).hexdigest()


def _is_done(path: Path, reader: DocumentReader) -> bool:
    """Whether the shard is whole; its file is written last. Skipped records may have to be errors now."""
    if not path.exists():
        return False
    with np.load(path) as shard:
        return reader.skip_bad_documents or not _note(shard)["skipped"]


def _tokens_path(path: Path) -> Path:
    return path.with_suffix(".tokens.npy")


def _make_shard(unit: Unit, path: Path, reader: DocumentReader) -> int:
    documents = reader(unit)
    _write(_tokens_path(path), lambda file: np.save(file, documents.tokens))
    names = {name: i for i, name in enumerate(sorted(set(documents.sources)))}
    note = {"sources": list(names), "skipped": documents.skipped}
    _write(
        path,
        lambda file: np.savez(
            file,
            lengths=documents.lengths,
            source_ids=np.array([names[name] for name in documents.sources], np.int32),
            note=np.frombuffer(json.dumps(note).encode(), np.uint8),
        ),
    )
    return len(documents.lengths)


def _write(path: Path, write) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _note(shard: np.lib.npyio.NpzFile) -> dict:
    """What a shard says in words, as JSON: NumPy's strings lose a NUL at their end."""
    return json.loads(shard["note"].tobytes())


def _documents_in(path: Path) -> int:
    with np.load(path) as shard:
        return len(shard["lengths"])


@dataclass(frozen=True)
class Block:
    """Some documents of one shard: document i is `tokens[starts[i] : stops[i]]`, of `source_ids[i]`."""

    tokens: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    source_ids: np.ndarray


@dataclass(frozen=True)
class TokenStore:
    """The documents of a data set, tokenised, numbered in the order of the data."""

    shards: list[Path]
    """A shard's file of lengths and sources, by the order of the data; its tokens lie beside it."""

    @cached_property
    def _index(self) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, int]:
        """(source names, lengths int32, source ids int32, first document of each shard, skipped)."""
        numbers: dict[str, int] = {}
        lengths, source_ids, first, skipped = [], [], [0], 0
        for shard in self.shards:
            with np.load(shard) as arrays:
                note = _note(arrays)
                mine = [numbers.setdefault(name, len(numbers)) for name in note["sources"]]
                lengths.append(arrays["lengths"].astype(np.int32))
                source_ids.append(np.array(mine, np.int32)[arrays["source_ids"]])
                skipped += len(note["skipped"])
            first.append(first[-1] + len(lengths[-1]))
        empty = [np.zeros(0, np.int32)]
        return (
            list(numbers),
            np.concatenate(lengths or empty),
            np.concatenate(source_ids or empty),
            np.array(first),
            skipped,
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

    @property
    def skipped_count(self) -> int:
        return self._index[4]

    def skipped(self) -> Iterator[dict]:
        """The records left out, in the order of the data."""
        for shard in self.shards:
            with np.load(shard) as arrays:
                yield from _note(arrays)["skipped"]

    def blocks(self, order: np.ndarray) -> Iterator[Block]:
        """The documents numbered `order`, in that order, as runs of one shard each."""
        first = self._index[3]
        stops = np.cumsum(self.lengths, dtype=np.int64)
        for begin in range(0, len(order), 1 << 16):
            wanted = order[begin : begin + (1 << 16)]
            shards = np.searchsorted(first, wanted, side="right") - 1
            cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1), len(wanted)]
            for i, j in pairwise(cuts):
                shard, ids = int(shards[i]), wanted[i:j]
                offset = stops[first[shard]] - self.lengths[first[shard]]
                yield Block(
                    tokens=np.asarray(np.load(_tokens_path(self.shards[shard]), "r")),
                    starts=stops[ids] - self.lengths[ids] - offset,
                    stops=stops[ids] - offset,
                    source_ids=self.source_ids[ids],
                )
