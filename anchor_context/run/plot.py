"""The picture of a run: `loss.png`, from its `metrics.jsonl`."""

from __future__ import annotations

import math
from pathlib import Path

from anchor_context.files import warn, whole
from anchor_context.run.metrics import losses_at_the_ends, read_metrics


def plot_loss(metrics: Path, plot: Path) -> None:
    """Draw loss and learning rate against tokens seen, as a PNG; a message where the disk refuses.

    A plot is no reason to call a finished run failed. Without records there is none.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(metrics, "tokens_seen", "loss", "learning_rate")
    if not records:
        return
    tokens = [record["tokens_seen"] for record in records]
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    losses = [math.nan if record["loss"] is None else record["loss"] for record in records]
    line = axis.plot(tokens, losses, color="C0", label="loss")
    validated = [record for record in records if record.get("eval_loss") is not None]
    if validated:
        line += axis.plot(
            [record["tokens_seen"] for record in validated],
            [record["eval_loss"] for record in validated],
            color="C3",
            marker="o",
            markersize=4,
            label="validation loss",
        )
    axis.set_xlabel("tokens seen")
    axis.xaxis.set_major_locator(pyplot.MaxNLocator(5))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_ylabel("loss (nats per target token)")
    axis.grid(alpha=0.3)
    rate_axis = axis.twinx()
    rates = [record["learning_rate"] for record in records]
    line += rate_axis.plot(tokens, rates, color="C1", alpha=0.6, label="learning rate")
    rate_axis.set_ylabel("learning rate")
    rate_axis.set_ylim(bottom=0)
    figure.legend(handles=line, loc="outside lower center", ncols=2)  # where it covers no curve
    axis.set_title(f"loss {losses_at_the_ends(records)}")
    try:
        with whole(plot) as unfinished:
            figure.savefig(unfinished, dpi=120, format="png")
    except OSError as error:
        warn(f"{plot} not written: {error.strerror} (errno {error.errno})")
    pyplot.close(figure)
