"""What DeepSpeed, set up as in `accelerate_configs/`, makes of the gradients of a step's micro-batches."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[2]
MICRO_BATCHES = 64
LARGE, SMALL = 1.0, 2.0**-9
"""bfloat16 keeps 8 bits: to a sum of `LARGE` it cannot add `SMALL`."""


@pytest.mark.parametrize("name", ["zero3", pytest.param("zero3_offload", marks=pytest.mark.slow)])
def test_gradients_of_bfloat16_add_up_in_float32(name, tmp_path):
    mp.spawn(_accumulate, args=(name, str(tmp_path / "sum"), random.randrange(20_000, 60_000)))
    expected = LARGE + (MICRO_BATCHES - 1) * SMALL
    assert torch.load(tmp_path / "sum").unique().tolist() == [expected]


def _accumulate(rank: int, name: str, found: str, port: int) -> None:
    """Write the gradient of one weight matrix after a large and many small micro-batches."""
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    config = json.loads((ROOT / f"accelerate_configs/{name}.json").read_text()) | {
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,
    }
    model = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    offload = "offload_optimizer" in config["zero_optimization"]
    adam = DeepSpeedCPUAdam if offload else torch.optim.AdamW  # as Accelerate chooses
    optimizer = adam(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ones = torch.ones(1, 8, dtype=torch.bfloat16)
    for number in range(MICRO_BATCHES):
        last = number == MICRO_BATCHES - 1
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(
            engine(ones).float().sum() * (SMALL if number else LARGE), scale_wrt_gas=False
        )
        if last:
            torch.save(safe_get_full_grad(model.weight), found)
        engine.step()
    torch.distributed.destroy_process_group()
