"""Files and folders that are whole or not there, and the one way to warn.

    with whole(path) as unfinished:  # a name beside `path`
        unfinished.write_text(…)     # or unfinished.mkdir(), and files in it

Guarantees: whenever the process or the machine is stopped, `path` holds what it held before, or all of the
new, or, for the moment in which one folder makes room for another, nothing.
Costs: a sync of every file. One writer of a path at a time.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from termcolor import colored
from tqdm import tqdm

UNFINISHED = ".unfinished-"
"""How a name begins that nobody may trust."""


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Inside, write a file or a folder of the given name; afterwards it is synced and named `target`.

    An error inside removes what was written, and leaves `target` as it was. What the system refused names
    the path (`disk_errors`).
    """
    unfinished = target.with_name(f"{UNFINISHED}{target.name}")
    with disk_errors(unfinished):
        remove(unfinished)  # a killed run's
        try:
            yield unfinished
            put_in_place(unfinished, target)
        finally:  # half of it would only keep the disk full
            remove(unfinished)


def put_in_place(unfinished: Path, target: Path) -> None:
    """Sync what lies at `unfinished`, and name it `target`, in the place of what has that name."""
    for path in sorted(unfinished.rglob("*")):
        sync(path)
    sync(unfinished)
    replaced = target.with_name(f"{UNFINISHED}replaced-{target.name}")
    if target.is_dir():  # unlike a file, it cannot be renamed over
        remove(replaced)
        target.rename(replaced)
    unfinished.replace(target)
    sync(target.parent)
    with suppress(OSError):
        remove(replaced)


def sync(path: Path) -> None:
    """Have a closed file's contents, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link but not what it points to; nothing if not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path, flag: str | None = None) -> Iterator[None]:
    """While `path` is written: what the system refused is raised as `OSError`, whoever reports it.

    It names a path, and the `flag` to give another with. The system does not say which file a write was for;
    safetensors and tokenizers raise classes of their own, or none in particular, with the number as text;
    NumPy leaves the number out. An error of a file elsewhere, which is read meanwhile, stays as it is.
    """
    try:
        yield
    except Exception as error:
        named = getattr(error, "filename", None)
        if isinstance(error, OSError):
            number, reason = error.errno or errno.EIO, error.strerror or str(error)
        elif found := re.search(r"\(os error (\d+)\)", str(error)):
            number, reason = int(found[1]), os.strerror(int(found[1]))
        else:
            raise
        elsewhere = named is not None and not Path(os.fsdecode(named)).is_relative_to(path.parent)
        if elsewhere or (named is not None and (flag is None or flag in reason)):
            raise
        if flag is not None:
            reason += f"; make it writable, with room on its disk, or give another {flag}"
        raise OSError(number, reason, named or str(path)) from error


def warn(text: str) -> None:
    """Say on stderr, in colour and above a progress bar if there is one, what somebody should look at."""
    tqdm.write(colored(text, "yellow"), file=sys.stderr)
    sys.stderr.flush()


def keep_talking() -> None:
    """From here on no message can end this process: what the terminal refuses is dropped.

    That is a full disk under a log file, a pipe that nobody reads any more, a closed stream, a letter that
    the terminal's encoding lacks. What comes after the disk has room again is in the log.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, for good
            continue
        stream.flush()
        talking = io.TextIOWrapper(
            io.BufferedWriter(_Dropping(stream.fileno(), "w", closefd=False)),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, talking)


class _Dropping(io.FileIO):
    """A stream's file that takes everything, and drops what the system refuses."""

    def write(self, data) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written  # None: it would have to wait
