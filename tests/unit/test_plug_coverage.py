"""Every family of the README's table, run: equal to the dense reference, no leak, or refused by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import transformers

from tests import model_coverage as coverage

README = (Path(__file__).parents[2] / "README.md").read_text()
cover = cache(coverage.cover)


@pytest.mark.parametrize("family", sorted(set(coverage.FAMILIES) - set(coverage.REFUSED)))
def test_a_supported_family_equals_the_dense_reference_and_leaks_nothing(family):
    result = cover(family)
    assert all(result.passed.values()), result.reason
    assert {"flash", "flex"} <= set(result.passed)


@pytest.mark.parametrize("family", sorted(coverage.REFUSED))
def test_an_unsupported_family_is_refused_with_the_reason(family):
    result = cover(family)
    assert not any(result.passed.values())
    assert result.reason.startswith("ValueError") and coverage.REFUSED[family] in result.reason


def test_families_with_a_window_are_run_with_one_that_hides_something():
    assert set(cover("mistral").passed) == {"flash", "flex", "window"}
    tokens, layout = coverage.row("shared")
    wide, narrow = (
        coverage.dense_logits(coverage.tiny_model("mistral", window=w), tokens, layout)
        for w in (4096, coverage.WINDOW)
    )
    assert (wide - narrow).abs().max() > 0.1


def test_the_readme_shows_these_results():
    """Costs nothing after the tests above, which ran every family."""
    _, _, run_with = README.partition("\nRun with torch ")
    if f"transformers {transformers.__version__}." not in run_with.splitlines()[0]:
        pytest.skip("the README's table is of another version of transformers")
    table = coverage.table({family: cover(family) for family in coverage.FAMILIES})
    header, *_ = table.splitlines()
    start = README.index(header)
    assert README[start : README.index("\n\n", start)].splitlines() == table.splitlines()
