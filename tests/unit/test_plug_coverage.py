"""Every family of the README's table, run: equal to the dense reference, no leak, or refused by name."""

from __future__ import annotations

import pytest

from tests import model_coverage as coverage


@pytest.mark.parametrize("family", sorted(set(coverage.FAMILIES) - set(coverage.REFUSED)))
def test_a_supported_family_equals_the_dense_reference_and_leaks_nothing(family):
    result = coverage.cover(family)
    assert all(result.passed.values()), result.reason
    assert {"flash", "flex"} <= set(result.passed)


@pytest.mark.parametrize("family", sorted(coverage.REFUSED))
def test_an_unsupported_family_is_refused_with_the_reason(family):
    result = coverage.cover(family)
    assert not any(result.passed.values())
    assert result.reason.startswith("ValueError") and coverage.REFUSED[family] in result.reason


def test_families_with_a_window_are_run_with_one_that_hides_something():
    assert set(coverage.cover("mistral").passed) == {"flash", "flex", "window"}
    tokens, layout = coverage.row("shared")
    wide, narrow = (
        coverage.dense_logits(coverage.tiny_model("mistral", window=w), tokens, layout)
        for w in (4096, coverage.WINDOW)
    )
    assert (wide - narrow).abs().max() > 0.1
