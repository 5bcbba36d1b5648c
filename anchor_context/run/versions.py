"""Whether the libraries of this machine are ones that the project works with.

The ranges stand in requirements.txt, behind the version that each was tested with:

    transformers==5.24.0  # works: >=5.23,<6
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
RANGE = "# works:"


def working_ranges() -> dict[Requirement, SpecifierSet]:
    """{what was tested: what works}, for every library that has a range."""
    lines = [line.split(RANGE) for line in REQUIREMENTS.read_text().splitlines() if RANGE in line]
    return {Requirement(tested): SpecifierSet(works) for tested, works in lines}


def check_versions() -> None:
    """Raise `ValueError`, one line with the remedy, for libraries that the project does not work with."""
    wrong, remedy = [], []
    for tested, works in working_ranges().items():
        try:
            installed = metadata.version(tested.name)
        except metadata.PackageNotFoundError:
            installed = None
        # A build of one's own, or of tonight, counts by its number.
        if installed is None or not works.contains(installed, prereleases=True):
            wrong.append(f"{tested.name} {installed or 'is not installed'} (works: {works})")
            remedy.append(str(tested))
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: pip install {' '.join(remedy)}")
