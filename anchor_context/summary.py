"""Prints the short summary of a run: `python -m anchor_context.summary OUTPUT`."""

from __future__ import annotations

import json
from pathlib import Path

from anchor_context.command_line import FlagParser, one_line_errors
from anchor_context.metrics import losses_at_the_ends, read_metrics


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
        lines += [
            f"loss     {losses_at_the_ends(records)}",
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


if __name__ == "__main__":
    with one_line_errors():
        parser = FlagParser(prog="python -m anchor_context.summary", description=__doc__)
        parser.add_argument("output", type=Path, help="a run's --output-dir")
        print(summary(parser.parse_args().output))
