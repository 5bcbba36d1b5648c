"""The ring's mathematics on the CPU kernel, with ranks as threads; `tests/gpu` runs the same on CUDA."""

from __future__ import annotations

import pytest
import torch

from anchor_context.attention.kernels import KERNELS
from anchor_context.parallel import ring
from anchor_context.parallel.groups import make_grid
from anchor_context.parallel.shard import shard_batch
from anchor_context.parallel.traffic import Traffic
from tests.ring_in_threads import LAYOUTS, ROW, Network, errors_of_ring, layout_of


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("documents", LAYOUTS)
@pytest.mark.parametrize("pattern", ["anchor", "full"])
@pytest.mark.parametrize("window", [None, 1, 7, 128, 200])
def test_a_ring_agrees_with_the_reference(window, pattern, documents, ranks):
    errors = errors_of_ring(
        layout_of(documents, pattern=pattern),
        KERNELS["torch_cpu"],
        ranks=ranks,
        device=torch.device("cpu"),
        dtype=torch.float32,
        window=window,
    )
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("documents", ["four", "batch"])
def test_a_ring_takes_each_sink_once_per_query(documents, window, ranks):
    errors = errors_of_ring(
        layout_of(documents, pattern="anchor"),
        KERNELS["torch_cpu"],
        ranks=ranks,
        device=torch.device("cpu"),
        dtype=torch.float32,
        window=window,
        sinks=torch.tensor([-1.0, 0.5, 2.0, 4.0]),
    )
    assert "dsinks" in errors and max(errors.values()) < 1e-5, errors


def test_a_ring_refuses_a_window_that_it_was_not_planned_for(monkeypatch):
    monkeypatch.setattr(ring, "dist", Network(ranks=2))
    attend = ring.ring(KERNELS["torch_cpu"], None, Traffic())
    tokens = torch.zeros(1, ROW, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": tokens}
    batch["layout"] = layout_of("four", pattern="anchor")
    grid = make_grid(rank=0, world_size=2, ring_degree=2, ulysses_degree=1)
    layout = shard_batch(batch, grid=grid, windows=(None, 100))["layout"]
    q = k = v = torch.zeros(1, 2, ROW // 2, 64)
    with pytest.raises(ValueError, match=r"window of 199 tokens, .* planned for \[None, 100\]"):
        attend(q, k, v, layout, scale=1.0, sliding_window=199)
    # A window as long as the longest document hides nothing.
    assert layout.schedule_of(200) is layout.schedule_of(None)
