"""Which package a file of this machine belongs to, and under which licence that says it stands.

Debian's packages tell it in /usr/share/doc/PACKAGE/copyright, Python's in their metadata. What is told is of
the package: a file in it may have a licence of its own.
"""

from __future__ import annotations

import re
import site
import sysconfig
from functools import cache
from importlib import metadata
from pathlib import Path

DEBIAN, DOC = Path("/var/lib/dpkg/info"), Path("/usr/share/doc")
LONGEST_NAME = 60
"""Characters; some packages put the whole text where the licence's name belongs."""


class Owners:
    """Looks owners up; reads the machine's lists of packages once."""

    def __init__(self) -> None:
        self._debian = {
            path: file.stem.partition(":")[0]
            for file in DEBIAN.glob("*.list")
            for path in file.read_text(errors="replace").splitlines()
        }
        self._python = metadata.packages_distributions()
        self._site = [Path(folder) for folder in site.getsitepackages()]
        self._stdlib = Path(sysconfig.get_path("stdlib"))

    def of(self, path: Path) -> tuple[str, str, str]:
        """(package, licence, file that tells it) of an absolute path.

        The licence is "not named" where the package has its text alone, "unknown" where it tells nothing.
        """
        if str(path) in self._debian:
            return _debian_licence(self._debian[str(path)])
        for folder in self._site:
            if path.is_relative_to(folder):
                inside = path.relative_to(folder)
                packages = self._python.get(inside.parts[0].removesuffix(".py"), ["unknown"])
                if len(packages) > 1:  # share a folder, as nvidia's do: whose RECORD has the file?
                    packages = [p for p in packages if str(inside) in _files(p)] or packages
                return _python_licence(packages[0])
        if path.is_relative_to(self._stdlib):
            return "python", "PSF-2.0", str(self._stdlib / "LICENSE.txt")
        return "unknown", "unknown", ""


@cache
def _debian_licence(package: str) -> tuple[str, str, str]:
    told_in = DOC / package / "copyright"
    text = told_in.read_text(errors="replace") if told_in.is_file() else ""
    names = re.findall(r"^License: *(\S.*)$", text, flags=re.MULTILINE)
    names = list(dict.fromkeys(name for name in names if len(name) <= LONGEST_NAME))
    if not names:  # of older packages, in a form of their own
        names = sorted(set(re.findall(r"/usr/share/common-licenses/([\w.-]*\w)", text)))
    return package, _short(names), str(told_in) if text else ""


@cache
def _files(package: str) -> set[str]:
    """Of a Python package, as its RECORD has them."""
    return set(map(str, metadata.files(package) or ()))


@cache
def _python_licence(package: str) -> tuple[str, str, str]:
    try:
        told = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return package, "unknown", ""
    told_in = f"the metadata of {package} {told['Version']}"
    if expression := told["License-Expression"]:
        return package, _short(expression.split(" AND ")), told_in
    licence = (told["License"] or "").strip().splitlines()
    classified = [
        line.rpartition(" :: ")[2]
        for line in told.get_all("Classifier", [])
        if line.startswith("License ::")
    ]
    # Where the field is the whole text, its first line may be a title, or anything.
    names = classified + licence[:1] if len(licence) > 1 else licence + classified
    names = [name for name in names if len(name) <= LONGEST_NAME and name != "UNKNOWN"][:1]
    return package, _short(names), told_in


def _short(names: list[str]) -> str:
    """The first three, and how many more; the first is that of the most files, as a rule."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "not named"
