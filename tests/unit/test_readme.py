"""What the READMEs say exists: links, commands, flags, and the table of rooms.

A flag in a command must be one of that program's; a flag in the text, one of a program that a README shows.
HTML comments hold the places of what is still to be written, and are not read.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import train
from tests.unit.test_rooms import LAYERS

ROOT = Path(__file__).parents[2]
FOLDERS = ("accelerate_configs", "anchor_context", "benchmarks", "examples")
READMES = [ROOT / "README.md", *(f for name in FOLDERS for f in (ROOT / name).rglob("README.md"))]
WRITTEN_BY_A_RUN = ("args.json", "config.json", "manifest.json")

each_readme = pytest.mark.parametrize(
    "readme", READMES, ids=[f.relative_to(ROOT).as_posix() for f in READMES]
)


@cache
def text_of(readme: Path) -> str:
    return re.sub(r"<!--.*?-->", "", readme.read_text(), flags=re.DOTALL)


# --- length and links -----------------------------------------------------------------------------


def test_the_first_page_is_read_in_ten_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    assert len(text.split()) <= 2_500


@each_readme
def test_no_line_of_a_code_block_wraps(readme):
    for block in re.findall(r"^```.*?^```", text_of(readme), flags=re.DOTALL | re.MULTILINE):
        assert max(map(len, block.splitlines())) <= 110


def links_of(readme: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text_of(readme))


def headings_of(readme: Path) -> set[str]:
    """The names that GitHub gives to headings: lower case, without punctuation, dashes for spaces."""
    headings = re.findall(r"^#+ (.+)$", text_of(readme), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_readme
def test_links_lead_somewhere(readme):
    for link in links_of(readme):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = (readme.parent / name).resolve() if name else readme
        assert target.exists(), f"{link} leads nowhere"
        assert not heading or heading in headings_of(target), f"{link}: no such heading"


def test_every_readme_is_reached_from_the_first():
    found, waiting = set(), [ROOT / "README.md"]
    while waiting:
        readme = waiting.pop()
        found.add(readme)
        targets = {(readme.parent / link.partition("#")[0]).resolve() for link in links_of(readme)}
        waiting += [t for t in targets if t.name == "README.md" and t not in found]
    assert found == set(READMES)


@each_readme
def test_files_that_are_named_exist(readme):
    """A path is written from the root, or as the README's own folder, or the one above, sees it."""
    for path in re.findall(r"`([\w./]+\.(?:py|sh|ya?ml|json))`", text_of(readme)):
        if path in WRITTEN_BY_A_RUN:
            continue
        folders = (ROOT, readme.parent, readme.parent.parent)
        assert any((folder / path).exists() for folder in folders), path


@each_readme
def test_a_table_of_files_is_whole(readme):
    _, heading, files = text_of(readme).partition("\n## Files\n")
    if not heading:
        return
    table, *_ = files.partition("\n## ")
    told = set(re.findall(r"^\| `(\w+\.py)`", table, flags=re.MULTILINE))
    assert told == {file.name for file in readme.parent.glob("*.py")} - {"__init__.py"}


# --- commands and flags ---------------------------------------------------------------------------


def commands_of(readme: Path) -> Iterator[list[str]]:
    """The words of each line in a bash block, and of each piece of code in the text."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text_of(readme), re.DOTALL | re.MULTILINE)
    for line in [*"\n".join(blocks).replace("\\\n", " ").splitlines(), *code_of(readme)]:
        words = re.sub(r"(^| )#.*", "", line).replace("'", "").split()
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # NAME=value command
            del words[0]
        if len(words) > 1 and words[0] in ("python", "bash", "accelerate"):
            yield words


def code_of(readme: Path) -> list[str]:
    """What stands between backticks in the text, but for other people's commands."""
    text = re.sub(r"^```.*?^```", "", text_of(readme), flags=re.DOTALL | re.MULTILINE)
    return [c for c in re.findall(r"`([^`]+)`", text) if not c.startswith(("pip ", "ssh "))]


def programs_of(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each program that a command line runs, with its own words: the launcher, then what it launches."""
    program, own = ("anchor_context.launch", []) if words[0] == "accelerate" else ("", [])
    for before, word in pairwise(words):
        if before == "-m" or word.endswith((".py", ".sh")):
            if program:
                yield program, own
            program, own = word, []
        else:
            own.append(word)
    if program:
        yield program, own


def names_in(text: str) -> set[str]:
    """Every flag in a text, written with underscores."""
    return {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)}


def file_of(program: str) -> Path:
    """The program's source: a path, or a module that `python -m` runs."""
    if program.endswith((".py", ".sh")):
        return ROOT / program
    folder = ROOT / program.replace(".", "/")
    return folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")


@cache
def flags_of(program: str, command: str) -> set[str]:
    """The flags that a program, or one of its commands, takes."""
    if program == "anchor_context.launch":
        return names_in(" ".join(launch_command_parser()._option_string_actions))
    if program in ("train.py", "demo_llama.sh"):  # which hands its flags on
        return names_in(help_of(lambda: train.parse_flags(["--help"])))
    if file_of(program).name == "__main__.py":
        main = importlib.import_module(f"{program}.__main__").main
        return names_in(help_of(lambda: main([command, "--help"])))
    return names_in(file_of(program).read_text())


def help_of(call: Callable[[], object]) -> str:
    with redirect_stdout(StringIO()) as out, suppress(SystemExit):
        call()
    return out.getvalue()


@each_readme
def test_commands_exist_and_take_their_flags(readme):
    for words in commands_of(readme):
        for program, own in programs_of(words):
            if program == "their_script.py":
                continue
            assert file_of(program).exists(), f"{program}: no such program"
            if not program.startswith("examples/"):  # they take their trainers' flags
                unknown = names_in(" ".join(own)) - flags_of(program, own[0] if own else "")
                assert not unknown, f"{program} has no {sorted(unknown)}"
        for path in words:
            if path.startswith(("accelerate_configs/", "anchor_context/")):
                assert (ROOT / path).exists(), path


@cache
def known_flags() -> set[str]:
    """Those of every program that a README shows."""
    shown = {
        (program, own[0] if own else "")
        for readme in READMES
        for words in commands_of(readme)
        for program, own in programs_of(words)
        if program != "their_script.py"
    }
    assert ("anchor_context.data", "prepare") in shown, "the commands are not found"
    return set().union(*(flags_of(*program) for program in shown))


@each_readme
def test_flags_in_the_text_exist(readme):
    assert names_in("\n".join(code_of(readme))) <= known_flags()


def test_what_does_not_exist_is_seen():
    """Or checks that find nothing would pass everything."""
    line = "python -m anchor_context.launch --config_file a.yaml train.py --seq-length 8 --nosuch"
    (launcher, first), (script, second) = programs_of(line.split())
    assert (launcher, script) == ("anchor_context.launch", "train.py")
    assert names_in(" ".join(first)) == {"config_file"} <= flags_of(launcher, "")
    assert names_in(" ".join(second)) - flags_of(script, "") == {"nosuch"}
    assert "num_proc" in flags_of("anchor_context.data", "prepare")
    assert "nosuch" not in known_flags() and not file_of("anchor_context.nosuch").exists()


def test_a_flag_is_spelt_in_one_way():
    """Dashes and underscores are the same to the parser, but not to a reader who searches."""
    spellings: dict[str, set[str]] = {}
    for readme in READMES:
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text_of(readme)):
            spellings.setdefault(flag.replace("-", "_"), set()).add(flag)
    assert [found for found in spellings.values() if len(found) > 1] == []


# --- the rooms ------------------------------------------------------------------------------------


def test_the_table_of_rooms_is_the_tests():
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", text_of(ROOT / "README.md"), flags=re.MULTILINE)
    told = {room: int(layer) for layer, rooms in rows for room in re.findall(r"`([^`]+)`", rooms)}
    assert told == LAYERS
