"""What a user did wrong is one line that names the flag; what a library raises keeps its traceback."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy
import pytest

from anchor_context import command_line
from anchor_context.command_line import (
    FlagParser,
    check_model_path,
    model_errors,
    one_line_errors,
    read_text,
)
from anchor_context.data.__main__ import main as data_command
from anchor_context.evaluate.__main__ import main as evaluation
from anchor_context.precision.__main__ import main as laboratory
from anchor_context.precision.table import Table
from anchor_context.run.folder import summary as summary_of
from anchor_context.run.profiler import parse_profile_steps

ROOT = Path(__file__).parents[2]


@dataclass
class Flags:
    length: int
    text_column: str = "text"


def parser() -> FlagParser:
    made = FlagParser(prog="thing")
    commands = made.add_subparsers(dest="command", required=True)
    commands.add_parser("run", flags=Flags)
    return made


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "run --lenght 5",
            r"unknown: --lenght \(did you mean --length\?\); `thing run --help` lists",
        ),
        (
            "run --length 5 --text-colum=a",
            r"unknown: --text-colum=a \(did you mean --text-column\?\)",
        ),
        ("run -length 5", r"unknown: -length \(did you mean --length\?\)"),
        ("run --length 5 more", "unknown: more"),
        ("run --text_column a", "required: --length"),
        ("run --length five", "invalid int value: 'five'"),
        ("walk", "invalid choice: 'walk'"),
        ("", "required: command"),
    ],
)
def test_a_flag_that_is_wrong_is_named_and_a_misspelt_one_is_not_a_missing_one(line, says):
    with pytest.raises(ValueError, match=says):
        parser().parse_args(line.split())


def test_flags_and_what_may_stand_behind_them():
    flags = parser().parse_args(["run", "--text-column", "-- a b", "--length=-5"])
    assert (flags.command, flags.length, flags.text_column) == ("run", -5, "-- a b")


@pytest.mark.parametrize("words", [["--text-column="], ["--text-column", ""]])
def test_an_empty_value_is_a_variable_that_is_not_set(words):
    with pytest.raises(ValueError, match="argument .*--text.column.*: is empty: is a variable"):
        parser().parse_args(["run", "--length=5", *words])


def test_home_is_home_where_the_shell_leaves_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    flags = parser().parse_args(["run", "--length=5", "--text-column=~/a b,~/c/*.jsonl,d~"])
    assert flags.text_column == "/home/me/a b,/home/me/c/*.jsonl,d~"
    made = FlagParser(prog="thing")
    made.add_argument("--out", type=Path)
    assert made.parse_args(["--out=~/x"]).out == Path("/home/me/x")


def ended_by(work, capsys) -> str:
    """What the user reads; the command must end with code 2."""
    with pytest.raises(SystemExit) as end, one_line_errors():
        work()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    return line


def test_our_errors_are_one_line(capsys):
    told = ended_by(lambda: parse_profile_steps("4"), capsys)
    assert "error: --profile_steps 4 must be A:B" in told
    told = ended_by(lambda: laboratory(["precision", "--model", "/nope", "--out", "o"]), capsys)
    assert told.count("error: --model /nope: no such folder") == 1


def test_our_error_of_a_worker_is_one_line_and_a_librarys_is_not(capsys):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        ours, theirs = pool.submit(parse_profile_steps, "4"), pool.submit(Fraction, "one")
        assert "error: --profile_steps 4" in ended_by(ours.result, capsys)
        with pytest.raises(ValueError, match="Invalid literal"), one_line_errors():
            theirs.result()


def test_a_path_that_we_cannot_make_is_one_line_and_a_librarys_is_not(tmp_path, capsys):
    (tmp_path / "file").touch()
    inside = tmp_path / "file/change.csv"
    assert (
        ended_by(lambda: Table([{"a": 1}]).write_csv(inside), capsys).count(f"{inside}: Not a dir")
        == 1
    )
    with pytest.raises(NotADirectoryError), one_line_errors():
        numpy.save(inside, 1)
    with pytest.raises(OSError, match="no path"), one_line_errors():
        raise OSError("no path")


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run's folder output/run with the models step-9 and step-120, seen from tmp_path."""
    for name in ("step-9", "step-120"):
        (tmp_path / "output/run" / name).mkdir(parents=True)
        (tmp_path / "output/run" / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return Path("output/run")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("output/run", "--model output/run holds no model; did you mean output/run/step-120\\?"),
        ("output", "--model output holds no model; it has no config.json"),
        ("output/nope", "output/nope: no such folder; .*because output is a folder here"),
        ("output/run/step-9/config.json", "is a file; give the folder"),
        *((name, "no such folder; check") for name in ("/nope", "./nope", "~/nope", "a/b/c")),
    ],
)
def test_a_models_folder_that_is_not_there_is_told_without_the_hub(run, name, says):
    with pytest.raises(ValueError, match=says):
        check_model_path(name, "--model")


@pytest.mark.parametrize("name", ["output/run/step-9", "gpt2", "meta-llama/Llama-3.1-8B"])
def test_a_model_s_folder_and_hub_names_pass(run, name):
    check_model_path(name, "--model")


def test_what_transformers_says_of_a_model_is_one_line(monkeypatch):
    monkeypatch.setattr(command_line, "find_model_on_hub", lambda *_: None)
    said = "--model gpt2 cannot be loaded: one two$"
    with pytest.raises(ValueError, match=said), model_errors("gpt2", "--model"):
        raise OSError("one\n\n  two")


def test_texts_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(ValueError, match="--text .*latin is not UTF-8 text"):
        read_text(f"{tmp_path}/latin", "--text")
    with pytest.raises(ValueError, match="--text .*none: No such file"):
        read_text(f"{tmp_path}/none", "--text")


@pytest.mark.parametrize(
    ("command", "line", "says"),
    [
        (
            evaluation,
            "needle --model output/run --lengths 64 --out o",
            "did you mean output/run",
        ),
        (evaluation, "needle --lenghts 64 --model m --out o", "did you mean --lengths"),
        (data_command, "prepare --dataset d --model_name_or_path /nope", "/nope: no such folder"),
        (data_command, "prepare --datset d --model_name_or_path m", "did you mean --dataset"),
        (laboratory, "precision --model output/run --out o", "did you mean output/run"),
        (laboratory, "precision --modle m --out o", "did you mean --model"),
    ],
)
def test_every_command_names_the_mistake(run, command, line, says):
    with pytest.raises(ValueError, match=says):
        command(line.split())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", ["evaluate", "precision", "data", "run.folder"])
def test_every_command_tells_it_in_one_line(module, monkeypatch, capsys):
    name = f"anchor_context.{module}"
    monkeypatch.setattr(sys, "argv", [module, "--nonsense"])
    start = partial(runpy.run_module, name, run_name="__main__", alter_sys=True)
    told = ended_by(start, capsys)
    assert "error: " in told and f"`python -m {name} --help`" in told


def test_the_summary_of_no_run(run):
    with pytest.raises(ValueError, match="output/nope: no such folder"):
        summary_of(Path("output/nope"))
    with pytest.raises(ValueError, match="holds no run; it has no args.json"):
        summary_of(Path("output"))
    (run / "args.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="output holds no run; did you mean output/run?"):
        summary_of(Path("output"))


@pytest.mark.parametrize("example", ["trainer", "sft_trainer"])
def test_an_example_without_arguments_says_how_to_call_it(example, monkeypatch):
    if example == "sft_trainer":
        pytest.importorskip("trl")
    monkeypatch.setattr(sys, "argv", [example])
    with pytest.raises(SystemExit, match=f"usage: python examples/{example}.py MODEL TEXTS"):
        runpy.run_path(str(ROOT / f"examples/{example}.py"))


# --------------------------------------------------------------------------------------------------
# No message ends a run.

TALK = """
import sys
from tqdm import tqdm
from anchor_context.files import keep_talking
from anchor_context.files import keep_talking, warn
keep_talking()
for step in tqdm(range(3)):
    print("step", step, "\u00d7 \u2026")
    warn("careful")
    sys.stdout.flush()
open(sys.argv[1], "w").write("done")
"""


def talk(tmp_path, redirection: str, **environment: str) -> int:
    """The exit code of TALK, which must get to its end, under a shell's redirection."""
    (tmp_path / "talk.py").write_text(TALK)
    command = f"{sys.executable} {tmp_path}/talk.py {tmp_path}/done {redirection}"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    assert (tmp_path / "done").read_text() == "done"
    return ended.returncode


@pytest.mark.parametrize(
    "redirection", ["> /dev/full 2>&1", ">&- 2>&-", "2>&1 | true", "> /dev/null 2> /dev/full"]
)
def test_no_message_ends_a_run(redirection, tmp_path):
    assert talk(tmp_path, redirection) == 0


def test_a_letter_that_the_terminal_lacks_ends_no_run(tmp_path):
    log = tmp_path / "log"
    assert talk(tmp_path, f"> {log} 2>&1", PYTHONIOENCODING="ascii") == 0
    assert "step 2 \\xd7 \\u2026\n" in log.read_text() and "careful" in log.read_text()
