"""What DeepSpeed makes of the gradients of a step's micro-batches, set up as `train.py` sets it up."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

ROOT = Path(__file__).parents[2]
MICRO_BATCHES = 64
LARGE, SMALL = 1.0, 2.0**-9
"""bfloat16 keeps 8 bits: to a sum of `LARGE` it cannot add `SMALL`."""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What `train_a_little` found on rank 0, by file and precision."""
    results, _ = run_ranks(
        train_a_little, 2, tmp_path_factory.mktemp("ranks"), ("zero1", "zero2", "zero3")
    )
    return results


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_gradients_of_bfloat16_add_up_in_float32_over_micro_batches_and_ranks(name, found):
    """Rank 0 has the large one and many small ones, rank 1 small ones only; DeepSpeed takes the mean."""
    expected = (LARGE + (2 * MICRO_BATCHES - 1) * SMALL) / 2
    assert found[name, "bf16"]["sum"] == [expected]


@pytest.mark.slow  # DeepSpeed compiles its CPU Adam on first use
def test_they_do_with_the_optimiser_offloaded(tmp_path):
    (results,) = run_ranks(train_a_little, 1, tmp_path, ("zero3_offload",))
    assert results["zero3_offload", "bf16"]["sum"] == [LARGE + (MICRO_BATCHES - 1) * SMALL]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_a_gradient_that_is_not_finite_changes_nothing(name, precision, found):
    """The second of three steps, on the last rank."""
    assert found[name, precision]["moved"] == [True, False, True]
    assert found[name, precision]["skipped"] == [False, True, False]


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_an_engine_that_was_set_up_otherwise_is_found_out(name, found):
    said = found[name, "bf16"]["refused"]
    for what in (
        "its own accumulation is 4, not 1",
        "the type in which gradients add up is torch.bfloat16, not torch.float32",
        "the type in which gradients travel is torch.bfloat16, not torch.float32",
        "the norm to which it clips is 0.5, not 0.0",
    ):
        assert what in said
    assert (
        "the type of its parameters is {torch.float32}, not {torch.bfloat16}"
        in found[name, "no"]["refused"]
    )


def train_a_little(rank: int, ranks: int, names: tuple[str, ...]) -> dict:
    """One weight matrix under each of the files, in both precisions, with two ranks where there are two."""
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from anchor_context.run.deepspeed_settings import check_engine, settle_deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}

    def engine_of(config: dict, precision: str):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8, bias=False, dtype=dtype)
        offload = "offload_optimizer" in config["zero_optimization"]
        adam = DeepSpeedCPUAdam if offload else torch.optim.AdamW  # as Accelerate chooses
        optimizer = adam(model.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return engine

    def step(engine, scales: list[float]) -> list[float]:
        """Backward as Accelerate does it. Returns the values in the matrix' summed gradient."""
        inputs = torch.ones(1, 8, dtype=next(engine.module.parameters()).dtype)
        for number, scale in enumerate(scales, start=1):
            last = number == len(scales)
            engine.set_gradient_accumulation_boundary(last)
            engine.backward(engine(inputs).float().sum() * scale, scale_wrt_gas=False)
        total = safe_get_full_grad(engine.module.weight).unique().tolist()
        engine.step()
        return total

    def weights(engine) -> torch.Tensor:
        return safe_get_full_fp32_param(engine.module.weight).clone()

    results = {}
    for name in names:
        path = ROOT / f"accelerate_configs/{name}.json"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
        for precision in ("no", "bf16"):
            flags = {"mixed_precision": precision, "max_grad_norm": 0.0}
            plugin, _ = settle_deepspeed(**flags, batch_size=1, accumulation=1, data_ranks=ranks)
            engine = engine_of(plugin.deepspeed_config, precision)
            check_engine(engine, **flags)

            small = [SMALL] * MICRO_BATCHES
            bad = float("inf") if rank == ranks - 1 else 1.0
            seen, sums, skipped = [weights(engine)], [], []
            for scales in ([LARGE, *small[1:]] if rank == 0 else small, [1.0, bad], [1.0, 1.0]):
                sums.append(step(engine, scales))
                seen.append(weights(engine))
                skipped.append(engine.optimizer.overflow)
            moved = [not before.equal(after) for before, after in pairwise(seen)]
            results[name, precision] = {"sum": sums[0], "moved": moved, "skipped": skipped}
            engine.destroy()

            # As a file of someone else's may be, taken as it is; and asked about the other precision.
            theirs = {
                "zero_optimization": json.loads(path.read_text())["zero_optimization"],
                "bf16": {"enabled": precision == "bf16"},
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 4,
                "gradient_clipping": 0.5,
            }
            engine = engine_of(theirs, precision)
            with pytest.raises(RuntimeError, match="does not do what the flags say") as refused:
                check_engine(engine, mixed_precision="bf16", max_grad_norm=0.0)
            results[name, precision]["refused"] = str(refused.value)
            engine.destroy()
    return results
