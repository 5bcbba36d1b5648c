"""Writes what the laboratory measured as a Markdown report for people.

Guarantees: the exact and the rounding part of a change never share a number. Every table says what it
averages over, and the report says how the inputs were made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from anchor_context.precision.table import Table


@dataclass(frozen=True)
class Measurements:
    """All that one run of the laboratory found."""

    setting: dict[str, str]
    """What was measured, for people: name of a circumstance -> its value."""
    changes: Table
    """`measure.Change` with its row `length`."""
    steps: Table
    """The same at the greatest shift, with `step`, `rounded` ("alone", "up to here") and `dtype`."""
    tokens: Table
    """`measure.TokenChange` with its row `length`: a column for each distance from the first token."""
    rotation_seconds: dict[str, dict[str, float]]
    """dtype -> `timing.time_rotation` of the longest row"""

    def values(self, column: str) -> list:
        """The different values of a column of `changes`, in the order of measurement."""
        return self.changes.values(column)


# --------------------------------------------------------------------------------------------------
# The report: one function per heading, each of which returns its lines.


def write_report(path: Path, found: Measurements, *, pictures: list[str]) -> None:
    """Write the Markdown report."""
    sections = (
        _circumstances(found),
        _by_length(found),
        _by_shift(found),
        _by_pattern(found),
        _by_step(found),
        _cost(found),
        _pictures(pictures),
    )
    path.write_text("\n\n".join("\n".join(lines) for lines in sections) + "\n")


INTRODUCTION = """\
When the positions of all tokens grow by the same shift, RoPE leaves every attention score as it
is, in exact arithmetic. This report gives the change that rounding makes of it. Queries and
keys are those of one forward pass over the row with plain causal attention; every pattern and
arithmetic gets the same ones, rounded to its type beforehand, so that only positions, masks and
RoPE's own rounding differ. The error is that of one attention layer; it is not followed from
layer to layer."""

WORDS = """\
Words: a *logit* is a scaled score before softmax, a *weight* one after it. The *exact part* is
the change in float64. The *rounding part* is the change in the arithmetic under test, less the
exact part. *First token*: the first one that a query sees. Unless a table says otherwise,
numbers are means over layers, heads and the sampled queries."""

EXACT_PART = """\
Exact part: zero to float64's rounding where all positions move together. Under `anchor` the
anchor stays at position 0 while its document moves, so its distance, and with it its logit, is
meant to change. That is the model's arithmetic, not an error."""

ROUNDING_PART = """\
Rounding part. *Error of the first key*: the largest error of the rotated key of the first token
after the shift. An anchor's key stands at position 0, where the rotation is the identity, so its
error is zero (with yarn, the error of its scaling); the queries that meet it are still rounded."""

STEPS = """\
Mean rounding part of a logit, each step rounded alone, all others in float64, and rounded
together with the steps before it. `angles` are position × frequency with cosine and sine in
float32; `tables` cos and sin in the model's type, as transformers keeps them; `rotation` its two
products; `kernel` the rotated queries and keys; `score` their product and its scaling, each in the
model's type, as in eager attention (a flash kernel keeps float32; the tables above are its).
In the 16-bit types `score` alone is next to nothing: without the other steps' rounding a shift
leaves the scores equal but for float32's error in their sums, and equal scores round equally. Only
where that error crosses an edge of the rounding does a score change, and with `anchor` the first
token's, whose distance does grow."""


def _circumstances(found: Measurements) -> list[str]:
    """What was measured, and the words of the tables."""
    return [
        "# What rounding does to RoPE in this model",
        "",
        INTRODUCTION,
        "",
        *_table(["circumstance", "value"], [[k, v] for k, v in found.setting.items()]),
        "",
        WORDS,
    ]


def _by_length(found: Measurements) -> list[str]:
    """How large the rounding part is in rows of each length, and by how much it grows."""
    shift = max(found.values("shift"))
    columns = (
        ("logit, mean of a pair", "logit", "rounding_mean", Table.mean),
        ("logit, worst pair", "logit", "rounding_max", Table.max),
        ("logits, sum over a query's tokens", "logit", "rounding_sum_per_query", Table.mean),
        ("weights, sum over a query's tokens", "weight", "rounding_sum_per_query", Table.mean),
        ("first token's share of the weights' change", "weight", "first_share", Table.mean),
        ("times an average token's", "weight", "first_share_over_average", Table.mean),
    )
    body = [
        [arithmetic, pattern, f"{length:,}"]
        + [
            _changed(
                found, *what, arithmetic=arithmetic, pattern=pattern, length=length, shift=shift
            )
            for _, *what in columns
        ]
        for arithmetic, pattern in _arithmetics_and_patterns(found)
        for length in found.values("length")
    ]
    return [
        f"## By row length (shift {shift:,}): the rounding part",
        "",
        *_table(["arithmetic", "pattern", "length", *(title for title, *_ in columns)], body),
        "",
        *_growth(found, shift),
    ]


def _growth(found: Measurements, shift: int) -> list[str]:
    """By how much the rounding part grows with the row's length, as a table."""
    lengths = found.values("length")
    if len(lengths) < 2:
        return ["One length was measured; growth with length needs two."]
    columns = (
        ("logit, mean of a pair", "logit", "rounding_mean"),
        ("logits, sum over a query's tokens", "logit", "rounding_sum_per_query"),
        ("weights, sum over a query's tokens", "weight", "rounding_sum_per_query"),
    )

    def growth(quantity: str, column: str, **where) -> str:
        short, long = (
            found.changes.mean(column, quantity=quantity, length=length, shift=shift, **where)
            for length in (min(lengths), max(lengths))
        )
        return f"× {long / short:.3g}" if short else "0 at first"

    return [
        f"From {min(lengths):,} to {max(lengths):,} tokens it grows by these factors:",
        "",
        *_table(
            ["arithmetic", "pattern", *(title for title, *_ in columns)],
            [
                [a, p, *(growth(*what, arithmetic=a, pattern=p) for _, *what in columns)]
                for a, p in _arithmetics_and_patterns(found)
            ],
        ),
    ]


def _by_shift(found: Measurements) -> list[str]:
    """How the rounding part depends on the shift, in the longest row."""
    length, shifts = max(found.values("length")), found.values("shift")
    what = ("weight", "rounding_sum_per_query")
    body = [
        [a, p]
        + [_changed(found, *what, arithmetic=a, pattern=p, length=length, shift=s) for s in shifts]
        for a, p in _arithmetics_and_patterns(found)
    ]
    return [
        f"## By shift ({length:,} tokens): weights, rounding part, sum over a query",
        "",
        *_table(["arithmetic", "pattern", *(f"shift {shift:,}" for shift in shifts)], body),
    ]


def _by_pattern(found: Measurements) -> list[str]:
    """The exact and the rounding part of each pattern, at the greatest length and shift."""
    where = {"length": max(found.values("length")), "shift": max(found.values("shift"))}
    exact_columns = (
        ("largest logit change, first token or other", "logit", "exact_max", Table.max),
        ("mean logit change of the first token", "logit", "first_exact_mean"),
        ("weights, sum over a query's tokens", "weight", "exact_sum_per_query"),
    )
    one = found.values("arithmetic")[0]  # they share it, but for the rounding of queries and keys
    exact = [
        [p]
        + [_changed(found, *what, arithmetic=one, pattern=p, **where) for _, *what in exact_columns]
        for p in found.values("pattern")
    ]
    rounding_columns = (
        ("error of the first key", "logit", "first_key_error", Table.max),
        ("first token's logit, mean", "logit", "first_rounding_mean"),
        ("all logits, mean", "logit", "rounding_mean"),
        ("logits, sum over a query's tokens", "logit", "rounding_sum_per_query"),
        ("weights, sum over a query's tokens", "weight", "rounding_sum_per_query"),
        ("first token's share of the weights' change", "weight", "first_share"),
    )
    rounding = [
        [a, p]
        + [
            _changed(found, *what, arithmetic=a, pattern=p, **where)
            for _, *what in rounding_columns
        ]
        for a, p in _arithmetics_and_patterns(found)
    ]
    return [
        f"## By pattern ({where['length']:,} tokens, shift {where['shift']:,})",
        "",
        EXACT_PART,
        "",
        *_table(["pattern", *(title for title, *_ in exact_columns)], exact),
        "",
        ROUNDING_PART,
        "",
        *_table(["arithmetic", "pattern", *(title for title, *_ in rounding_columns)], rounding),
    ]


def _by_step(found: Measurements) -> list[str]:
    """The rounding part of each step of the computation, alone and up to it."""
    length, shift = max(found.values("length")), max(found.values("shift"))
    dtypes, steps = found.steps.values("dtype"), found.steps.values("step")
    columns = [(dtype, how) for dtype in dtypes for how in ("alone", "up to here")]
    here = found.steps.where(length=length, quantity="logit")
    body = [
        [pattern, step]
        + [
            f"{here.mean('rounding_mean', pattern=pattern, step=step, rounded=how, dtype=dtype):.3g}"
            for dtype, how in columns
        ]
        for pattern in found.values("pattern")
        for step in steps
    ]
    return [
        f"## Where it arises ({length:,} tokens, shift {shift:,})",
        "",
        STEPS,
        "",
        *_table(["pattern", "step", *(f"{dtype}, {how}" for dtype, how in columns)], body),
    ]


def _cost(found: Measurements) -> list[str]:
    """The time of rotating in float32."""
    length = max(found.values("length"))
    return [
        "## What rotating in float32 costs",
        "",
        f"One layer's queries and keys of {length:,} tokens, cos and sin given; median of several runs on "
        "this machine.",
        "",
        *_table(
            ["model's type", "rotation in it, s", "in float32, rounded once, s", "ratio"],
            [
                [d, f"{t['model']:.3g}", f"{t['float32']:.3g}", f"{t['float32'] / t['model']:.2f}"]
                for d, t in found.rotation_seconds.items()
            ],
        ),
    ]


def _pictures(names: list[str]) -> list[str]:
    return [
        "## Pictures",
        "",
        *(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in names),
    ]


# --------------------------------------------------------------------------------------------------
# Cells and tables


def _arithmetics_and_patterns(found: Measurements) -> list[tuple[str, str]]:
    return list(product(found.values("arithmetic"), found.values("pattern")))


def _changed(
    found: Measurements, quantity: str, column: str, reduce: Callable = Table.mean, **where
) -> str:
    """A cell: a column of `changes` over the rows of this quantity whose columns equal `where`."""
    return f"{reduce(found.changes, column, quantity=quantity, **where):.3g}"


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(cells) + " |" for cells in body),
    ]
