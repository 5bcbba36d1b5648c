"""What rotating in float32 costs."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import torch

from anchor_context.precision.arithmetic import EXACT, Rope

REPEATS = 7


@torch.no_grad()
def time_rotation(
    *, heads: int, kv_heads: int, row_length: int, rope: Rope, dtype: torch.dtype
) -> dict[str, float]:
    """Median seconds to rotate one layer's queries and keys: in the `model`'s type, and in `float32`, rounded
    once."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    device = rope.inv_freq.device
    head_dim = 2 * len(rope.inv_freq)
    query = torch.randn(1, heads, row_length, head_dim, device=device).to(dtype)
    key = torch.randn(1, kv_heads, row_length, head_dim, device=device).to(dtype)
    positions = torch.arange(row_length, device=device)
    tables = rope.tables(positions, replace(EXACT, angles=torch.float32))
    found = {}
    for name, table_dtype in (("model", dtype), ("float32", torch.float32)):
        cos, sin = (table[None].to(table_dtype) for table in tables)
        seconds = []
        for _ in range(REPEATS):
            _wait_for(device)
            start = time.perf_counter()
            for rotated in apply_rotary_pos_emb(query, key, cos, sin):
                rotated.to(dtype)
            _wait_for(device)
            seconds.append(time.perf_counter() - start)
        found[name] = median(seconds)
    return found


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
