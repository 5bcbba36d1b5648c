"""A step's line in `metrics.jsonl` and the progress bar (`train.py`): figures are what their names say."""

from __future__ import annotations

import json
import math

import pytest
import torch

from anchor_context.metrics import ModelWork
from train import describe_step, finish_record

WORK = ModelWork(matmul_parameters=1_000, attention_width=64)
TOKENS, PAIRS, FULL_PAIRS = 50, 268, 1_275
PEAK, SECONDS = 1e6, 2.0


def record(*, loss: float = 100.0, norm: float = 0.5, peak: float | None = PEAK) -> dict:
    entry = {
        "step": 3,
        "learning_rate": 1e-4,
        "grad_norm": torch.tensor(norm),
        "target_tokens": 40,
        "tokens": TOKENS,
        "pairs": PAIRS,
    }
    return finish_record(
        entry,
        loss=loss,
        step_seconds=SECONDS,
        data_wait_share=0.25,
        work=WORK,
        full_pairs=FULL_PAIRS,
        peak=peak,
        device=torch.device("cpu"),
    )


def test_a_record_holds_the_step_s_figures():
    got = record()
    assert got["mfu"] == pytest.approx((6 * 1_000 * TOKENS + 12 * 64 * PAIRS) / (PEAK * SECONDS))
    assert got["mfu_if_full_causal"] == pytest.approx(
        (6 * 1_000 * TOKENS + 12 * 64 * FULL_PAIRS) / (PEAK * SECONDS)
    )
    assert got["loss"] == 100.0 / 40  # per target, while the rate counts every token
    assert got["tokens_per_second"] == TOKENS / SECONDS
    assert (got["step"], got["grad_norm"], got["target_tokens"]) == (3, 0.5, 40)
    assert (got["step_seconds"], got["data_wait_share"]) == (SECONDS, 0.25)
    assert got["peak_memory_bytes"] > 2**20
    assert not {"tokens", "pairs"} & got.keys()
    assert json.loads(json.dumps(got)) == got


def test_what_is_not_known_or_not_finite_is_null():
    got = record(loss=math.nan, norm=math.inf, peak=None)
    for name in ("loss", "grad_norm", "mfu", "mfu_if_full_causal"):
        assert got[name] is None
    assert got["tokens_per_second"] == TOKENS / SECONDS


def test_the_progress_bar_shows_the_record():
    line = describe_step(record() | {"peak_memory_bytes": 3 * 2**29})
    assert line == ("loss 2.5000, lr 1.00e-04, 25 tokens/s, MFU 25.3%, 1.5 GiB, data wait 25%")
    line = describe_step(record(loss=math.inf, peak=None))
    assert line.startswith("loss not finite,") and "MFU" not in line
