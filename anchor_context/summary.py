"""Prints the short summary of a run: `python -m anchor_context.summary OUTPUT`."""

from __future__ import annotations

import json
from pathlib import Path

from anchor_context.command_line import FlagParser, one_line_errors
from anchor_context.metrics import read_metrics


def summary(output: Path) -> str:
    """What the run in `output` did, in a few lines, from its `args.json` and `metrics.jsonl`.

    Raises:
        ValueError: there is no run.
    """
    if not output.is_dir():
        raise ValueError(f"{output}: no such folder; give a run's --output-dir")
    if not (output / "args.json").exists():
        runs = sorted(path.parent for path in output.glob("*/args.json"))
        hint = f"did you mean {runs[0]}?" if runs else "it has no args.json"
        raise ValueError(f"{output} holds no run; {hint}")
    arguments = json.loads((output / "args.json").read_text())
    records = read_metrics(output / "metrics.jsonl")
    data = arguments["data"]
    lines = [
        f"run      {output} ({arguments['flags']['attention_pattern']}, {arguments['layout']})"
    ]
    if records:
        speeds = sorted(record["tokens_per_second"] for record in records)
        steps = f"in {records[-1]['step']:,} steps"
        if len(records) >= 20:  # a step's rows may be easy or hard
            steps += " (the last 10's mean)"
        tail = records[-10:] if len(records) >= 20 else records[-1:]
        lines += [
            f"loss     {_mean_loss(records[:1])} -> {_mean_loss(tail)} {steps}",
            f"speed    {speeds[len(speeds) // 2]:,.0f} tokens/s (median)",
        ]
    left_out = data["documents_left_out"]  # by --mixture or --upsample_long
    kept = f"{left_out:,} documents left out by the sampling" if left_out else "all kept"
    lines.append(
        f"data     {data['documents']:,} documents, {data['document_tokens']:,} tokens "
        f"in {data['rows']:,} rows, {kept} ({data['skipped_documents']:,} bad documents skipped)"
    )
    models = sorted(output.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    lines += [
        f"model    {models[-1] if models else 'none yet'}",
        f"plot     {output / 'loss.png'}",
        f"metrics  {output / 'metrics.jsonl'}",
    ]
    return "\n".join(lines)


def _mean_loss(records: list[dict]) -> str:
    finite = [record["loss"] for record in records if record["loss"] is not None]
    return f"{sum(finite) / len(finite):.3f}" if finite else "not finite"


if __name__ == "__main__":
    with one_line_errors():
        parser = FlagParser(prog="python -m anchor_context.summary", description=__doc__)
        parser.add_argument("output", type=Path, help="a run's --output-dir")
        print(summary(parser.parse_args().output))
