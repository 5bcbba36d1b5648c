"""Where documents come from: files, globs, `save_to_disk` directories and hub names, read as a stream.

Guarantees: every record comes with its file and line (or row), so that an error can name them; where a
file breaks off is a record of its own, never a quiet end. Nothing here looks into a record.
Costs: one pass over the data, a few MiB of memory; an array in a `.json` file is read whole.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import xxhash
import zstandard
from pyarrow.parquet import ParquetFile

from anchor_context.data.rows import is_prepared
from anchor_context.hub import ask_hub

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*JSON_LINES, ".json", ".json.gz", ".json.zst", ".parquet")

PORTION_BYTES = 8 << 20
"""Input per portion, about, which is what a killed preparation repeats."""
HASHED_BYTES = 1 << 30
"""How much of the data set's content goes into its identity; a smaller set is hashed whole."""
HASH_BLOCK = 64 << 10

MOST_NESTED = 200
"""Levels of a record in an array. What is deeper cannot be handed to another process."""

OTHER_KINDS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
}
"""How files begin that somebody named after what is in them. No JSON begins so."""

NO_DATA_SUFFIXES = (".md", ".rst", ".py", ".sh", ".yaml", ".yml", ".log", ".lock")
NO_DATA_NAMES = ("README", "LICENSE", "NOTICE", "CITATION", "_SUCCESS")
"""What a folder may hold besides its data: such files, with any suffix, and hidden ones are passed over."""


class Broken(str):
    """A record that could not be read, as the reason why."""


class BrokenFile(Broken):
    """In the place of all records that a file would still have, the reason why they cannot be read."""


Record = bytes | dict | Broken
"""One JSON line, one row already read, or the reason why there is none."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive records of one file, the first of them number `first` (counted from 1)."""

    file: str
    first: int
    records: list[Record]
    word: str = "line"
    """What this kind of file calls a record: "line" or "row"."""


Portion = list[Stretch]
"""What a worker reads at once. How the data are cut into portions depends on the data alone."""


def find_inputs(dataset: list[str] | str) -> list[str]:
    """The files, `save_to_disk` directories and hub data sets (as `name@commit`) that `--dataset` means.

    Args:
        dataset: names, a string of several separated by commas. A glob stands for the files that it
            matches, a folder for the files in it; both in the order of their names.

    Raises:
        ValueError: a file that is not there, or there twice, a glob or folder without a file, an unknown
            suffix, a folder with data that would be left out, a data set that the hub does not give us.
    """
    names = [dataset] if isinstance(dataset, str) else dataset
    # os.path: a long list is no path, and pathlib would raise.
    names = [n for name in names for n in ([name] if os.path.exists(name) else name.split(","))]
    found = [file for name in names if name for file in _files_of(name)]
    if not found:
        raise ValueError("--dataset is empty; name at least one file")
    seen: dict[str, str] = {}
    for file in found:
        place = os.path.realpath(file)
        if place in seen:
            other = "" if seen[place] == file else f", also as {seen[place]}"
            raise ValueError(
                f"--dataset names {file} twice{other}: its documents would be trained on twice. Name it "
                "once; --mixture and --upsample_long give some more weight, --max-train-steps more epochs"
            )
        seen[place] = file
    return found


def _files_of(name: str) -> list[str]:
    path = Path(name)
    if path.is_file() or is_saved_dataset(path):
        files = [name]
    elif path.is_dir():
        files = _files_in(path)
    elif glob.has_magic(name):
        files = _files_matching(name)
    elif is_hub_name(name):
        # The commit of now: what is read is what the fingerprint says, also if the data set moves on.
        files = [f"{name}@{_hub_commit(name)}"]
    else:
        raise ValueError(f"--dataset {name}: no such file; check the path")
    for file in files:
        if Path(file).is_file() and not file.endswith(SUFFIXES):
            raise ValueError(
                f"--dataset {file} has none of the suffixes {', '.join(SUFFIXES)}; write its texts as lines "
                'of a .jsonl file, each {"text": "…"}'
            )
    return files


def _files_matching(pattern: str) -> list[str]:
    """The files that a glob matches, by name. `ValueError` for none, and for data that are not among them."""
    matches = sorted(set(glob.glob(pattern, recursive=True)))  # `**/**` finds some twice
    files = [match for match in matches if Path(match).is_file()]
    # With `**` a folder is matched besides what is in it.
    read = {folder for file in files for folder in Path(file).parents} | set(map(Path, files))
    for match in matches:
        path = Path(match)
        if not path.exists():
            raise ValueError(f"--dataset {match} is a link to what is not there; mend or remove it")
        if path not in read and _may_hold_data(path):
            raise ValueError(
                f"--dataset {pattern} would leave out the folder {match}: a glob stands for the files that "
                f"it matches. Name the folder, too, or files with a glob, such as '{pattern}/*.jsonl'"
            )
    if not files:
        raise ValueError(f"--dataset {pattern} matches no file; check the pattern")
    return files


def _files_in(folder: Path) -> list[str]:
    """The folder's data files, by name. `ValueError` for none, and for data that are not among them."""
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    read = [path for path in inside if path.is_file() and path.name.endswith(SUFFIXES)]
    left_out = [path for path in inside if path not in read and _may_hold_data(path)]
    if left_out:
        names = [path.name + "/" * path.is_dir() for path in left_out]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"--dataset {folder} would leave out {', '.join(names[:3])}{more}: a folder stands for the files "
            f"directly in it that end in {', '.join(SUFFIXES)}. Convert or move what is data, or name the "
            f"files to read with a glob, such as '{folder}/*.jsonl' or '{folder}/**/*.jsonl'"
        )
    if not read:
        raise ValueError(f"--dataset {folder}: no file in it ends in {', '.join(SUFFIXES)}")
    return [str(path) for path in read]


def _may_hold_data(path: Path) -> bool:
    """Whether passing over a file or folder might lose documents; prepared rows hold those read before."""
    if path.name.startswith("."):
        return False
    if path.is_dir():
        ours = is_prepared(path) and (path / "tokens.npy").exists()
        return not ours and any(_may_hold_data(inside) for inside in path.iterdir())
    suffix, name = path.name.lower().endswith(NO_DATA_SUFFIXES), path.name.upper()
    return path.name.endswith(SUFFIXES) or not (suffix or name.startswith(NO_DATA_NAMES))


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this directory."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def is_hub_name(name: str) -> bool:
    """Whether this could be a data set on the hub: `name` or `owner/name`, without a known suffix."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not name.endswith(SUFFIXES)


def identity(inputs: list[str]) -> list[dict]:
    """What the data are, for a fingerprint: path, size, time of change and content of every file.

    The content is hashed whole up to `HASHED_BYTES` over all files; of larger sets, blocks spread evenly
    over every file, its head and its tail among them. A hub name counts by its commit.
    """
    files = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.is_file())
        elif path.exists():
            files.append(path)
    share = HASHED_BYTES // max(1, len(files))
    described = [
        {"path": str(path.resolve()), **_size_and_time(path), "content": _content_hash(path, share)}
        for path in files
    ]
    hub = [name.split("@") for name in inputs if not Path(name).exists()]
    return described + [{"hub": name, "commit": commit} for name, commit in hub]


def check_unchanged(data: list[dict]) -> None:
    """Raise `ValueError` if a file is no longer what `identity` said of it."""
    for entry in data:
        if "path" not in entry:
            continue
        path = Path(entry["path"])
        now = _size_and_time(path) if path.exists() else None
        if now != {key: entry[key] for key in ("size", "mtime_ns")}:
            became = "is gone" if now is None else f"has {now['size']:,} bytes"
            raise ValueError(
                f"--dataset {path} changed while it was read: it had {entry['size']:,} bytes, and {became} "
                "now. Start again when nobody writes to it"
            )


def _size_and_time(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _content_hash(path: Path, limit: int) -> str:
    """xxh3 of the whole file, or of evenly spread blocks of together about `limit` bytes."""
    size = path.stat().st_size
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        if size <= max(limit, 2 * HASH_BLOCK):
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        else:
            blocks = max(2, limit // HASH_BLOCK)
            for block in range(blocks):
                file.seek(block * (size - HASH_BLOCK) // (blocks - 1))
                digest.update(file.read(HASH_BLOCK))
    return digest.hexdigest()


def _hub_commit(name: str) -> str:
    from huggingface_hub import HfApi

    try:
        return ask_hub(f"the data set {name}", lambda: HfApi().dataset_info(name).sha)
    except ConnectionError as error:
        raise ValueError(
            f"--dataset {name} is neither a file nor a data set that the hub gives us ({error}); "
            "check the path, the name and the network"
        ) from error


def read_portions(inputs: list[str], columns: Iterable[str]) -> Generator[Portion, None, None]:
    """All records, in order, cut into portions of about `PORTION_BYTES`.

    Args:
        inputs: from `find_inputs`.
        columns: the top-level columns that matter; columnar formats read no others.

    Raises:
        ValueError: a data set that cannot be opened at all. What breaks later is a `Broken` record.
    """
    columns = list(columns)
    portion, size = [], 0
    for name in inputs:
        word, records = _open(name, columns)
        stretch = Stretch(name, 1, [], word)
        with closing(records):
            for number, record in enumerate(records, 1):
                stretch.records.append(record)
                size += _weight(record)
                if size >= PORTION_BYTES:
                    yield [*portion, stretch]
                    portion, size = [], 0
                    stretch = Stretch(name, number + 1, [], word)
        if stretch.records:
            portion.append(stretch)
    if portion:
        yield portion


def _weight(record: Record) -> int:
    """About how many bytes of input a record is; at least its own place in a list."""
    if not isinstance(record, dict):
        return len(record) + 64
    return 64 + sum(
        len(value) if isinstance(value, str) else 8 * len(value)
        for value in record.values()
        if isinstance(value, str | list)
    )


def _open(name: str, columns: list[str]) -> tuple[str, Generator[Record, None, None]]:
    if name.endswith(JSON_LINES):
        return "line", _json_lines(name)
    if name.endswith(".parquet"):
        return "row", _parquet_rows(name, columns)
    if Path(name).is_file():
        if _first_byte(name) == b"[":
            return "row", _json_array(name)
        return "line", _json_lines(name)  # many call their JSON lines ".json"
    return "row", _table_rows(name, columns)


def _decompressed(name: str) -> io.BufferedReader:
    """The file's bytes. `OSError` where it is of another kind, and where it breaks off: PyArrow notices a
    cut-off gzip, `_Zstandard` a zstd, and neither an empty one.

    The buffer is small because what is in it when the file breaks off is lost.
    """
    if name.endswith((".gz", ".zst")) and not os.path.getsize(name):
        raise OSError("it is empty, without even the header that nothing, compressed, has")
    packed = (
        _Zstandard(name)
        if name.endswith(".zst")
        else pyarrow.input_stream(name, compression="detect")
    )
    file = io.BufferedReader(packed, 16 << 10)
    for beginning, kind in OTHER_KINDS.items():
        if file.peek(len(beginning)).startswith(beginning):
            raise OSError(f"it is a {kind} file, whatever its name says")
    return file


class _Zstandard(io.RawIOBase):
    """The bytes of a zstd file, of one frame or several, whatever the window (`zstd --long=31`).

    PyArrow refuses windows above 128 MiB; zstandard's own reader takes a file that breaks off for its end.
    """

    def __init__(self, name: str):
        self._file = open(name, "rb")  # noqa: SIM115 (close() closes it)
        self._packed, self._bytes, self._frame = b"", memoryview(b""), None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._bytes and self._more():
            pass
        count = min(len(buffer), len(self._bytes))
        buffer[:count] = self._bytes[:count]
        self._bytes = self._bytes[count:]
        return count

    def _more(self) -> bool:
        """Unpack a little; False at the end of the file."""
        # Little, for a few bytes may unpack to a whole block of 128 KiB.
        self._packed = self._packed or self._file.read(4 << 10)
        if not self._packed:
            if self._frame is not None:
                raise OSError("the zstd stream breaks off")
            return False
        if self._frame is None:
            unlimited = zstandard.ZstdDecompressor(max_window_size=1 << 31)
            self._frame = unlimited.decompressobj()
        try:
            self._bytes = memoryview(self._frame.decompress(self._packed))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        self._packed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _json_lines(name: str) -> Generator[Record, None, None]:
    number = 0
    try:
        with _decompressed(name) as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (the error names it)
                yield line
    except OSError as error:
        yield BrokenFile(f"the file cannot be read beyond line {number}: {error}")


def _first_byte(name: str) -> bytes:
    try:
        with _decompressed(name) as file:
            return file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    except OSError:
        return b""  # the reader proper will say what is wrong


def _json_array(name: str) -> Generator[Record, None, None]:
    try:
        with _decompressed(name) as file:
            records = decode_json(file.read())
    except OSError as error:
        records = Broken(str(error))
    if isinstance(records, Broken):
        yield BrokenFile(f"not a JSON array: {records}")
        return
    for record in records:
        if not isinstance(record, dict | Broken):
            yield Broken("not a JSON object")
        elif isinstance(record, dict) and _is_nested_deeper(record, MOST_NESTED):
            yield Broken(f"nested more than {MOST_NESTED} levels deep")
        else:
            yield record


def _is_nested_deeper(record: dict, most: int) -> bool:
    level = [record]
    for _ in range(most):
        children = (x.values() if type(x) is dict else x for x in level)
        level = [value for values in children for value in values if type(value) in (dict, list)]
        if not level:
            return False
    return True


def decode_json(data: bytes) -> object:
    """JSON text -> its value, or a `Broken` that says why not.

    An object that names a key twice becomes a `Broken`: which of the two was meant, nobody knows.
    """
    try:
        return json.loads(data.decode("utf-8-sig").rstrip(), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""  # of a file that is one array
        return Broken(f"broken JSON: {error.msg.removesuffix(' at')} at {line}column {error.colno}")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return Broken(f"broken JSON: {error}")


def _object(pairs: list[tuple[str, object]]) -> dict | Broken:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    return Broken(f"the key {twice!r} occurs twice")


def _parquet_rows(name: str, columns: list[str]) -> Generator[Record, None, None]:
    """Rows of a parquet file, read by this thread alone.

    Threads of Arrow's that are reading ahead when the interpreter ends, after an error or an interrupt,
    abort the process.
    """
    number = 0
    try:
        # Not mapped: a mapped file that somebody cuts short kills the process.
        with ParquetFile(name, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            wanted = _present(columns, names)
            if twice := [name for name in wanted if names.count(name) > 1]:
                raise OSError(f"the column {twice[0]!r} occurs twice")  # as a key of JSON
            # Few rows at once: a pre-tokenised row alone may be millions of Python integers.
            for batch in file.iter_batches(batch_size=16, columns=wanted, use_threads=False):
                for row in _python_rows(batch):
                    number += 1
                    yield row
    except (OSError, pyarrow.ArrowException) as error:
        yield BrokenFile(f"the file cannot be read beyond row {number}: {error}")


def _present(columns: list[str], known: list[str]) -> list[str]:
    """The `columns` that are there; all, for a message to name, where hardly any of them is.

    Every format reads one column that it needs, and at most one more of those it may have.
    """
    present = [column for column in columns if column in known]
    return present if len(present) == len(columns) or len(present) > 1 else known


def _table_rows(name: str, columns: list[str]) -> Generator[Record, None, None]:
    """Rows of a `save_to_disk` directory or a hub data set, through `datasets`."""
    import datasets

    number = 0
    try:
        table = _train_split(name)
        known = table.column_names
        if known is not None:
            table = table.select_columns(_present(columns, known))
        for batch in table.with_format("arrow").iter(batch_size=16):
            for row in _python_rows(batch):
                number += 1
                yield row
    except (OSError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        yield BrokenFile(f"the file cannot be read beyond row {number}: {error}")


def _python_rows(batch: pyarrow.Table | pyarrow.RecordBatch) -> list[Record]:
    """The rows as Python values; one that Python cannot hold (text that is not UTF-8) is a `Broken`."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [Broken(f"a value cannot be read: {error}")]
        return [row for i in range(len(batch)) for row in _python_rows(batch.slice(i, 1))]


def _train_split(name: str) -> object:
    import datasets

    if Path(name).exists():
        table = datasets.load_from_disk(name)
    else:
        repository, commit = name.split("@")
        table = datasets.load_dataset(repository, revision=commit, streaming=True)
    if not isinstance(table, dict):
        return table
    if "train" not in table:
        raise ValueError(f"--dataset {name} has no split `train`, only {sorted(table)}")
    return table["train"]
