"""The laboratory's report, to the last byte: `precision_report.md` is what these measurements give."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from anchor_context.precision.report import Measurements, write_report
from anchor_context.precision.table import Table

EXPECTED = Path(__file__).with_name("precision_report.md")
VALUES = (
    *("exact_mean", "exact_max", "exact_sum_per_query"),
    *("rounding_mean", "rounding_max", "rounding_sum_per_query"),
    *("first_exact_mean", "first_rounding_mean", "first_share", "first_share_over_average"),
    "first_key_error",
)


def measurements(*, lengths: list[int]) -> Measurements:
    """Different numbers in every column of every row, so that a cell from a wrong one would show."""
    patterns, quantities, heads = ("full", "anchor"), ("logit", "weight"), (0, 1)

    def rows(**columns: list) -> Table:
        keys = (*columns, "pattern", "head", "quantity")
        found = [
            dict(zip(keys, values, strict=True))
            for values in product(*columns.values(), patterns, heads, quantities)
        ]
        return Table(
            [
                # Three digits are printed: they tell the row, and their decimal point the column.
                row | {name: (100 + n) * 10.0 ** (i - 8) for i, name in enumerate(VALUES)}
                for n, row in enumerate(found)
            ]
        )

    arithmetics = ["bfloat16", "bfloat16, rotated in float32"]
    return Measurements(
        setting={"model": "a tiny one", "machine": "none"},
        changes=rows(length=lengths, arithmetic=arithmetics, shift=[0, 1024]),
        steps=rows(
            length=lengths,
            dtype=["bfloat16"],
            step=["angles", "kernel"],
            rounded=["alone", "up to here"],
        ),
        tokens=Table([]),
        rotation_seconds={"bfloat16": {"model": 0.001, "float32": 0.0024}},
    )


def report(folder: Path, **which) -> str:
    path = folder / "report.md"
    write_report(
        path, measurements(**which), pictures=["change_by_length.png", "change_by_step.png"]
    )
    return path.read_text()


def test_the_report_is_the_same_to_the_last_byte(tmp_path):
    assert report(tmp_path, lengths=[1024, 4096]) == EXPECTED.read_text()


def test_one_length_shows_no_growth(tmp_path):
    text = report(tmp_path, lengths=[4096])
    assert "One length was measured; growth with length needs two." in text.splitlines()
    assert "it grows by these factors" not in text
