"""Installs document-aware attention into site-packages, reversibly, for scripts that nobody can edit.

    python anchor_context/library_modified_files/softlink_to_library.py [install|status|restore]

    transformers/integrations/sdpa_attention.py            -> symlink to our modified_files/…
    transformers/integrations/sdpa_attention_pristine.py   the library's own file, kept beside it

Guarantees: the library works at every moment, because each file changes hands in one atomic rename, and
whatever a killed run left is finished or undone by the next call. `restore` brings back the same bytes,
checked against the hashes that the library's wheel recorded. A file that was upgraded meanwhile is
never overwritten with the old one. The libraries are those of the running interpreter.
Costs: nothing is copied but the pristine files; no state is kept anywhere else.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODIFIED_FILES = Path(__file__).resolve().parent / "modified_files"

TESTED_VERSIONS = {"transformers": ("5.23.0", "5.24.0"), "yunchang": ("0.6.4",)}

# In the order of installation (restored in reverse), so that the library also works half-way:
# yunchang's __init__ names what attn_layer adds.
FILES = {
    "transformers": (
        "integrations/flash_attention.py",
        "integrations/sdpa_attention.py",
        "integrations/flex_attention.py",
    ),
    "yunchang": ("ulysses/attn_layer.py", "ulysses/__init__.py"),
}

PRISTINE = "the library's own"
EDITED = "edited: not what the library's wheel recorded"
INSTALLED = "linked to this checkout"
ELSEWHERE = "linked to another checkout of this project"
COPIED = "a copy of a modified file in place of a link"
LEFTOVER = "the library's own; a kept copy is left from an interrupted run"
UPGRADED = "the library's own, upgraded since the link was made; the kept copy is out of date"
LOST = "lost or overwritten, but the pristine file is kept beside it"
BROKEN = "damaged: neither it nor what is kept beside it is known to be the library's own file"
FOREIGN = "a link that this project did not make"
MISSING = "missing from the library"
HEALTHY = (PRISTINE, INSTALLED)

# What stands at the target, by row, and what is kept beside it, by column: as the wheel recorded it,
# of a wheel that recorded nothing, altered, or nothing at all.
KEPT = ("as recorded", "unrecorded", "altered", "none")
STATES = {
    "our link": (INSTALLED, INSTALLED, BROKEN, BROKEN),
    "another checkout's link": (ELSEWHERE, ELSEWHERE, BROKEN, BROKEN),
    "our copy": (COPIED, COPIED, BROKEN, BROKEN),
    "the library's file": (LEFTOVER, LEFTOVER, UPGRADED, PRISTINE),
    "another file": (LOST, BROKEN, BROKEN, EDITED),
    "nothing": (LOST, LOST, BROKEN, MISSING),
    "a foreign link": (FOREIGN, FOREIGN, FOREIGN, FOREIGN),
}
# What `restore` does about a state. It refuses BROKEN (unless --force puts a kept file back), FOREIGN
# and MISSING. The kept file goes only where the library's own stands already.
PUT_BACK = (INSTALLED, ELSEWHERE, COPIED, LOST)
REMOVE_KEPT = (LEFTOVER, UPGRADED)


class SoftlinkError(Exception):
    """What stands in the way, and the remedy. Nothing was changed after it was found."""


@dataclass(frozen=True)
class Library:
    """A library of the running interpreter."""

    name: str
    folder: Path
    version: str
    recorded: dict[str, str]
    """Path inside the library -> sha256 as its wheel recorded it (hex); empty if it recorded none."""

    @property
    def reinstall(self) -> str:
        return f"{sys.executable} -m pip install --force-reinstall --no-deps {self.name}=={self.version}"


@dataclass(frozen=True)
class LinkedFile:
    """One file of a library, and the modified file that stands in for it."""

    library: Library
    relative: str

    @property
    def target(self) -> Path:
        return self.library.folder / self.relative

    @property
    def pristine(self) -> Path:
        return self.target.with_name(f"{self.target.stem}_pristine.py")

    @property
    def modified(self) -> Path:
        return MODIFIED_FILES / self.library.name / self.relative

    @property
    def temporary(self) -> Path:
        return self.target.with_name(f".{self.target.name}.anchor_context.tmp")

    def at_target(self) -> str:
        """What stands at the target: a row of `STATES`."""
        if self.target.is_symlink():
            # The link's own text, not where it leads: a checkout that moved leaves it dangling.
            link = os.readlink(self.target)
            inside = f"{MODIFIED_FILES.parent.name}/{MODIFIED_FILES.name}/"
            if not link.replace(os.sep, "/").endswith(
                f"{inside}{self.library.name}/{self.relative}"
            ):
                return "a foreign link"
            return "our link" if Path(link) == self.modified else "another checkout's link"
        if not self.target.exists():
            return "nothing"
        # Whichever commit a copy is of, it imports the pristine file and is nothing without it.
        if self.pristine.stem.encode() in self.target.read_bytes():
            return "our copy"
        own = self.library.recorded.get(self.relative)
        if own is None:  # nothing to compare with but what was kept
            own = sha256(self.pristine if self.pristine.exists() else self.target)
        return "the library's file" if sha256(self.target) == own else "another file"

    def kept(self) -> str:
        """What is kept beside the target: one of `KEPT`."""
        if not self.pristine.exists():
            return "none"
        recorded = self.library.recorded.get(self.relative)
        if recorded is None:
            return "unrecorded"
        return "as recorded" if sha256(self.pristine) == recorded else "altered"

    def state(self) -> str:
        """What the two amount to: one of the words of `STATES`."""
        return STATES[self.at_target()][KEPT.index(self.kept())]

    def leftovers(self) -> list[Path]:
        """What a killed run may leave besides the kept file."""
        compiled = self.target.parent.glob(f"__pycache__/{self.pristine.stem}.*.pyc")
        return [path for path in (self.temporary, *compiled) if os.path.lexists(path)]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_library(name: str) -> Library:
    """The library `name` as the running interpreter would import it, without importing it.

    Raises:
        SoftlinkError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SoftlinkError(
            f"{name} is not installed for {sys.executable}: install it, run this with the "
            "environment's own python, or name the other library with --library"
        )
    folder = Path(spec.origin).parent
    # The metadata beside the package, not that of a namesake elsewhere on the path.
    beside = importlib.metadata.distributions(name=name, path=[str(folder.parent)])
    distribution = next(iter(beside), None) or importlib.metadata.distribution(name)
    recorded = {}
    for file in distribution.files or ():
        if file.hash is not None and file.hash.mode == "sha256" and file.parts[0] == name:
            padded = file.hash.value + "=" * (-len(file.hash.value) % 4)
            recorded["/".join(file.parts[1:])] = base64.urlsafe_b64decode(padded).hex()
    return Library(name, folder, distribution.version, recorded)


def linked_files(library: Library) -> list[LinkedFile]:
    return [LinkedFile(library, relative) for relative in FILES[library.name]]


# --- install --------------------------------------------------------------------------------------


def check_install(file: LinkedFile, *, force: bool) -> str | None:
    """What to do, in words, or None if the file is linked already.

    Raises:
        SoftlinkError: it cannot be linked as it stands.
    """
    state, library = file.state(), file.library
    insisted = force and state == BROKEN and file.kept() == "altered"
    if state == INSTALLED or (insisted and file.at_target() == "our link"):
        return None
    if state in (COPIED, LOST):
        raise SoftlinkError(
            f"{file.target} is {state}: run `restore`, then `install` (links are lost when "
            "site-packages is copied)"
        )
    if state in (FOREIGN, MISSING) or (state == BROKEN and not insisted):
        raise SoftlinkError(f"{file.target} is {state}: {library.reinstall}, then install again")
    if state == EDITED and not force:
        raise SoftlinkError(
            f"{file.target} was edited: it is not the file that {library.name} {library.version} "
            f"came with. {library.reinstall}, or insist with --force"
        )
    return f"{file.target} -> {file.modified}"


def install_file(file: LinkedFile) -> None:
    """Keep the pristine file, then put the link in its place. Killed anywhere, the library works."""
    if file.at_target() in ("the library's file", "another file") and file.state() != LEFTOVER:
        file.temporary.unlink(missing_ok=True)
        shutil.copy2(file.target, file.temporary)
        sync(file.temporary)
        os.replace(file.temporary, file.pristine)
    file.temporary.unlink(missing_ok=True)
    try:
        os.symlink(file.modified, file.temporary)
    except OSError as error:
        raise SoftlinkError(
            f"symbolic links cannot be made in {file.target.parent} ({error.strerror}). On Windows "
            "switch on the developer mode; or use anchor_context.patch_model, which needs no link"
        ) from error
    os.replace(file.temporary, file.target)
    sync(file.target.parent)


# --- restore --------------------------------------------------------------------------------------


def check_restore(file: LinkedFile, *, force: bool) -> str | None:
    """What to do, in words, or None if the file is the library's own and nothing is left over.

    Raises:
        SoftlinkError: the pristine file is not there to restore.
    """
    state, library = file.state(), file.library
    if state in PUT_BACK or (force and state == BROKEN and file.kept() != "none"):
        return f"{file.pristine} -> {file.target}"
    if state == BROKEN and file.kept() != "none":
        raise SoftlinkError(
            f"{file.target} is {state}. {file.pristine} is not put back over it, because it is not "
            f"known to be the file that {library.name} {library.version} came with (the library was "
            f"upgraded, or one of the two edited): {library.reinstall}, or insist with --force"
        )
    if state in (BROKEN, FOREIGN, MISSING):
        raise SoftlinkError(f"{file.target} is {state}: {library.reinstall}")
    if state in REMOVE_KEPT:
        return f"remove {file.pristine} ({state})"
    if leftovers := file.leftovers():
        return f"remove {', '.join(map(str, leftovers))} (left from an interrupted run)"
    return None


def restore_file(file: LinkedFile) -> None:
    """Put the pristine file back over the link, or remove a kept copy that nothing needs."""
    if file.state() in REMOVE_KEPT:
        file.pristine.unlink()
    elif file.pristine.exists():
        os.replace(file.pristine, file.target)
    for path in file.leftovers():
        path.unlink()
    sync(file.target.parent)


# --- both -----------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Have the disk hold `path` (a file, or a folder's entries) before the next step builds on it."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_version(library: Library, *, force: bool) -> None:
    """Raise `SoftlinkError` for a version that these files were not tested with."""
    tested = TESTED_VERSIONS[library.name]
    if library.version not in tested and not force:
        raise SoftlinkError(
            f"{library.name} {library.version} in {library.folder} was not tested with these files, "
            f"which know {', '.join(tested)}: pip install {library.name}=={tested[-1]}, or insist "
            "with --force"
        )


def check_writable(folder: Path) -> None:
    """Raise `SoftlinkError` unless files can be made in `folder`."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SoftlinkError(
            f"cannot write in {folder} ({error.strerror}): run this as the user that installed the "
            "library, or make a virtual environment of your own"
        ) from error


def change(
    libraries: list[Library],
    action: str,
    *,
    force: bool,
    dry_run: bool,
    agree: Callable[[str], bool],
) -> None:
    """Install or restore every file, after everything was checked.

    Raises:
        SoftlinkError: with nothing changed, unless the disk itself fails half-way; then the next
            call goes on from there.
    """
    check, apply = {
        "install": (check_install, install_file),
        "restore": (check_restore, restore_file),
    }[action]
    files = [file for library in libraries for file in linked_files(library)]
    if action == "install":
        for library in libraries:
            check_version(library, force=force)
    else:
        files.reverse()
    plan = [(file, what) for file in files if (what := check(file, force=force)) is not None]
    if not plan:
        print(f"{action}: nothing to do")
        return
    for _, what in plan:
        print(f"{action}: {what}")
    if dry_run:
        return
    for folder in {file.target.parent for file, _ in plan}:
        check_writable(folder)
    if not agree(f"{action} {len(plan)} files?"):
        print("nothing changed")
        return
    for file, what in plan:
        try:
            apply(file)
        except OSError as error:
            raise SoftlinkError(
                f"{what}: {error.strerror}. The library works as it stands; run `{action}` again"
            ) from error
    wrong = [file.target for file, _ in plan if check(file, force=force) is not None]
    assert not wrong, f"{action} left {wrong} otherwise"
    if action == "install":
        print("switch it on with ANCHOR_CONTEXT_PATTERN=anchor (or another pattern's name)")


def report(libraries: list[Library]) -> bool:
    """Print every file's state; True if none needs attention."""
    healthy = True
    for library in libraries:
        known = library.version in TESTED_VERSIONS[library.name]
        print(
            f"{library.name} {library.version}{'' if known else ' (not tested)'}: {library.folder}"
        )
        for file in linked_files(library):
            state = file.state()
            healthy &= state in HEALTHY
            print(f"  {file.relative}: {state}")
    return healthy


def ask(question: str) -> bool:
    """Ask on a terminal; where nobody sits at one, the command itself is the consent."""
    if not sys.stdin.isatty():
        return True
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Link document-aware attention over transformers' and yunchang's, or undo it."
    )
    parser.add_argument(
        "action", nargs="?", choices=("install", "status", "restore"), default="install"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask on a terminal")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--library", choices=tuple(FILES), help="only this one")
    parser.add_argument(
        "--force", action="store_true", help="go on with an untested version or an edited file"
    )
    options = parser.parse_args(arguments)
    try:
        names = [options.library] if options.library else list(FILES)
        libraries = [find_library(name) for name in names]
        if options.action == "status":
            return 0 if report(libraries) else 1
        change(
            libraries,
            options.action,
            force=options.force,
            dry_run=options.dry_run,
            agree=(lambda _: True) if options.yes else ask,
        )
    except SoftlinkError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
