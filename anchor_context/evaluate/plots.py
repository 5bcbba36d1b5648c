"""The evaluation's pictures: retrieval as a heat map, perplexity and loss by position as curves."""

from __future__ import annotations

import math
from itertools import pairwise

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def heat_map(accuracy: dict[tuple[int, float], float], *, title: str) -> Figure:
    """Accuracy by length (x) and depth (y), 0 to 1 whatever the values, written into the cells."""
    depths = sorted({depth for _, depth in accuracy})
    figure = cells(
        {(length, f"{depth:g}"): value for (length, depth), value in accuracy.items()},
        lines=[f"{depth:g}" for depth in depths],
        title=title,
        label="share of answers that are right",
    )
    figure.axes[0].set_ylabel("depth of the fact (%)")
    return figure


def task_map(scores: dict[tuple[int, str], float], *, title: str) -> Figure:
    """Scores by length (x) and task (y), 0 to 1 whatever the values, written into the cells."""
    tasks = list(dict.fromkeys(task for _, task in scores))
    return cells(scores, lines=tasks, title=title, label="share of the answers found")


def cells(
    values: dict[tuple[int, str], float], *, lines: list[str], title: str, label: str
) -> Figure:
    """A value from 0 to 1 for each (length, line): lengths to the right, lines downwards."""
    lengths = sorted({length for length, _ in values})
    table = [[values[length, line] for length in lengths] for line in lines]
    figure = Figure(
        figsize=(max(6.0, 2.6 + 0.75 * len(lengths)), max(3.6, 1.8 + 0.34 * len(lines))),
        layout="constrained",
    )
    axes = figure.subplots()
    image = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [short(length) for length in lengths])
    axes.set_yticks(range(len(lines)), lines)
    axes.set(title=title, xlabel="context length (tokens)")
    for row, line in enumerate(table):
        for column, value in enumerate(line):
            colour = "black" if value > 0.6 else "white"
            axes.text(
                column, row, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=8
            )
    figure.colorbar(image, label=label)
    return figure


def perplexity_curve(rows: list[dict], *, title: str) -> Figure:
    """Perplexity over the positions of the targets, with two standard errors where they are known."""
    rows = [row for row in rows if row["kind"] == "position"]
    figure = Figure(figsize=(max(6.5, 1.5 + 0.75 * len(rows)), 4.6), layout="constrained")
    axes = figure.subplots()
    values = [row["perplexity"] for row in rows]
    places, documents = range(len(rows)), rows[0]["documents"]
    errors = [row["loss_standard_error"] for row in rows]
    if None not in errors:
        low = [math.exp(row["loss"] - 2 * e) for row, e in zip(rows, errors, strict=True)]
        high = [math.exp(row["loss"] + 2 * e) for row, e in zip(rows, errors, strict=True)]
        band = "± 2 standard errors of the documents"
        axes.fill_between(places, low, high, alpha=0.2, label=band)
    axes.plot(places, values, marker="o", label=f"{documents} document{'s' * (documents > 1)}")
    axes.set_xticks(places, [f"{row['first']}–\n{row['last']}" for row in rows], fontsize=8)
    axes.set(title=title, xlabel="position of the predicted token", ylabel="perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def loss_by_position(records: list[dict]) -> Figure:
    """The loss over the position in the document: a curve per validation, from the first (dark) to the last.

    Args:
        records: of `metrics.jsonl`, with `step`, `eval_loss_by_position` and `eval_loss_alone_by_position`.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    steps = [record["step"] for record in records]
    scale = Normalize(min(steps), max(steps) if len(steps) > 1 else min(steps) + 1)
    colours = ScalarMappable(scale, "viridis")
    for axes, key, title in zip(
        panels,
        ("eval_loss_by_position", "eval_loss_alone_by_position"),
        ("packed, in the pattern of training", "each document alone, behind a BOS"),
        strict=True,
    ):
        for record in records:
            by_position = record[key]
            losses = [math.nan if loss is None else loss for loss in by_position.values()]
            axes.plot(range(len(losses)), losses, marker="o", color=colours.to_rgba(record["step"]))
        firsts = [*map(int, by_position)]
        labels = [f"{first}–{end - 1}" for first, end in pairwise(firsts)] + [f"from {firsts[-1]}"]
        axes.set_xticks(range(len(firsts)), labels, rotation=45 if len(firsts) > 6 else 0)
        axes.set(title=title, xlabel="position of the predicted token in its document")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per target token)")
    if len(steps) > 1:
        figure.colorbar(colours, ax=panels, label="step", ticks=MaxNLocator(integer=True))
    return figure


def short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
