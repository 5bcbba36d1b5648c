"""The ring's mathematics on the CPU kernel, with ranks as threads; `tests/gpu` runs the same on CUDA."""

from __future__ import annotations

import pytest
import torch

from anchor_context.attention.kernels import KERNELS
from anchor_context.parallel import ring
from anchor_context.parallel.account import CommAccount
from anchor_context.parallel.groups import make_grid
from anchor_context.parallel.shard import shard_batch
from tests.ring_in_threads import LAYOUTS, ROW, Network, errors_of_ring, layout_of


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("documents", LAYOUTS)
@pytest.mark.parametrize("pattern", ["anchor", "full"])
def test_a_ring_agrees_with_the_reference(pattern, documents, ranks):
    errors = errors_of_ring(
        layout_of(documents, pattern=pattern),
        KERNELS["torch_cpu"],
        ranks=ranks,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    assert max(errors.values()) < 1e-5, errors


def test_a_ring_refuses_a_window_that_it_would_drop(monkeypatch):
    monkeypatch.setattr(ring, "dist", Network(ranks=2))
    attend = ring.ring(KERNELS["torch_cpu"], None, CommAccount())
    tokens = torch.zeros(1, ROW, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": tokens}
    batch["layout"] = layout_of("four", pattern="anchor")
    grid = make_grid(rank=0, world_size=2, ring_degree=2, ulysses_degree=1)
    layout = shard_batch(batch, grid=grid)["layout"]
    q = k = v = torch.zeros(1, 2, ROW // 2, 64)
    with pytest.raises(ValueError, match="sliding_window=199 is shorter than the 200 tokens"):
        attend(q, k, v, layout, scale=1.0, sliding_window=199)
