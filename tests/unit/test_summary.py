"""The lines that a run ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchor_context.summary import summary


def write_run(output: Path, losses: list[float | None]) -> None:
    data = {"documents": 3, "document_tokens": 1000, "rows": 9}
    data |= {"documents_left_out": 0, "skipped_documents": 1}
    record = {"flags": {"attention_pattern": "anchor"}, "layout": "data 1", "data": data}
    (output / "args.json").write_text(json.dumps(record))
    lines = [
        json.dumps({"step": number, "loss": loss, "tokens_per_second": 10.0 * number})
        for number, loss in enumerate(losses, start=1)
    ]
    (output / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ([7.0, 3.0], "7.000 -> 3.000 in 2 steps\n"),
        ([7.0] * 10 + [1.0] * 9 + [3.0], "7.000 -> 1.200 in 20 steps (the last 10's mean)\n"),
        ([7.0] * 19 + [None], "7.000 -> 7.000 in 20 steps (the last 10's mean)\n"),
        ([None], "not finite -> not finite in 1 steps\n"),
    ],
)
def test_the_loss_at_the_end_is_not_one_rows_alone(tmp_path, losses, says):
    write_run(tmp_path, losses)
    assert f"loss     {says}" in summary(tmp_path)


def test_it_tells_what_became_of_the_data_and_the_newest_model(tmp_path):
    write_run(tmp_path, [7.0, 6.0, 5.0])
    for step in (3, 20, 100):
        (tmp_path / f"step-{step}").mkdir()
    told = summary(tmp_path)
    assert f"model    {tmp_path / 'step-100'}" in told and "20 tokens/s (median)" in told
    assert "3 documents, 1,000 tokens in 9 rows, all kept (1 bad documents skipped)" in told
