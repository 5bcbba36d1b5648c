"""Long documents of the machine: which files are taken, whole, once, on which side, under which licence."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from anchor_context.data import licences
from anchor_context.data.__main__ import main
from anchor_context.data.licences import Owners
from anchor_context.data.texts import (
    HELD_OUT,
    Tree,
    collect_texts,
    describe_collected,
    read_document,
)

PARAGRAPH = "A document of several words, and more of them in the next line.\n"


def tree(folder: Path, *suffixes: str) -> Tree:
    return Tree("words", (str(folder),), suffixes or (".txt",))


def collect(tmp_path: Path, *trees: Tree, **limits) -> tuple[list[dict], list[dict]]:
    limits = {"characters_per_tree": 10**6, "shortest": 100, "longest": 10_000} | limits
    found = collect_texts(tmp_path / "out", trees=trees, **limits)
    return tuple(
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (found.train, found.held_out)
    )


def names(lines: list[dict]) -> set[str]:
    return {Path(line["path"]).name for line in lines}


def test_whole_files_that_fit_are_taken_once(tmp_path):
    source = tmp_path / "in"
    (source / "tests").mkdir(parents=True)
    text = PARAGRAPH * 10
    (source / "plain.txt").write_text(text)
    (source / "packed.txt.gz").write_bytes(gzip.compress((text + "packed").encode()))
    (source / "copy.txt").write_text(text)
    (source / "short.txt").write_text("Few words.")
    (source / "long.txt").write_text(PARAGRAPH * 1000)
    (source / "figures.txt").write_text("0x3f, " * 200)
    (source / "one_line.txt").write_text("word " * 1500)
    (source / "latin.txt").write_bytes(text.encode() + "é".encode("latin-1"))
    (source / "broken.txt.gz").write_bytes(gzip.compress(text.encode())[:40] + b"\0" * 200)
    (source / "other.json").write_text(text)
    (source / "changelog.txt").write_text(text + "changes")
    (source / "tests/inside.txt").write_text(text + "inside")
    (source / "link.txt").symlink_to(source / "packed.txt.gz")

    train, held_out = collect(tmp_path, tree(source))
    taken = train + held_out
    assert len(taken) == 2 and "packed.txt.gz" in names(taken)
    assert names(taken) & {"plain.txt", "copy.txt"}
    assert {line["text"] for line in taken} == {text, text + "packed"}
    assert {line["source"] for line in taken} == {"words"}


def test_what_is_held_out_depends_on_the_text_alone(tmp_path):
    sides = []
    for machine in ("one", "another"):
        for n in range(60):
            path = tmp_path / machine / f"in/{machine}{n}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"Number {n}. {PARAGRAPH * 4}")
        sides.append(collect(tmp_path / machine, tree(tmp_path / machine / "in")))
    (train, held_out), (train_there, held_out_there) = sides
    assert len(train) + len(held_out) == 60 and 0 < len(held_out) < 60 / HELD_OUT * 3
    assert {line["text"] for line in held_out} == {line["text"] for line in held_out_there}
    assert {line["text"] for line in train} == {line["text"] for line in train_there}


def test_a_tree_gives_no_more_than_its_share(tmp_path):
    for n in range(9):
        path = tmp_path / f"in/{n}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{n} {PARAGRAPH * 4}")
    train, held_out = collect(tmp_path, tree(tmp_path / "in"), characters_per_tree=800)
    assert [len(line["text"]) for line in train + held_out] == [2 + 4 * len(PARAGRAPH)] * 3


def test_no_text_is_an_error_that_says_what_to_install(tmp_path):
    with pytest.raises(ValueError, match="no file of 100 to 10,000 characters.*apt install"):
        collect(tmp_path, tree(tmp_path / "nothing"))
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ValueError, match="--shortest 5 and --longest 4"):
        main(["collect", str(tmp_path), "--shortest", "5", "--longest", "4"])


def test_licences_are_told_for_each_document_and_each_package(tmp_path, monkeypatch):
    """Of Debian's packages from their copyright files; this test's are a stand-in's."""
    doc, lists = tmp_path / "doc", tmp_path / "lists"
    (doc / "some-doc").mkdir(parents=True)
    lists.mkdir()
    (lists / "some-doc:all.list").write_text(f"{doc}/some-doc/manual.txt\n")
    (doc / "some-doc/manual.txt").write_text(PARAGRAPH * 9)
    (doc / "some-doc/copyright").write_text(
        "Format: 1.0\nLicense: GFDL-1.3\n\nLicense: GPL-3+\n a text\n\nLicense: GFDL-1.3\n"
    )
    monkeypatch.setattr(licences, "DEBIAN", lists)
    monkeypatch.setattr(licences, "DOC", doc)
    licences._debian_licence.cache_clear()
    train, held_out = collect(tmp_path, tree(doc))
    (line,) = train + held_out
    assert (line["package"], line["licence"]) == ("some-doc", "GFDL-1.3, GPL-3+")
    with (tmp_path / "out/packages.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert row["told in"] == str(doc / "some-doc/copyright") and row["documents"] == "1"
    licences._debian_licence.cache_clear()


def test_whose_python_s_files_are():
    package, licence, told_in = Owners().of(Path(pytest.__file__))
    assert (package, licence) == ("pytest", "MIT") and "metadata of pytest" in told_in
    package, licence, told_in = Owners().of(Path(json.__file__))
    assert (package, licence) in {("python", "PSF-2.0"), ("libpython3-stdlib", licence)}
    assert Path(told_in).is_file()
    assert Owners().of(Path("/nowhere/at/all")) == ("unknown", "unknown", "")


@pytest.mark.parametrize(
    "told, licence",
    [
        ("License-Expression: MIT\nClassifier: License :: OSI Approved :: BSD License", "MIT"),
        (
            "License-Expression: " + " AND ".join(f"A-Quite-Long-Name-{n}" for n in range(5)),
            "A-Quite-Long-Name-0, A-Quite-Long-Name-1, A-Quite-Long-Name-2 and 2 more",
        ),
        ("License: UNKNOWN\nClassifier: License :: OSI Approved :: BSD License", "BSD License"),
        (
            "License: Copyright (c) 2015\n        A text.\nClassifier: License :: MIT License",
            "MIT License",
        ),
        ("License: The MIT License\n        A text.", "The MIT License"),
        (f"License: {'A text. ' * 9}", "not named"),
    ],
)
def test_what_a_python_package_says_of_its_licence(tmp_path, monkeypatch, told, licence):
    python_package(tmp_path, "told", "told/__init__.py", told)
    monkeypatch.syspath_prepend(tmp_path)
    licences._python_licence.cache_clear()
    assert licences._python_licence("told") == ("told", licence, "the metadata of told 1.0")
    licences._python_licence.cache_clear()


def test_of_packages_that_share_a_name_the_one_with_the_file_is_told(tmp_path, monkeypatch):
    for name in ("one", "other"):
        python_package(tmp_path, name, f"shared/{name}.py", f"License-Expression: {name}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(licences.site, "getsitepackages", lambda: [str(tmp_path)])
    owners = Owners()
    for name in ("one", "other"):
        assert owners.of(tmp_path / f"shared/{name}.py")[:2] == (name, name)
    licences._python_licence.cache_clear()
    licences._files.cache_clear()


def python_package(folder: Path, name: str, file: str, told: str) -> None:
    """An installed package of one file."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{told}\n")
    (info / "RECORD").write_text(f"{file},,\n{info.name}/METADATA,,\n")


def test_the_command_says_what_it_took(tmp_path, capsys):
    main(["collect", str(tmp_path), "--characters_per_tree", "200000"])
    said = capsys.readouterr().out
    assert "python library" in said and "PSF-2.0" in said and "apt install" in said
    for name in ("train.jsonl", "held_out.jsonl"):
        assert str(tmp_path / name) in said
    first = json.loads((tmp_path / "train.jsonl").open().readline())
    assert first["text"] == read_document(Path(first["path"]))


def test_a_table_tells_lengths_and_licences(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(PARAGRAPH * 100)
    found = collect_texts(tmp_path / "out", trees=(tree(tmp_path / "in"),), shortest=100)
    said = describe_collected(found)
    assert "1,024+: 1 tokens" in said  # 6,400 characters and "unknown" in said
