"""The softlink script: atomic, reversible, and honest about what it finds. On small fake libraries."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anchor_context.library_modified_files import document_aware
from anchor_context.library_modified_files import softlink_to_library as softlink

SCRIPT = Path(softlink.__file__)
VERSIONS = {name: tested[-1] for name, tested in softlink.TESTED_VERSIONS.items()}


def write_library(site: Path, name: str, version: str) -> None:
    """A library of that name in `site`: the files that we replace, and its wheel's record of them."""
    record = []
    for relative in ("__init__.py", *softlink.FILES[name]):
        content = f"WHICH = '{name} {version} {relative}'\n".encode()
        path = site / name / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        record.append(f"{name}/{relative},sha256={digest},{len(content)}")
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("\n".join(record) + "\n")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    for name, version in VERSIONS.items():
        write_library(tmp_path, name, version)
    return tmp_path


def run(site: Path, *arguments: str, before: str = "", code: int | None = 0) -> str:
    """The script in an interpreter of its own (`-S`: only `site` and the standard library)."""
    program = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
    program += f"import softlink_to_library as softlink\n{before}\nsys.exit(softlink.main())"
    result = subprocess.run(
        [sys.executable, "-S", "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(site)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert code is None or result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr if code is not None else result.returncode


def contents(site: Path) -> dict[str, bytes | str]:
    """Every file below `site`: its bytes, or where it links to."""
    files = (p for p in sorted(site.rglob("*")) if p.is_symlink() or p.is_file())
    return {
        p.relative_to(site).as_posix(): f"-> {os.readlink(p)}" if p.is_symlink() else p.read_bytes()
        for p in files
    }


def links(site: Path) -> int:
    return sum(isinstance(content, str) for content in contents(site).values())


ALL = sum(len(files) for files in softlink.FILES.values())


def test_install_twice_status_restore_twice(site):
    before = contents(site)
    assert run(site, "status").count(softlink.PRISTINE) == ALL
    run(site, "install")
    installed = contents(site)
    for name, files in softlink.FILES.items():
        for relative in files:
            target = site / name / relative
            assert target.resolve() == softlink.MODIFIED_FILES / name / relative
            assert (
                target.with_name(f"{target.stem}_pristine.py").read_bytes()
                == (before[f"{name}/{relative}"])
            )
    assert run(site, "status").count(softlink.INSTALLED) == ALL
    assert "nothing to do" in run(site, "install")
    assert contents(site) == installed
    run(site, "restore", "--yes")
    assert contents(site) == before
    assert "nothing to do" in run(site, "restore")


def test_without_an_action_it_installs(site):
    """As the original's installation line does."""
    run(site)
    assert run(site, "status").count(softlink.INSTALLED) == ALL
    assert "nothing to do" in run(site)


def test_without_an_action_it_asks_once_on_a_terminal(site):
    before = contents(site)
    asked = (
        "softlink.sys.stdin = type('Terminal', (), {'isatty': lambda self: True})()\n"
        "import builtins\nbuiltins.input = lambda question: print(question) or 'n'"
    )
    printed = run(site, before=asked)
    assert printed.count("[y/N]") == 1 and "nothing changed" in printed
    assert contents(site) == before


def test_one_library_and_dry_run(site):
    before = contents(site)
    assert "sdpa_attention.py ->" in run(site, "install", "--dry-run")
    assert contents(site) == before
    run(site, "install", "--library", "yunchang")
    assert links(site) == len(softlink.FILES["yunchang"])


# Kills the process itself, with SIGKILL, just before the n-th change of a file or folder.
KILL = """
import os, shutil, signal
left = {n}
def killing(function):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            if function is copy:  # half a copy
                open(args[1], "wb").write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped
copy = shutil.copy2
shutil.copy2, os.symlink, os.replace = killing(copy), killing(os.symlink), killing(os.replace)
os.fsync, os.unlink = killing(os.fsync), killing(os.unlink)
softlink.Path.unlink = killing(softlink.Path.unlink)
"""


def whole(site: Path, before: dict) -> None:
    """Every library file is there: its own bytes, or a link with its own bytes beside it."""
    for name, files in softlink.FILES.items():
        for relative in files:
            target = site / name / relative
            pristine = target.with_name(f"{target.stem}_pristine.py")
            own = pristine if target.is_symlink() else target
            assert target.exists()
            assert own.read_bytes() == before[f"{name}/{relative}"]


def compile_pristine(site: Path) -> None:
    """What Python leaves when it imported the kept files."""
    for pristine in site.rglob("*_pristine.py"):
        cache = pristine.parent / "__pycache__"
        cache.mkdir(exist_ok=True)
        (cache / f"{pristine.stem}.cpython-311.pyc").write_bytes(b"compiled")


@pytest.mark.parametrize("action", ["install", "restore"])
def test_killed_at_every_change_the_library_works_and_the_next_call_finishes(site, action):
    before = contents(site)
    run(site, "install")
    if action == "restore":
        compile_pristine(site)
    installed = contents(site)
    kills = 0
    for n in range(500):
        run(site, "restore" if action == "install" else "install")
        if action == "restore":
            compile_pristine(site)
        start = before if action == "install" else installed
        assert contents(site) == start
        code = run(site, action, before=KILL.format(n=n), code=None)
        whole(site, before)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        if n % 2:  # either the same command finishes it, or the other one undoes it
            run(site, action)
            assert contents(site) == (installed if action == "install" else before)
        else:
            run(site, "restore" if action == "install" else "install")
    assert kills >= ALL * (3 if action == "install" else 2)  # several at every file
    assert contents(site) == (installed if action == "install" else before)


def test_an_untested_version_needs_force(site):
    shutil.rmtree(site / "transformers")
    shutil.rmtree(next(site.glob("transformers-*")))
    write_library(site, "transformers", "4.0.0")
    before = contents(site)
    message = run(site, "install", code=1)
    assert "transformers 4.0.0" in message and VERSIONS["transformers"] in message
    assert contents(site) == before  # yunchang neither
    run(site, "install", "--force")
    assert links(site) == ALL
    run(site, "restore")
    assert contents(site) == before


def upgrade(site: Path, version: str) -> dict:
    """What pip does: it removes the files that it recorded (links too), then writes the new ones."""
    for name in ("transformers", "yunchang"):
        shutil.rmtree(next(site.glob(f"{name}-*")))
        for relative in ("__init__.py", *softlink.FILES[name]):
            (site / name / relative).unlink()
        write_library(site, name, version)
    return contents(site)


@pytest.mark.parametrize("action", ["install", "restore"])
def test_an_upgraded_library_is_never_overwritten_with_the_old_file(site, action):
    run(site, "install")
    upgrade(site, "99.0")
    assert run(site, "status", code=1).count(softlink.UPGRADED) == ALL
    if action == "install":
        assert "not tested" in run(site, "install", code=1)
        run(site, "install", "--force")
    run(site, "restore")
    for name, files in softlink.FILES.items():
        for relative in files:
            assert (site / name / relative).read_text() == f"WHICH = '{name} 99.0 {relative}'\n"
    assert not list(site.rglob("*_pristine.py"))


def test_a_kept_file_of_another_version_is_not_put_back(site):
    """The link survived an upgrade: only the record says that the kept file is the old one."""
    run(site, "install")
    kept = {p: p.read_bytes() for p in site.rglob("*_pristine.py")}
    links_now = {p: os.readlink(p) for p in site.rglob("*.py") if p.is_symlink()}
    upgrade(site, "99.0")
    for link, source in links_now.items():
        link.unlink()
        link.symlink_to(source)
    assert softlink.BROKEN in run(site, "status", code=1)
    assert "not put back" in run(site, "restore", code=1)
    assert {p: p.read_bytes() for p in site.rglob("*_pristine.py")} == kept


def test_a_missing_library_is_named(site):
    shutil.rmtree(site / "yunchang")
    before = contents(site)
    message = run(site, "install", code=1)
    assert "yunchang is not installed" in message and "--library" in message
    assert contents(site) == before
    run(site, "install", "--library", "transformers")


def test_an_edited_library_file_needs_force(site):
    file = site / "transformers/integrations/sdpa_attention.py"
    file.write_text("MINE = True\n")
    assert "was edited" in run(site, "install", code=1)
    run(site, "install", "--force")
    run(site, "restore", "--force")
    assert file.read_text() == "MINE = True\n"


@pytest.mark.parametrize("more", [b"", b"# what an earlier commit ended with\n"])
def test_a_copy_in_place_of_a_link_is_recognised(site, more):
    """What is left when site-packages was copied by a tool that follows links; the checkout may have
    moved on since."""
    before = contents(site)
    run(site, "install")
    file = site / "transformers/integrations/sdpa_attention.py"
    modified = file.read_bytes()
    file.unlink()
    file.write_bytes(modified + more)
    assert softlink.COPIED in run(site, "status", code=1)
    assert "restore" in run(site, "install", code=1)
    run(site, "restore")
    assert contents(site) == before


OWN, EARLIER, OTHER = b"WHICH = 'own'\n", b"WHICH = 'earlier version'\n", b"MINE = True\n"
RELATIVE = "integrations/sdpa_attention.py"
KEPT = {  # what is kept beside the target -> its bytes, and whether the library has a record
    "as recorded": (OWN, True),
    "unrecorded": (OWN, False),
    "altered": (EARLIER, True),
    "none": (None, True),
    "none, unrecorded": (None, False),
}
AT_TARGET = {
    "our link": softlink.MODIFIED_FILES / "transformers" / RELATIVE,
    "another checkout's link": Path(
        f"/gone/library_modified_files/modified_files/transformers/{RELATIVE}"
    ),
    "our copy": (softlink.MODIFIED_FILES / "transformers" / RELATIVE).read_bytes(),
    "our older copy": b"from transformers.integrations import sdpa_attention_pristine\n",
    "the library's file": OWN,
    "another file": OTHER,
    "nothing": None,
    "a foreign link": Path("/elsewhere/sdpa_attention.py"),
}
# What `restore` makes of each: the kept file is put back; only removed; everything is as it was
# already; or it refuses, with nothing changed ("force": unless --force puts the kept file back).
RESTORE = {
    "our link": ("put", "put", "force", "refuse", "refuse"),
    "another checkout's link": ("put", "put", "force", "refuse", "refuse"),
    "our copy": ("put", "put", "force", "refuse", "refuse"),
    "our older copy": ("put", "put", "force", "refuse", "refuse"),
    "the library's file": ("remove", "remove", "remove", "nothing", "nothing"),
    "another file": ("put", "force", "force", "nothing", "nothing"),
    "nothing": ("put", "put", "force", "refuse", "refuse"),
    "a foreign link": ("refuse", "refuse", "refuse", "refuse", "refuse"),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("target", "kept", "outcome"),
    [(t, k, o) for t, row in RESTORE.items() for k, o in zip(KEPT, row, strict=True)],
)
def test_restore_of_every_target_beside_every_kept_file(tmp_path, target, kept, outcome, force):
    pristine, has_record = KEPT[kept]
    recorded = {RELATIVE: hashlib.sha256(OWN).hexdigest()} if has_record else {}
    library = softlink.Library("transformers", tmp_path, VERSIONS["transformers"], recorded)
    file = softlink.LinkedFile(library, RELATIVE)
    file.target.parent.mkdir()
    stands = AT_TARGET[target]
    if isinstance(stands, Path):
        file.target.symlink_to(stands)
    elif stands is not None:
        file.target.write_bytes(stands)
    if pristine is not None:
        file.pristine.write_bytes(pristine)
    before = contents(tmp_path)

    if outcome == "refuse" or (outcome == "force" and not force):
        with pytest.raises(softlink.SoftlinkError, match="pip install"):
            softlink.check_restore(file, force=force)
        return
    if outcome == "nothing":
        assert softlink.check_restore(file, force=force) is None
        return
    assert softlink.check_restore(file, force=force) is not None
    softlink.restore_file(file)
    now = pristine if outcome in ("put", "force") else before[RELATIVE]
    assert contents(tmp_path) == {RELATIVE: now}
    assert softlink.check_restore(file, force=force) is None


def test_a_killed_install_over_an_edited_file_is_finished_with_force(site):
    file = site / "transformers/integrations/sdpa_attention.py"
    file.write_bytes(OTHER)
    (pristine := file.with_name("sdpa_attention_pristine.py")).write_bytes(OTHER)
    run(site, "install", code=1)
    run(site, "install", "--force")
    assert file.is_symlink() and pristine.read_bytes() == OTHER
    assert "nothing to do" in run(site, "install", "--force")
    run(site, "restore", "--force")
    assert file.read_bytes() == OTHER and not pristine.exists()
    assert softlink.EDITED in run(site, "status", code=1)


def test_a_lost_file_is_not_linked_before_it_is_restored(site):
    before = contents(site)
    run(site, "install")
    (site / "transformers/integrations/sdpa_attention.py").unlink()
    assert "run `restore`" in run(site, "install", code=1)
    run(site, "restore")
    assert contents(site) == before


def test_damage_is_named_with_the_way_out(site):
    run(site, "install")
    (site / "transformers/integrations/sdpa_attention_pristine.py").unlink()
    assert softlink.BROKEN in run(site, "status", code=1)
    for action in ("install", "restore"):
        assert "--force-reinstall" in run(site, action, code=1)


def test_a_link_of_somebody_else_is_left_alone(site):
    file = site / "yunchang/ulysses/attn_layer.py"
    other = site / "other.py"
    file.rename(other)
    file.symlink_to(other)
    before = contents(site)
    assert softlink.FOREIGN in run(site, "install", code=1)
    assert contents(site) == before


def test_a_checkout_that_moved_is_relinked_or_restored(site):
    before = contents(site)
    run(site, "install")
    installed = contents(site)
    for name, files in softlink.FILES.items():
        for relative in files:
            target = site / name / relative
            target.unlink()
            target.symlink_to(f"/gone/library_modified_files/modified_files/{name}/{relative}")
    assert run(site, "status", code=1).count(softlink.ELSEWHERE) == ALL
    moved = contents(site)
    run(site, "install")
    assert contents(site) == installed != moved
    run(site, "restore")
    assert contents(site) == before


REFUSING = """
def refuse(*args, **kwargs):
    raise OSError({error}, {text!r})
softlink.{what} = refuse
"""


@pytest.mark.parametrize(
    ("what", "error", "text", "message"),
    [
        ("tempfile.TemporaryFile", 30, "Read-only file system", "cannot write in"),
        ("os.symlink", 1314, "A required privilege is not held", "patch_model"),
        ("shutil.copy2", 28, "No space left on device", "run `install` again"),
    ],
)
def test_what_the_file_system_refuses_is_named(site, what, error, text, message):
    """Read-only site-packages, Windows without links, a full disk (a root user cannot provoke them)."""
    before = contents(site)
    said = run(site, "install", before=REFUSING.format(what=what, error=error, text=text), code=1)
    assert message in said and text in said
    whole(site, before)
    run(site, "restore")
    assert contents(site) == before


def test_a_terminal_is_asked_unless_yes(site):
    """`no` changes nothing; without a terminal nobody is asked (every other test here)."""
    terminal = "sys.stdin = type('Terminal', (), {'isatty': lambda self: True})()\n"
    before = contents(site)
    said = run(site, "install", before=terminal + "softlink.input = lambda question: 'no'")
    assert "nothing changed" in said
    assert contents(site) == before
    run(site, "install", "--yes", before=terminal + "softlink.input = None")
    assert links(site) == ALL


def test_the_switch():
    assert document_aware.chosen_pattern({}) == "off"
    assert document_aware.chosen_pattern({"ANCHOR_CONTEXT_PATTERN": "anchor"}) == "anchor"
    with pytest.raises(ValueError, match="intra_doc_reset, off"):
        document_aware.chosen_pattern({"ANCHOR_CONTEXT_PATTERN": "on"})


def test_no_library_code_is_copied():
    """The modified files are small and their own: no long line of the library's stands in them."""
    import transformers
    import yunchang

    for package in (transformers, yunchang):
        for relative in softlink.FILES[package.__name__]:
            library = Path(package.__file__).parent / relative
            modified = softlink.MODIFIED_FILES / package.__name__ / relative
            ours = {line.strip() for line in modified.read_text().splitlines()}
            theirs = {line.strip() for line in library.read_text().splitlines()}
            assert len(ours) < 40
            assert f"{modified.stem}_pristine" in modified.read_text()  # how a copy is recognised
            assert not {line for line in ours & theirs if len(line) > 30}
