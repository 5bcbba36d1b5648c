"""What every command says where its user went wrong: one line that names the flag, and exit code 2.

    parser = FlagParser(prog="python -m anchor_context.thing")
    if __name__ == "__main__":
        with one_line_errors():
            main()

Guarantees: a mistake that the user can mend never ends in a traceback; an error that a library raises
keeps its traceback, because we cannot explain it. A model's folder that is not there is told at once,
without asking the hub. A number that is none (`nan`, `inf`) and an empty text are refused for every flag, and
`~` is the user's home in all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from huggingface_hub.errors import StrictDataclassError
from termcolor import colored
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from anchor_context.hub import find_model_on_hub

PACKAGE = Path(__file__).parent
STANDARD_LIBRARY = Path(os.__file__).parent


# --------------------------------------------------------------------------------------------------
# Flags


def flag(
    default: Any = dataclasses.MISSING, help: str = "", choices: Iterable[str] | None = None
) -> Any:
    """A field of a dataclass of flags: `HfArg` on one line. Without a default the flag must be given."""
    given = {} if choices is None else {"choices": tuple(choices)}
    return HfArg(default=default, help=help, metadata=given)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, but not where it is None: that says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class FlagParser(HfArgumentParser):
    """argparse, but what it finds wrong is a `ValueError` like every other mistake in a flag.

    A flag that it does not know comes before one that is missing: it is the missing one, misspelt.
    """

    def __init__(self, flags: type | None = None, **settings):
        """With the fields of the dataclass `flags`, whose dashes and underscores are the same."""
        super().__init__(flags, allow_abbrev=False, formatter_class=_Help, **settings)

    def _add_dataclass_arguments(self, flags: type) -> None:
        """A flag stands in `--help` under the `heading` of the class that declares it."""
        types, groups = get_type_hints(flags), {None: self}
        for field in dataclasses.fields(flags):
            classes = (
                c
                for c in reversed(flags.__mro__)
                if field.name in vars(c).get("__annotations__", ())
            )
            heading = getattr(next(classes), "heading", None)
            if heading not in groups:
                groups[heading] = self.add_argument_group(heading)
            field.type = types[field.name]
            self._parse_dataclass_field(groups[heading], field)

    def parse_known_args(self, args: list[str] | None = None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # else the flags are those of the command's own parser
            self._refuse_unknown([w for w in words if re.match(r"--?[A-Za-z]\S*(=|$)", w)])
        found, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"unknown: {' '.join(rest)}")
        return found, rest

    def _get_values(self, action: argparse.Action, texts: list[str]) -> Any:
        of_command = action.nargs == argparse.PARSER  # whose own parser sees them
        if "" in texts and not of_command:  # as a path, the folder that the command was started in
            raise argparse.ArgumentError(action, "is empty: is a variable of the shell not set?")
        return super()._get_values(action, texts)

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        value = super()._get_value(action, text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentError(action, f"{text} is no finite number")
        # The shell leaves `--output-dir=~/run` as it is, and `~` behind a comma.
        if isinstance(value, str):
            value = ",".join(map(os.path.expanduser, value.split(",")))
        return value.expanduser() if isinstance(value, Path) else value

    def _refuse_unknown(self, flags: list[str]) -> None:
        known = [option for action in self._actions for option in action.option_strings]
        unknown = [flag for flag in flags if flag.partition("=")[0] not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"unknown: {' '.join(unknown)}{hint}")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `{self.prog} --help` lists the flags")


# --------------------------------------------------------------------------------------------------
# Models


@contextmanager
def model_errors(name: str, flag: str) -> Iterator[None]:
    """Inside, what transformers raises about the model `name` becomes one `ValueError` that names the flag.

    Raises:
        ValueError: also at once, as `check_model_path` and `find_model_on_hub` do.
    """
    check_model_path(name, flag)
    if not Path(name).is_dir():
        find_model_on_hub(name, flag)
    try:
        yield
    # transformers raises all three, over many lines.
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{flag} {name} cannot be loaded: {reason}") from error


def check_model_path(name: str, flag: str) -> None:
    """Raise `ValueError` if `name` is a path, not a hub name, and no model's folder."""
    path = Path(name)
    if path.is_dir():
        if not _holds_model(path):
            models = [child for child in path.iterdir() if _holds_model(child)]
            latest = max(models, key=lambda child: (len(child.name), child.name), default=None)
            hint = f"did you mean {latest}?" if latest else "it has no config.json"
            raise ValueError(f"{flag} {name} holds no model; {hint}")
    elif path.exists():
        raise ValueError(f"{flag} {name} is a file; give the folder of the model")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"{flag} {name}: no such folder; check the path")
    elif "/" in name and Path(path.parts[0]).is_dir():
        raise ValueError(
            f"{flag} {name}: no such folder; check the path (it is not taken for a hub name, because "
            f"{path.parts[0]} is a folder here)"
        )


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


# --------------------------------------------------------------------------------------------------
# Errors


def read_text(name: str, flag: str) -> str:
    """The text of a UTF-8 file. Raises `ValueError` if that cannot be."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{flag} {name}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {name} is not UTF-8 text ({error}); convert it") from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a command: print what the user can mend, once per machine, and exit with code 2.

    That is a `ValueError` of this project, and a path that this project could not open or make. Most
    mistakes are found by all ranks alike, so the others let the machine's first speak, and are ended by the
    launcher before they do, unless the mistake is theirs alone.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        message = _mistake(error)
        if message is None:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)
        print(colored(f"error: {message}", "red"), file=sys.stderr, flush=True)
        sys.exit(2)


def _mistake(error: ValueError | OSError) -> str | None:
    """What the user did wrong; None where a library, or a bug, speaks."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # Of an error in another process, a worker's or a rank's, the traceback comes as the cause's text.
    files += re.findall(r'File "(.+?)", line', getattr(error.__cause__, "tb", ""))
    if isinstance(error, OSError):
        callers = [file for file in files if not _is_standard(file)]  # pathlib opens for us
        ours = error.filename is not None and _is_ours(callers[-1])
        return f"{error.filename}: {error.strerror}" if ours else None
    return str(error) if _is_ours(files[-1]) else None


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(PACKAGE) or Path(file) == PACKAGE.parent / "train.py"


def _is_standard(file: str) -> bool:
    inside = Path(file).is_relative_to(STANDARD_LIBRARY) and "-packages" not in file
    return inside or file.startswith("<frozen ")
