"""Files and folders that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from anchor_context import files
from anchor_context.files import UNFINISHED, disk_errors, put_in_place, remove, warn, whole


def write(path: Path, text: str, *, folder: bool) -> None:
    if folder:
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "file").write_text(text)
    else:
        path.write_text(text)


def read(path: Path, *, folder: bool) -> str:
    return (path / "inner" / "file" if folder else path).read_text()


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """The names that were synced, in their order."""
    names, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", record)
    return names


@pytest.mark.parametrize("folder", [False, True])
def test_the_new_takes_the_name_only_when_it_is_on_disk(folder, tmp_path, synced):
    target = tmp_path / "result"
    for text in ("first", "second"):
        with whole(target) as unfinished:
            write(unfinished, text, folder=folder)
            assert not synced
            if text == "first":
                assert not target.exists()
            else:
                assert read(target, folder=folder) == "first"
        assert read(target, folder=folder) == text
        inner = ["inner", "file"] if folder else []
        assert synced == [*inner, f"{UNFINISHED}result", tmp_path.name]
        synced.clear()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_an_error_leaves_what_was_there(folder, before, tmp_path):
    target = tmp_path / "result"
    if before:
        write(target, "first", folder=folder)
    with pytest.raises(KeyboardInterrupt), whole(target) as unfinished:
        write(unfinished, "half", folder=folder)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == ([target] if before else [])
    assert not before or read(target, folder=folder) == "first"


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_run_left_is_no_part_of_the_next(folder, tmp_path):
    for name in (f"{UNFINISHED}result", f"{UNFINISHED}replaced-result"):
        write(tmp_path / name, "of a killed run", folder=True)
    target = tmp_path / "result"
    write(target, "first", folder=folder)
    with whole(target) as unfinished:
        assert not unfinished.exists()
        write(unfinished, "second", folder=folder)
    assert read(target, folder=folder) == "second"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_made_elsewhere_is_put_in_place(tmp_path, synced):
    (tmp_path / "work").mkdir()
    write(tmp_path / "work/rows", "rows", folder=True)
    put_in_place(tmp_path / "work/rows", tmp_path / "rows")
    assert read(tmp_path / "rows", folder=True) == "rows"
    assert synced == ["inner", "file", "rows", tmp_path.name]


def test_a_warning_goes_to_stderr(capsys):
    warn("the disk is full")
    told = capsys.readouterr()
    assert "the disk is full\n" in told.err and not told.out


def test_what_the_disk_refuses_names_path_and_flag(tmp_path):
    def raises(error: Exception) -> OSError:
        with pytest.raises(type(error)) as caught, disk_errors(tmp_path / "a", "--cache_dir"):
            raise error
        return caught.value

    full = raises(OSError(28, "No space left on device"))
    assert full.filename == str(tmp_path / "a") and full.strerror.startswith("No space left on dev")
    assert "--cache_dir" in full.strerror
    inside = raises(OSError(30, "Read-only file system", str(tmp_path / "b")))
    assert inside.filename == str(tmp_path / "b") and "--cache_dir" in inside.strerror
    numpy_s = raises(OSError("100 requested and 0 written"))
    assert "100 requested and 0 written; " in numpy_s.strerror and numpy_s.errno
    elsewhere = OSError(13, "Permission denied", "/data/texts.jsonl")
    assert raises(elsewhere) is elsewhere, "it was read, not written"


def test_a_full_disk_leaves_nothing_half(tmp_path):
    with pytest.raises(OSError) as caught, whole(tmp_path / "file") as unfinished:
        unfinished.write_text("half")
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(unfinished) and not list(tmp_path.iterdir())


def test_a_link_is_removed_and_what_it_points_to_stays(tmp_path):
    (tmp_path / "folder/inner").mkdir(parents=True)
    for target in (tmp_path / "folder", tmp_path / "nowhere"):
        (tmp_path / "link").symlink_to(target)
        remove(tmp_path / "link")
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    remove(tmp_path / "folder")
    remove(tmp_path / "folder")
    assert not list(tmp_path.iterdir())
