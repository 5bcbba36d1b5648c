"""Writes what the laboratory measured: CSV files for programs, a Markdown report for people.

Guarantees: the exact and the rounding part of a change never share a number. Every table says what it
averages over, and the report says how the inputs were made.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, object]


@dataclass(frozen=True)
class Measurements:
    """All that one run of the laboratory found."""

    setting: dict[str, str]
    """What was measured, for people: name of a circumstance -> its value."""
    changes: list[Row]
    """`precision.Change` with its row `length`."""
    steps: list[Row]
    """The same at the greatest shift, with `step`, `rounded` ("alone", "up to here") and `dtype`."""
    tokens: list[Row]
    """`precision.TokenChange` with its row `length`: a column for each distance from the first token."""
    rotation_seconds: dict[str, dict[str, float]]
    """dtype -> `precision.time_rotation`"""

    def values(self, column: str) -> list:
        """The different values of a column of `changes`, in the order of measurement."""
        return list(dict.fromkeys(row[column] for row in self.changes))


def mean_of(rows: Iterable[Row], value: str, **where) -> float:
    """The mean of a column over the rows whose columns equal `where` (layers and heads, as a rule)."""
    found = [row[value] for row in rows if all(row[name] == want for name, want in where.items())]
    assert found, f"no measurement with {where}"
    return sum(found) / len(found)


def max_of(rows: Iterable[Row], value: str, **where) -> float:
    """The largest value of a column over the rows whose columns equal `where`."""
    return max(row[value] for row in rows if all(row[n] == want for n, want in where.items()))


def write_csv(path: Path, rows: list[Row]) -> None:
    """The columns of all rows; where a row lacks one (a layer's window ends sooner), its cell stays empty."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)


def write_report(path: Path, found: Measurements, *, pictures: list[str]) -> None:
    """Write the Markdown report."""
    lengths, shifts = found.values("length"), found.values("shift")
    patterns, arithmetics = found.values("pattern"), found.values("arithmetic")
    longest, farthest = max(lengths), max(shifts)

    def changed(quantity: str, column: str, reduce: Callable = mean_of, **where) -> str:
        return f"{reduce(found.changes, column, quantity=quantity, **where):.3g}"

    lines = [
        "# What rounding does to RoPE in this model",
        "",
        "When the positions of all tokens grow by the same shift, RoPE leaves every attention score as it",
        "is, in exact arithmetic. This report gives the change that rounding makes of it. Queries and",
        "keys are those of one forward pass over the row with plain causal attention; every pattern and",
        "arithmetic gets the same ones, rounded to its type beforehand, so that only positions, masks and",
        "RoPE's own rounding differ. The error is that of one attention layer; it is not followed from",
        "layer to layer.",
        "",
        *_table(["circumstance", "value"], [[k, v] for k, v in found.setting.items()]),
        "",
        "Words: a *logit* is a scaled score before softmax, a *weight* one after it. The *exact part* is",
        "the change in float64. The *rounding part* is the change in the arithmetic under test, less the",
        "exact part. *First token*: the first one that a query sees. Unless a table says otherwise,",
        "numbers are means over layers, heads and the sampled queries.",
        "",
        f"## By row length (shift {farthest:,}): the rounding part",
        "",
    ]
    columns = [
        ("logit, mean of a pair", "logit", "rounding_mean", mean_of),
        ("logit, worst pair", "logit", "rounding_max", max_of),
        ("logits, sum over a query's tokens", "logit", "rounding_sum_per_query", mean_of),
        ("weights, sum over a query's tokens", "weight", "rounding_sum_per_query", mean_of),
        ("first token's share of the weights' change", "weight", "first_share", mean_of),
        ("times an average token's", "weight", "first_share_over_average", mean_of),
    ]
    lines += _table(
        ["arithmetic", "pattern", "length", *(title for title, *_ in columns)],
        [
            [a, p, f"{s:,}"]
            + [
                changed(quantity, column, reduce, arithmetic=a, length=s, shift=farthest, pattern=p)
                for _, quantity, column, reduce in columns
            ]
            for a in arithmetics
            for p in patterns
            for s in lengths
        ],
    )
    lines += ["", *_growth(found, farthest), ""]

    lines += [
        f"## By shift ({longest:,} tokens): weights, rounding part, sum over a query",
        "",
        *_table(
            ["arithmetic", "pattern", *(f"shift {shift:,}" for shift in shifts)],
            [
                [a, p]
                + [
                    changed(
                        "weight",
                        "rounding_sum_per_query",
                        arithmetic=a,
                        length=longest,
                        shift=shift,
                        pattern=p,
                    )
                    for shift in shifts
                ]
                for a in arithmetics
                for p in patterns
            ],
        ),
        "",
        f"## By pattern ({longest:,} tokens, shift {farthest:,})",
        "",
        "Exact part: zero to float64's rounding where all positions move together. Under `anchor` the",
        "anchor stays at position 0 while its document moves, so its distance, and with it its logit, is",
        "meant to change. That is the model's arithmetic, not an error.",
        "",
    ]
    where = {"length": longest, "shift": farthest}
    exact = {"arithmetic": arithmetics[0], **where}
    lines += _table(
        [
            "pattern",
            "largest logit change, first token or other",
            "mean logit change of the first token",
            "weights, sum over a query's tokens",
        ],
        [
            [
                p,
                changed("logit", "exact_max", max_of, pattern=p, **exact),
                changed("logit", "first_exact_mean", pattern=p, **exact),
                changed("weight", "exact_sum_per_query", pattern=p, **exact),
            ]
            for p in patterns
        ],
    )
    lines += [
        "",
        "Rounding part. *Error of the first key*: the largest error of the rotated key of the first token",
        "after the shift. An anchor's key stands at position 0, where the rotation is the identity, so its",
        "error is zero (with yarn, the error of its scaling); the queries that meet it are still rounded.",
        "",
        *_table(
            [
                "arithmetic",
                "pattern",
                "error of the first key",
                "first token's logit, mean",
                "all logits, mean",
                "logits, sum over a query's tokens",
                "weights, sum over a query's tokens",
                "first token's share of the weights' change",
            ],
            [
                [
                    a,
                    p,
                    changed("logit", "first_key_error", max_of, arithmetic=a, pattern=p, **where),
                ]
                + [
                    changed(quantity, column, arithmetic=a, pattern=p, **where)
                    for quantity, column in (
                        ("logit", "first_rounding_mean"),
                        ("logit", "rounding_mean"),
                        ("logit", "rounding_sum_per_query"),
                        ("weight", "rounding_sum_per_query"),
                        ("weight", "first_share"),
                    )
                ]
                for a in arithmetics
                for p in patterns
            ],
        ),
        "",
        f"## Where it arises ({longest:,} tokens, shift {farthest:,})",
        "",
        "Mean rounding part of a logit, each step rounded alone, all others in float64, and rounded",
        "together with the steps before it. `angles` are position × frequency with cosine and sine in",
        "float32; `tables` cos and sin in the model's type, as transformers keeps them; `rotation` its two",
        "products; `kernel` the rotated queries and keys; `score` their product and its scaling, each in the",
        "model's type, as in eager attention (a flash kernel keeps float32; the tables above are its).",
        "In the 16-bit types `score` alone is next to nothing: without the other steps' rounding a shift",
        "leaves the scores equal but for float32's error in their sums, and equal scores round equally. Only",
        "where that error crosses an edge of the rounding does a score change, and with `anchor` the first",
        "token's, whose distance does grow.",
        "",
    ]
    dtypes = list(dict.fromkeys(row["dtype"] for row in found.steps))
    steps = list(dict.fromkeys(row["step"] for row in found.steps))
    steps_here = [r for r in found.steps if r["length"] == longest and r["quantity"] == "logit"]
    lines += _table(
        [
            "pattern",
            "step",
            *(f"{dtype}, {how}" for dtype in dtypes for how in ("alone", "up to here")),
        ],
        [
            [p, step]
            + [
                f"{mean_of(steps_here, 'rounding_mean', pattern=p, step=step, rounded=how, dtype=d):.3g}"
                for d in dtypes
                for how in ("alone", "up to here")
            ]
            for p in patterns
            for step in steps
        ],
    )
    lines += [
        "",
        "## What rotating in float32 costs",
        "",
        f"One layer's queries and keys of {longest:,} tokens, cos and sin given; median of several runs on "
        "this machine.",
        "",
        *_table(
            ["model's type", "rotation in it, s", "in float32, rounded once, s", "ratio"],
            [
                [d, f"{t['model']:.3g}", f"{t['float32']:.3g}", f"{t['float32'] / t['model']:.2f}"]
                for d, t in found.rotation_seconds.items()
            ],
        ),
        "",
        "## Pictures",
        "",
        *(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures),
    ]
    path.write_text("\n".join(lines) + "\n")


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
            mean_of(found.changes, column, quantity=quantity, length=length, shift=shift, **where)
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
                for a in found.values("arithmetic")
                for p in found.values("pattern")
            ],
        ),
    ]


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(cells) + " |" for cells in body),
    ]
