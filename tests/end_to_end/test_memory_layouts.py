"""What saves memory, across ranks: ZeRO-3 with accumulation, offload to the CPU, and loading in parts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import ROOT, free_port, losses, metrics, weights
from torch.autograd.graph import save_on_cpu
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, modeling_utils

from anchor_context import loss as loss_module
from anchor_context import memory
from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.layout import IGNORE_INDEX
from anchor_context.loss import CausalLMWithLoss
from anchor_context.memory import MemoryPlan, apply_memory_plan
from anchor_context.models import set_attention

RANKS, ACCUMULATION, TOKENS, VOCABULARY = 2, 2, 96, 40
ZERO3 = ROOT / "accelerate_configs/zero3.json"
PLANS = {
    "nothing": MemoryPlan("none", "", False, "", False, ""),
    "tiled": MemoryPlan("none", "", True, "", False, ""),
    "tiled and full": MemoryPlan("full", "", True, "", False, ""),
    "offload": MemoryPlan("offload", "", False, "", False, ""),
}
CASES = [(plan, tied) for plan in PLANS for tied in (False, True)]


# --- ZeRO-3 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded_steps(tmp_path_factory) -> dict:
    """{(plan, tied): [{"losses": …, "gradients": …} of each rank]}, from one pair of processes."""
    return on_ranks(train_under_zero3, tmp_path_factory.mktemp("zero3"))


@pytest.mark.parametrize(("plan", "tied"), CASES)
def test_zero3_with_accumulation_gives_the_plain_gradients(plan, tied, sharded_steps):
    """Rank 1 has no target in any micro-batch; the loss is scaled behind the model."""
    expected = plain_steps(tied=tied)
    for rank, got in enumerate(sharded_steps[plan, tied]):
        assert got["losses"] == pytest.approx(expected["losses"][rank], rel=1e-5)
        assert got["gradients"].keys() == expected["gradients"].keys()
        for name, want in expected["gradients"].items():
            error = (got["gradients"][name] - want).norm() / want.norm()
            assert error < 1e-5, (name, error)


def make_model(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).train()
    engine = make_engine("flash", device=torch.device("cpu"), dtype=torch.float32)
    set_attention(model, engine.attend)
    return model


def make_batch(*, rank: int, micro: int) -> dict:
    generator = torch.Generator().manual_seed(10 * micro + rank)
    tokens = torch.randint(VOCABULARY, (2, TOKENS), generator=generator)
    layout = make_layout(
        np.array([0, 17 + rank, TOKENS]),
        batch_size=2,
        row_length=TOKENS,
        pattern="intra_doc",
        anchor_placement="none",
    )
    labels = tokens.roll(-1, 1) if rank == 0 else torch.full_like(tokens, IGNORE_INDEX)
    return {
        "input_ids": tokens,
        "labels": labels,
        "position_ids": layout.position_ids,
        "layout": layout,
    }


def plain_steps(*, tied: bool) -> dict:
    """One process, no DeepSpeed, no saving of memory, a loss with all its logits."""
    model = make_model(tied=tied)
    losses_of = []
    for rank in range(RANKS):
        losses_of.append([])
        for micro in range(ACCUMULATION):
            batch = make_batch(rank=rank, micro=micro)
            labels = batch.pop("labels").flatten()
            logits = model(**batch, use_cache=False).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            (loss * scale_of(micro)).backward()
            losses_of[rank].append(loss.item())
    return {
        "losses": losses_of,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
    }


def scale_of(micro: int) -> float:
    return (0.37, 0.11)[micro]


def train_under_zero3(rank: int) -> dict:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    # transformers' offload asks for pinned memory, which PyTorch has only beside a GPU.
    modeling_utils.save_on_cpu = lambda pin_memory, device_type: save_on_cpu()
    memory.TILE_TOKENS = 40  # 192 tokens: 5 tiles, the last one short
    loss_module.TILE_ENTRIES = VOCABULARY * 50
    settings = json.loads(ZERO3.read_text())
    settings |= {
        "bf16": {"enabled": False},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    found = {}
    for name, tied in CASES:
        model = make_model(tied=tied)
        apply_memory_plan(model, PLANS[name])
        whole = CausalLMWithLoss(model, fused=False)
        optimizer = torch.optim.SGD(whole.parameters(), lr=0.0)
        engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=settings)
        step_losses = []
        for step in range(2):  # from the second on ZeRO-3 follows the trace of the first
            step_losses = []
            for micro in range(ACCUMULATION):
                loss_sum, _ = engine(**make_batch(rank=rank, micro=micro))
                # DeepSpeed averages over ranks.
                engine.backward(loss_sum * (RANKS * scale_of(micro)), scale_wrt_gas=False)
                step_losses.append(loss_sum.item())
                if step == 1 and micro == ACCUMULATION - 1:
                    gradients = {
                        n.removeprefix("model."): safe_get_full_grad(p).clone()
                        for n, p in engine.module.named_parameters()
                    }
                engine.step()
        found[name, tied] = {"losses": step_losses, "gradients": gradients}
        engine.destroy()
    return found


# --- zero3_init -----------------------------------------------------------------------------------


def test_no_rank_but_the_first_holds_a_whole_copy_while_loading(tmp_path, monkeypatch):
    """160 MB of weights; the first rank reads the files, the second gets its half from it."""
    # What a process frees leaves it at once, so that its peak counts what it held together.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        vocab_size=2000,
    )
    model = LlamaForCausalLM(config)
    numel = sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "model")
    checksum = sum(p.double().sum().item() for p in model.parameters())
    del model

    found = on_ranks(load_in_parts, tmp_path, str(tmp_path / "model"))
    assert found["whole_parameters"] == [0, 0]
    for held in found["numel_held"]:
        assert numel / 2 <= held < numel / 2 + 1000
    assert sum(found["checksum"]) == pytest.approx(checksum, abs=1e-3)
    first, second = found["peak_growth_bytes"]
    assert second < 0.75 * 4 * numel < 4 * numel < first


def load_in_parts(rank: int, model: str) -> dict:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    settings = json.loads(ZERO3.read_text()) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
    }
    keep = HfDeepSpeedConfig(settings)  # what Accelerate's zero3_init_flag sets up
    deepspeed.init_distributed("gloo")
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    before = resident_bytes("VmRSS")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peak_growth = resident_bytes("VmHWM") - before
    del keep
    parts = [p.ds_tensor for p in loaded.parameters()]
    return {
        "whole_parameters": sum(p.numel() for p in loaded.parameters()),
        "numel_held": sum(part.numel() for part in parts),
        "checksum": sum(part.double().sum().item() for part in parts),
        "peak_growth_bytes": peak_growth,
    }


def resident_bytes(key: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


# --- offload to the CPU ---------------------------------------------------------------------------


@pytest.fixture
def launch_offloaded(tiny, row_cache):
    """As `launch`, with parameters and optimiser in CPU memory. Expects the exit code 0."""

    def run(processes: int, output: Path, *flags: str) -> subprocess.CompletedProcess:
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", "accelerate_configs/single_node_4gpu.yaml"),
            *("--num_processes", str(processes), "--main_process_port", str(free_port())),
            *("train.py", "--model_name_or_path", str(tiny.model)),
            *("--dataset", str(tiny.documents), "--cache_dir", str(row_cache)),
            *("--seq-length", "256", "--learning-rate", "1e-3", "--mixed_precision", "no"),
            *("--output-dir", str(output), *flags),
        ]
        finished = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert finished.returncode == 0, finished.stdout[-6000:]
        return finished

    return run


@pytest.mark.slow  # DeepSpeed compiles its CPU Adam on first use, a minute or two
def test_offloaded_parameters_and_optimiser_train_alike(launch, launch_offloaded, tmp_path):
    flags = ("--max-train-steps", "4", "--gradient_checkpointing", "full", "--tiled_mlp", "yes")
    launch(2, tmp_path / "plain", *flags)
    launch_offloaded(2, tmp_path / "offloaded", *flags)
    got, expected = losses(tmp_path / "offloaded"), losses(tmp_path / "plain")
    assert len(got) == 4 and got[-1] < got[0]
    assert got == pytest.approx(expected, rel=1e-4)  # another Adam, rounding differently


@pytest.mark.slow
def test_an_offloaded_optimiser_resumes_its_schedule(launch_offloaded, tmp_path):
    """There the optimiser that steps is not the one that the script made: the rate must reach it.

    The powers of beta that CPU Adam multiplies up, and those that it computes after a resume, coincide in the
    first five steps only. Later they differ by a float32 spacing or two, updates by some 1e-6 of themselves,
    and a weight by no more than its own spacing. A wrong rate moves it by as much as the rate is wrong: 1e-4.
    """
    schedule = ("--max-train-steps", "10", "--lr_scheduler_type", "linear", "--warmup_steps", "2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch_offloaded(2, whole, *schedule, "--checkpoint_every", "6")
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "step-10")
    finished = launch_offloaded(2, parts, *schedule, "--resume", "auto")
    assert "6 steps, 12 rows done" in finished.stdout
    rates = [record["learning_rate"] for record in metrics(parts)]
    assert rates == pytest.approx([0, 5e-4, *(1e-3 * left / 8 for left in range(8, 0, -1))])
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    resumed = weights(parts / "step-10")
    for name, weight in weights(whole / "step-10").items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["plain", "offloaded"])
def test_a_run_goes_on_with_its_optimiser_offloaded_or_no_longer(
    saved, launch, launch_offloaded, tmp_path
):
    """Saved by one class of optimiser, loaded by another, on the same number of ranks and on another."""
    save, resume = (launch, launch_offloaded) if saved == "plain" else (launch_offloaded, launch)
    flags = ("--max-train-steps", "4", "--checkpoint_every", "2", "--keep_checkpoints", "9")
    save(2, tmp_path / "whole", *flags)
    for ranks in (2, 1):
        split = ("--gradient-accumulate-every", str(2 // ranks))
        output = tmp_path / f"{ranks} ranks"
        shutil.copytree(tmp_path / "whole", output)
        shutil.rmtree(output / "checkpoints/checkpoint_4_8")
        finished = resume(ranks, output, *flags, *split, "--resume", "auto")
        assert "2 steps, 4 rows done" in finished.stdout
        assert losses(output) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


# --- processes ------------------------------------------------------------------------------------


def on_ranks(function, folder: Path, *arguments) -> dict:
    """{case: [result of each rank]} of a `function(rank, *arguments)` that returns {case: result}."""
    mp.spawn(rank_main, (free_port(), function, str(folder), arguments), nprocs=RANKS)
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {case: [result[case] for result in results] for case in results[0]}


def rank_main(rank: int, port: int, function, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
    )
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))
    torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
