"""Every family of the table of models, run: equal to the dense reference, no leak, or refused by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig

from anchor_context.integrations.calls import layer_windows
from anchor_context.integrations.models import set_attention
from tests import model_coverage as coverage

README = (Path(__file__).parents[2] / "anchor_context/integrations/README.md").read_text()
cover = cache(coverage.cover)


CAPPED = ("gemma2", "vaultgemma")
"""Families whose scores are capped, which no kernel of the CPU computes."""


@pytest.mark.parametrize("family", sorted(set(coverage.FAMILIES) - set(coverage.REFUSED)))
def test_a_supported_family_equals_the_dense_reference_and_leaks_nothing(family):
    result = cover(family)
    on_cuda = {"flash", "ring"} if family in CAPPED else set()
    expected = {label: coverage.ON_CUDA if label in on_cuda else True for label in coverage.COLUMNS}
    if family in coverage.NOT_TRAINED:
        expected["train.py"] = False
        assert coverage.NOT_TRAINED[family] in result.reason
    assert result.passed == expected, result.reason


@pytest.mark.parametrize("family", sorted(coverage.REFUSED))
def test_an_unsupported_family_is_refused_with_the_reason(family):
    result = cover(family)
    assert not any(result.passed.values())
    assert result.reason.startswith("ValueError") and coverage.REFUSED[family] in result.reason


def test_families_with_a_window_are_run_with_one_that_hides_something():
    assert cover("mistral").windows is not None and cover("llama").windows is None
    for family in WITH_WINDOWS:
        on_cuda = {"flash", "ring"} if family in CAPPED else set()
        assert {way for way, held in cover(family).windows.items() if not held} == on_cuda
    tokens, layout = coverage.row("shared")
    wide, narrow = (
        coverage.dense_logits(coverage.tiny_model("mistral", window=w), tokens, layout)
        for w in (4096, coverage.WINDOW)
    )
    assert (wide - narrow).abs().max() > 0.1


def test_families_with_sinks_are_run_with_some():
    assert [f for f in coverage.FAMILIES if cover(f).sinks] == ["gpt_oss"]
    sinks = coverage.tiny_model("gpt_oss", window=4096).model.layers[0].self_attn.sinks
    assert sinks.abs().min() > 0.01


WITH_WINDOWS = sorted(
    family
    for family in set(coverage.FAMILIES) - set(coverage.REFUSED)
    if coverage.knows_windows(AutoConfig.for_model(family))
)


@pytest.mark.parametrize("family", WITH_WINDOWS)
def test_the_windows_of_layers_are_told_before_they_attend(family):
    """A ring is planned for them, and refuses a layer that comes with another."""
    model, used = coverage.tiny_model(family, window=coverage.WINDOW), []

    def attend(q, k, v, layout, *, scale, sliding_window, **more):
        used.append(sliding_window)
        return q

    set_attention(model, attend)
    tokens, layout = coverage.row("per_document")
    model(tokens, position_ids=layout.position_ids, layout=layout, use_cache=False)
    assert tuple(used) == layer_windows(model.config)
    assert coverage.WINDOW in used or family == "dots1"  # whose first layers see everything


def test_the_readme_shows_these_results():
    """Costs nothing after the tests above, which ran every family."""
    _, _, run_with = README.partition("\nRun with torch ")
    if f"transformers {transformers.__version__}." not in run_with.splitlines()[0]:
        pytest.skip("the README's table is of another version of transformers")
    table = coverage.table({family: cover(family) for family in coverage.FAMILIES})
    header, *_ = table.splitlines()
    start = README.index(header)
    assert README[start : README.index("\n\n", start)].splitlines() == table.splitlines()
