"""The laboratory's pictures, one function each, from the same rows as the CSV files.

Guarantees: axes carry names, units and at least two numbers, every pattern is shown, patterns side by side
on one scale, an arithmetic has the same colour in every picture, a pattern has its own (`Pattern.colour`),
and exact and rounding part never share an axis.
"""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from anchor_context.attention.patterns import PATTERNS
from anchor_context.precision.report import Measurements
from anchor_context.precision.table import Table

COLOURS = {
    "float32": "#0072b2",
    "bfloat16": "#d55e00",
    "bfloat16, rotated in float32": "#e69f00",
    "float16": "#009e73",
    "float16, rotated in float32": "#56b4e9",
}
MARKERS = dict(zip(COLOURS, "os^Dv", strict=True))
DECADES_BY_STEP = 4
"""What the axes of `by_step` span, downwards from the largest curve."""
QUANTITIES = {
    "logit": "sum of |logit change|\nover a query's tokens",
    "weight": "sum of |weight change|\nover a query's tokens",
}


def of_first_token(found: Measurements) -> Figure:
    """The first token's share of the change, and the change itself, of the patterns on one scale."""
    lengths, shift = found.values("length"), max(found.values("shift"))
    arithmetic = _least_exact(found)
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    figure.suptitle(
        f"Rounding part of the weights' change: {arithmetic}, shift {shift:,} positions"
    )
    share, change = figure.subplots(1, 2)
    for number, pattern in enumerate(found.values("pattern")):
        where = {"arithmetic": arithmetic, "pattern": pattern, "shift": shift, "quantity": "weight"}
        for axes, column in (
            (share, "first_share_over_average"),
            (change, "rounding_sum_per_query"),
        ):
            axes.plot(
                lengths,
                [found.changes.mean(column, length=length, **where) for length in lengths],
                color=PATTERNS[pattern].colour,
                label=pattern,
                # Two patterns may lie on each other.
                marker="o^vs"[number % 4],
                markersize=10 - 1.5 * number,
                linewidth=4 - 0.8 * number,
                markerfacecolor="none",
            )
    share.axhline(1, color="grey", linestyle=":", linewidth=1, label="an average token's share")
    share.set_ylabel("first token's share\n(multiple of an average token's)")
    change.set_ylabel(QUANTITIES["weight"])
    for axes in (share, change):
        axes.set(xscale="log", yscale="log", xlabel="row length S (tokens)")
        axes.grid(alpha=0.3)
        _powers_of_two(axes, lengths)
        _number(axes)
    _legend_below(figure)
    return figure


def by_length(found: Measurements) -> Figure:
    shift = max(found.values("shift"))
    said = f"shift {shift:,} positions"
    return _over(found, "length", "row length S (tokens)", {"shift": shift}, said)


def by_shift(found: Measurements) -> Figure:
    length = max(found.values("length"))
    said = f"row of {length:,} tokens"
    return _over(found, "shift", "shift of all positions (tokens)", {"length": length}, said)


def _over(found: Measurements, column: str, label: str, fixed: dict, said: str) -> Figure:
    figure, rows = _by_pattern(found, len(QUANTITIES), f"Rounding part of the change: {said}")
    x = [value for value in found.values(column) if value > 0]  # a logarithmic axis has no 0
    for row, (quantity, title) in zip(rows, QUANTITIES.items(), strict=True):
        for pattern, axes in row.items():
            for arithmetic in found.values("arithmetic"):
                where = {
                    "arithmetic": arithmetic,
                    "quantity": quantity,
                    "pattern": pattern,
                    **fixed,
                }
                y = [
                    found.changes.mean("rounding_sum_per_query", **{column: value}, **where)
                    for value in x
                ]
                _line(axes, x, y, arithmetic)
            axes.set(xscale="log", yscale="log", xlabel=label)
            _powers_of_two(axes, x)
        _first(row).set_ylabel(title)
        _number(_first(row))
    _legend_below(figure)
    return figure


def by_token(found: Measurements) -> Figure:
    """By distance from the first token, and the first token's share, over row lengths."""
    lengths, shift = found.values("length"), max(found.values("shift"))
    figure, (profiles, shares) = _by_pattern(
        found,
        2,
        f"Rounding part of the weights: shift {shift:,} positions (above: row of {max(lengths):,} tokens)",
    )
    here = found.tokens.where(length=max(lengths), shift=shift, quantity="weight")
    for pattern in found.values("pattern"):
        for arithmetic in found.values("arithmetic"):
            where = {"arithmetic": arithmetic, "pattern": pattern}
            starts, means = _profile(here.where(**where))
            _line(profiles[pattern], starts, means, arithmetic)
            where |= {"quantity": "weight", "shift": shift}
            share = [
                found.changes.mean("first_share_over_average", length=length, **where)
                for length in lengths
            ]
            _line(shares[pattern], lengths, share, arithmetic)
        profiles[pattern].set_xscale("symlog", linthresh=1, base=2)
        _powers_of_two(profiles[pattern], starts)
        profiles[pattern].set(yscale="log", xlabel="distance from the first token seen (tokens)")
        shares[pattern].set(xscale="log", xlabel="row length S (tokens)", ylim=(0, None))
        _powers_of_two(shares[pattern], lengths)
        shares[pattern].axhline(1, color="grey", linestyle=":", linewidth=1)
    _number(_first(profiles))
    _first(profiles).set_ylabel("mean |weight change| of a token")
    _first(shares).set_ylabel("first token's share of the change\n(multiple of an average token's)")
    _legend_below(figure)
    return figure


def _profile(tokens: Table) -> tuple[list[int], list[float]]:
    """Where each bin of distances starts, and the mean there over the rows (layers) that reach so far."""
    columns = {name for row in tokens.rows for name in row if name.startswith("distance_")}
    starts = {int(name.split("_")[1]): name for name in columns}
    return sorted(starts), [tokens.mean(starts[start]) for start in sorted(starts)]


def by_pattern(found: Measurements) -> Figure:
    """What each pattern removes and what it does not, the two parts apart."""
    length, shift = max(found.values("length")), max(found.values("shift"))
    logits = found.changes.where(length=length, shift=shift, quantity="logit")
    patterns, arithmetics = found.values("pattern"), found.values("arithmetic")
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(
        f"What a pattern removes of the change, and what not: row of {length:,} tokens, "
        f"shift {shift:,} positions"
    )
    (all_tokens, first_token), (first_key, exact) = figure.subplots(2, 2)

    width = 0.8 / len(arithmetics)
    for axes, column, reduce in (
        (all_tokens, "rounding_sum_per_query", Table.mean),
        (first_token, "first_rounding_mean", Table.mean),
        (first_key, "first_key_error", Table.max),
    ):
        smallest = min((row[column] for row in logits.rows if row[column] > 0), default=1e-9)
        for number, arithmetic in enumerate(arithmetics):
            offset = (number - (len(arithmetics) - 1) / 2) * width
            heights = [reduce(logits, column, arithmetic=arithmetic, pattern=p) for p in patterns]
            at = [place + offset for place in range(len(patterns))]
            axes.bar(at, heights, width, color=COLOURS[arithmetic], label=arithmetic)
            for x, height in zip(at, heights, strict=True):
                if height == 0:
                    axes.annotate("0", (x, smallest / 8), ha="center", va="bottom", fontsize=8)
        if column == "first_key_error":  # zero has a place on this axis
            axes.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(smallest)))
            axes.set_ylim(bottom=0)
        else:  # bars on a logarithmic axis start anywhere: a decade below the shortest
            axes.set_yscale("log")
            axes.set_ylim(bottom=min(bar.get_height() for bar in axes.patches) / 10)
            _number(axes)
    floor = 1e-19
    heights = [
        max(logits.mean("first_exact_mean", arithmetic=arithmetics[0], pattern=p), floor)
        for p in patterns
    ]
    exact.bar(range(len(patterns)), heights, 0.6, color="#666666")
    exact.axhline(1e-10, color="black", linestyle=":", linewidth=1)
    exact.set(yscale="log", ylim=(floor, max(10, 10 * max(heights))))

    all_tokens.set(title="rounding part: all tokens", ylabel=QUANTITIES["logit"])
    first_token.set(title="rounding part: the first token's logit", ylabel="mean |logit change|")
    first_key.set(
        title="rounding part: the first token's rotated key", ylabel="largest error of an element"
    )
    exact.set(
        title="exact part (float64): the first token's logit; dotted: 1e-10",
        ylabel="mean |logit change|",
    )
    for axes in figure.axes:
        axes.set_xticks(range(len(patterns)), patterns)
        axes.grid(axis="y", alpha=0.3)
        axes.set_xlabel("attention pattern")
    _legend_below(figure)
    return figure


def by_step(found: Measurements) -> Figure:
    """Where it arises: every step rounded alone, over row lengths, for each type.

    A curve is thinner than those drawn before it, so that it hides none that it lies on. One that lies
    below the axes is named there: rounding the score alone changes next to nothing, in 16-bit types.
    """
    lengths, shift = found.values("length"), max(found.values("shift"))
    dtypes, steps = found.steps.values("dtype"), found.steps.values("step")
    figure, rows = _by_pattern(
        found, len(dtypes), f"Rounding part by step: shift {shift:,} positions"
    )
    lines = [*((step, "alone") for step in steps), (steps[-1], "up to here")]
    for row, dtype in zip(rows, dtypes, strict=True):
        of_type = found.steps.where(dtype=dtype, quantity="logit")
        largest = max(
            of_type.mean("rounding_mean", length=s, pattern=p, step=step, rounded=how)
            for s in lengths
            for p in row
            for step, how in lines
        )
        lowest = largest / 10**DECADES_BY_STEP
        for pattern, axes in row.items():
            below = []
            for number, (step, how) in enumerate(lines):
                where = {"pattern": pattern, "step": step, "rounded": how}
                y = [of_type.mean("rounding_mean", length=length, **where) for length in lengths]
                together = how == "up to here"
                name = "all together" if together else f"{step} alone"
                axes.plot(
                    lengths,
                    y,
                    marker="osD^vx"[number],
                    markersize=12 - 1.5 * number,
                    markerfacecolor="none",
                    linewidth=5 - 0.8 * number,
                    color="black" if together else f"C{number}",
                    linestyle="--" if together else "-",
                    label=name,
                )
                below += [name] * (max(y) < lowest)
            axes.set(xscale="log", yscale="log", xlabel="row length S (tokens)")
            axes.set_ylim(lowest, 2 * largest)
            if below:
                said = f"↓ below: {', '.join(below)}"
                axes.text(0.02, 0.03, said, transform=axes.transAxes, fontsize=8)
            _powers_of_two(axes, lengths)
        _first(row).set_ylabel(f"{dtype}: mean |logit change| of a pair")
    _legend_below(figure)
    return figure


def by_head(found: Measurements) -> Figure:
    """The weights' rounding part by layer and head, in the least exact arithmetic of the model's own."""
    length, shift = max(found.values("length")), max(found.values("shift"))
    arithmetic = _least_exact(found)
    layers, heads = found.values("layer"), sorted(found.values("head"))
    where = {"arithmetic": arithmetic, "quantity": "weight", "length": length, "shift": shift}
    values = {
        pattern: [
            [
                found.changes.mean(
                    "rounding_sum_per_query",
                    layer=layer,
                    head=head,
                    pattern=pattern,
                    **where,
                )
                for head in heads
            ]
            for layer in layers
        ]
        for pattern in found.values("pattern")
    }
    figure, (row,) = _by_pattern(
        found,
        1,
        f"Rounding part by layer and head: {arithmetic}, row of {length:,} tokens, "
        f"shift {shift:,} positions",
        height=max(3.0, 1.2 + 0.28 * len(layers)),
    )
    # From the smallest to the largest: heads differ by less than from 0.
    every = [value for lines in values.values() for line in lines for value in line]
    for pattern, axes in row.items():
        image = axes.imshow(
            values[pattern],
            aspect="auto",
            cmap="viridis",
            origin="lower",
            vmin=min(every),
            vmax=max(every),
        )
        axes.grid(visible=False)
        axes.set_xlabel("head")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        shown = range(0, len(layers), -(-len(layers) // 10))
        axes.set_yticks(shown, [str(layers[place]) for place in shown])
    _first(row).set_ylabel("layer")
    figure.colorbar(image, ax=list(row.values()), label=QUANTITIES["weight"])
    return figure


def _by_pattern(
    found: Measurements, rows: int, title: str, *, height: float = 3.3
) -> tuple[Figure, list[dict[str, Axes]]]:
    """A column of axes for every pattern, and so many rows; a row shares its vertical scale."""
    patterns = found.values("pattern")
    figure = Figure(figsize=(1.2 + 3.4 * max(2, len(patterns)), 1.2 + height * rows))
    figure.set_layout_engine("constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, len(patterns), squeeze=False, sharey="row")
    for pattern, axes in zip(patterns, grid[0], strict=True):
        axes.set_title(f"pattern {pattern}")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    return figure, [dict(zip(patterns, row, strict=True)) for row in grid]


def _least_exact(found: Measurements) -> str:
    """Of the model's own arithmetics, the one that rounds most."""
    measured = found.values("arithmetic")
    return next(a for a in ("bfloat16", "float16", "float32") if a in measured)


def _first(row: dict[str, Axes]) -> Axes:
    return next(iter(row.values()))


def _line(axes: Axes, x: list, y: list, arithmetic: str) -> None:
    axes.plot(x, y, marker=MARKERS[arithmetic], color=COLOURS[arithmetic], label=arithmetic)


def _powers_of_two(axes: Axes, values: list[int]) -> None:
    """Ticks at the measured values, thinned to at most eight."""
    shown = values[:: -(-len(values) // 8)]
    axes.set_xticks(shown, [_short(value) for value in shown], minor=False)
    axes.set_xticks([], minor=True)


def _number(axes: Axes) -> None:
    """Enough numbers on a logarithmic vertical axis whose curves are all drawn: matplotlib shows powers
    of ten, of which there may be one, or none, between them."""
    low, high = axes.get_ylim()
    decades, axis = math.log10(high / low), axes.yaxis
    if decades < 1:
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=12))
    if decades < 3:
        axis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _legend_below(figure: Figure) -> None:
    """One legend for all axes, outside of them, so that it covers nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=int(figure.get_figwidth() / 2.4)
    )


PICTURES = {
    "first_token.png": of_first_token,
    "change_by_length.png": by_length,
    "change_by_shift.png": by_shift,
    "change_by_token.png": by_token,
    "change_by_pattern.png": by_pattern,
    "change_by_step.png": by_step,
    "change_by_head.png": by_head,
}
"""File name -> what draws it."""
