"""The evaluation's pictures: retrieval as a heat map, perplexity by position as a curve."""

from __future__ import annotations

import math

from matplotlib.figure import Figure


def heat_map(accuracy: dict[tuple[int, float], float], *, title: str) -> Figure:
    """Accuracy by length (x) and depth (y), 0 to 1 whatever the values, written into the cells."""
    lengths = sorted({length for length, _ in accuracy})
    depths = sorted({depth for _, depth in accuracy})
    values = [[accuracy[length, depth] for length in lengths] for depth in depths]
    figure = Figure(
        figsize=(max(6.0, 2.6 + 0.75 * len(lengths)), max(3.6, 1.8 + 0.34 * len(depths))),
        layout="constrained",
    )
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [short(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set(title=title, xlabel="context length (tokens)", ylabel="depth of the fact (%)")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "black" if value > 0.6 else "white"
            axes.text(
                column, row, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=8
            )
    figure.colorbar(image, label="share of answers that are right")
    return figure


def perplexity_curve(rows: list[dict], *, title: str) -> Figure:
    """Perplexity over the positions of the targets, with two standard errors."""
    rows = [row for row in rows if row["kind"] == "position"]
    figure = Figure(figsize=(max(6.5, 1.5 + 0.75 * len(rows)), 4.6), layout="constrained")
    axes = figure.subplots()
    values = [row["perplexity"] for row in rows]
    errors = [row["loss_standard_error"] or 0.0 for row in rows]
    low = [math.exp(row["loss"] - 2 * e) for row, e in zip(rows, errors, strict=True)]
    high = [math.exp(row["loss"] + 2 * e) for row, e in zip(rows, errors, strict=True)]
    places = range(len(rows))
    axes.fill_between(places, low, high, alpha=0.2, label="± 2 standard errors of the documents")
    axes.plot(places, values, marker="o", label=f"{rows[0]['documents']} documents")
    axes.set_xticks(places, [f"{row['first']}–\n{row['last']}" for row in rows], fontsize=8)
    axes.set(title=title, xlabel="position of the predicted token", ylabel="perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
