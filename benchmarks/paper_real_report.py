"""What `paper_real.py` found, in tables, claims and pictures; what was not measured yet is left out."""

from __future__ import annotations

import math
import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper_train import COLOURS

from anchor_context.evaluate.plots import short as short_length

CLAIMS = [  # (one, other, the paper has the one's loss lower)
    (("anchor", "bf16"), ("full", "bf16")),
    (("anchor", "bf16"), ("intra_doc", "bf16")),
    (("intra_doc", "bf16"), ("full", "bf16")),
    (("intra_doc_reset", "bf16"), ("intra_doc", "bf16")),
    (("full", "bf16, rotated in float32"), ("full", "bf16")),
    (("anchor", "bf16, rotated in float32"), ("anchor", "bf16")),
]


def of_documents(result: dict, *, first: int, last: int | None = None) -> list[float]:
    """The mean loss of every long document over the target positions first … last (nats)."""
    ranges = [
        r
        for r in result["positions"]
        if r["first"] >= first and (last is None or r["last"] <= last)
    ]
    tokens = [r["last"] - r["first"] + 1 for r in ranges]
    return [
        sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)
        for losses in zip(*(r["losses"] for r in ranges), strict=True)
    ]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error (nan of a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def found(result: dict, task: str) -> dict[int, float]:
    """{length: the share of numbers found, over all depths}"""
    shares: dict[int, list[float]] = {}
    for cell in result["retrieval"]:
        if cell["task"] == task:
            shares.setdefault(cell["length"], []).append(cell["found"])
    return {length: statistics.fmean(values) for length, values in shares.items()}


def table(results: list[dict], *, short: int) -> dict[str, list[str]]:
    """A line per result: losses as mean ± standard error over documents."""

    def told(values: list[float]) -> str:
        mean, error = mean_and_error(values)
        return f"{mean:.3f} ± {error:.3f}"

    columns = {
        "pattern": [r["pattern"] for r in results],
        "type": [r["precision"] for r in results],
        "tokens": [f"{r['tokens']:,}" for r in results],
        "seconds": [f"{r['seconds']:.1f}" for r in results],
        "step s": ["-" if r["step_s"] is None else f"{r['step_s']:.3f}" for r in results],
        f"loss to {short - 1:,}": [told(of_documents(r, first=1, last=short - 1)) for r in results],
        "loss beyond": [told(of_documents(r, first=short)) for r in results],
        "short documents": [told(r["short"]) for r in results],
    }
    for task in ("needle", "passkey"):
        for length in found(results[0], task):
            columns[f"{task} {short_length(length)}"] = [
                f"{found(r, task)[length]:.2f}" for r in results
            ]
    return columns


def compare(results: list[dict], *, short: int) -> list[dict]:
    """The paper's claims as differences between results on the same documents.

    Each with twice the standard error of the paired differences; `verdict` is what that shows.
    """
    by_name = {(r["pattern"], r["precision"]): r for r in results}
    claims = []
    for one, other in CLAIMS:
        if one in by_name and other in by_name:
            pair = [of_documents(by_name[name], first=short) for name in (one, other)]
            claims.append(_claim(one, other, f"loss beyond {short:,} tokens", *pair, lower=True))
    start = ("start", "bf16")
    for name, result in by_name.items():
        if result["mark"] != "before" and start in by_name:
            pair = [result["short"], by_name[start]["short"]]
            claims.append(_claim(name, start, "loss on short documents", *pair, lower=False))
    return claims


def _claim(
    one: tuple, other: tuple, quantity: str, a: list[float], b: list[float], *, lower: bool
) -> dict:
    """`lower`: the claim is that a is lower than b; else, that it is not higher."""
    mean, error = mean_and_error([x - y for x, y in zip(a, b, strict=True)])
    if not abs(mean) > 2 * error:
        shown = "no difference shows"
    else:
        shown = "lower" if mean < 0 else "higher"
    holds = shown == "lower" if lower else shown != "higher"
    wanted = "lower" if lower else "not higher"
    said = (
        f"{', '.join(one)} against {', '.join(other)}, {quantity}: {mean:+.4f} ± {2 * error:.4f} nats "
        f"({len(a)} documents): {shown}; claimed: {wanted}"
    )
    return {
        "one": one,
        "other": other,
        "quantity": quantity,
        "difference": mean,
        "two_errors": 2 * error,
        "verdict": shown,
        "claimed": wanted,
        "holds": holds,
        "said": said,
    }


# --- pictures -------------------------------------------------------------------------------------


def style(result: dict) -> dict:
    """The line of a variant, the same in every panel."""
    if result["mark"] == "before":
        dashes = {"start": ":", "raised": "-."}[result["pattern"]]
        return {
            "color": COLOURS["start"],
            "linestyle": dashes,
            "marker": "x",
            "label": {"start": "before", "raised": "before, base raised"}[result["pattern"]],
        }
    rotated = result["precision"] != "bf16"
    return {
        "color": COLOURS[result["pattern"]],
        "linestyle": "--" if rotated else "-",
        "marker": "s" if rotated else "o",
        "label": result["pattern"] + ", rotated in float32" * rotated,
    }


def picture(
    lines: list[dict], *, short: int, equal: list[tuple[str, list[str]]], title: str
) -> Figure:
    """A row of panels for equal tokens and one for equal time.

    Args:
        equal: (what is equal, its marks from the first to the last).
    """
    figure = Figure(figsize=(17.5, 8.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # inches: labels clear of the next panel
    figure.suptitle(title)
    for name, axes_row in zip(equal, figure.subplots(len(equal), 5), strict=True):
        what, marks = name
        last = [r for r in lines if r["mark"] in ("before", marks[-1])]
        by_position(axes_row[0], last)
        axes_row[0].set_title(f"{what}: after {marks[-1]}")
        for task, axes in zip(("needle", "passkey"), axes_row[1:3], strict=True):
            by_length(axes, last, task)
            axes.set_title(f"{task}, after {marks[-1]}")
        measures = {
            f"loss beyond {short:,} tokens (nats)": lambda r: of_documents(r, first=short),
            "loss on short documents (nats)": lambda r: r["short"],
        }
        for (label, values), axes in zip(measures.items(), axes_row[3:], strict=True):
            by_mark(axes, lines, marks, values)
            axes.set(title=f"{what}: before, during, after", ylabel=label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _drawn(axes: Axes, number: int, of: int, values: list[float], errors: list[float], look: dict):
    # Side by side, for they often lie on each other.
    places = [i + 0.05 * (number - (of - 1) / 2) for i in range(len(values))]
    axes.errorbar(places, values, yerr=errors, markersize=4, capsize=2, linewidth=1.2, **look)
    axes.grid(alpha=0.3)


def by_position(axes: Axes, results: list[dict]) -> None:
    for number, result in enumerate(results):
        pairs = [mean_and_error(r["losses"]) for r in result["positions"]]
        means, errors = zip(*pairs, strict=True)
        _drawn(axes, number, len(results), means, errors, style(result))
    names = [f"{r['first']}–\n{r['last']}" for r in results[0]["positions"]]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="position of the predicted token", ylabel="loss (nats, ± standard error)")


def by_length(axes: Axes, results: list[dict], task: str) -> None:
    for number, result in enumerate(results):
        shares = found(result, task)
        _drawn(axes, number, len(results), list(shares.values()), [0] * len(shares), style(result))
    lengths = list(found(results[0], task))
    axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
    axes.set(xlabel="prompt length (tokens)", ylabel="share of numbers found", ylim=(-0.04, 1.04))


def by_mark(axes: Axes, lines: list[dict], marks: list[str], values) -> None:
    """From the raised base on; the start with its own base is a level line."""
    variants = dict.fromkeys((r["pattern"], r["precision"]) for r in lines if r["mark"] != "before")
    before = {r["pattern"]: r for r in lines if r["mark"] == "before"}
    for number, name in enumerate(variants):
        own = {r["mark"]: r for r in lines if (r["pattern"], r["precision"]) == name}
        course = [before["raised"], *(own[mark] for mark in marks if mark in own)]
        means, errors = zip(*(mean_and_error(values(r)) for r in course), strict=True)
        _drawn(axes, number, len(variants), means, errors, style(next(iter(own.values()))))
    level = statistics.fmean(values(before["start"]))
    axes.axhline(level, **{k: v for k, v in style(before["start"]).items() if k != "marker"})
    axes.set_xticks(range(len(marks) + 1), ["before", *marks])
    axes.set_xlabel("trained for")


def retrieval_picture(lines: list[dict], mark: str) -> Figure:
    """What is found by length and depth: a column of heat maps for every variant, after `mark`."""
    results = [r for r in lines if r["mark"] in ("before", mark)]
    tasks = ("needle", "passkey")
    figure = Figure(figsize=(1.6 + 2.5 * len(results), 5.6), layout="constrained")
    figure.suptitle(f"share of numbers found, 0 to 1, after {mark}")
    grid = figure.subplots(len(tasks), len(results), squeeze=False)
    for task, axes_row in zip(tasks, grid, strict=True):
        for result, axes in zip(results, axes_row, strict=True):
            cells = {
                (c["length"], c["depth"]): c["found"]
                for c in result["retrieval"]
                if c["task"] == task
            }
            lengths = sorted({length for length, _ in cells})
            depths = sorted({depth for _, depth in cells})
            values = [[cells[length, depth] for length in lengths] for depth in depths]
            image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, line in enumerate(values):
                for x, share in enumerate(line):
                    ink = "white" if share < 0.5 else "black"
                    axes.text(x, y, f"{share:.2g}", ha="center", va="center", color=ink, fontsize=8)
            axes.set_xticks(range(len(lengths)), [short_length(n) for n in lengths], fontsize=8)
            axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
            axes.set_title(f"{task}\n{style(result)['label']}", fontsize=9)
            axes.set_xlabel("length (tokens)", fontsize=8)
            axes.set_ylabel("depth (%)", fontsize=8)
    figure.colorbar(image, ax=list(grid.flat))
    return figure
