"""What saves memory, across ranks: ZeRO-3 with accumulation, offload to the CPU, and loading in parts."""

from __future__ import annotations

import itertools
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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from anchor_context import loss as loss_module
from anchor_context.attention.patterns import make_layout
from anchor_context.engine import make_engine
from anchor_context.integrations.models import set_attention
from anchor_context.layout import IGNORE_INDEX
from anchor_context.loss import CausalLMWithLoss, tiled_loss
from anchor_context.memory import treatments
from anchor_context.memory.estimate import ModelSizes, Setup, Sharding, expected_peak
from anchor_context.memory.treatments import TreatedModel, Treatment

RANKS, ACCUMULATION, TOKENS, VOCABULARY = 2, 2, 96, 40
ZERO3 = ROOT / "accelerate_configs/zero3.json"
TREATMENTS = {
    "nothing": Treatment(),
    "tiled": Treatment(tiled_mlp=True),
    "tiled and full": Treatment(checkpoint_every=1, tiled_mlp=True),
    "offload": Treatment(checkpoint_every=1, offload=True),
}
CASES = [(treatment, tied) for treatment in TREATMENTS for tied in (False, True)]
MICRO_BATCHES = (  # tokens of a micro-batch, of rank 0 in it, of rank 1; and its treatment
    (96, 96, 70, Treatment()),
    (200, 13, 200, Treatment(checkpoint_every=1, tiled_mlp=True)),
    (150, 150, 1, Treatment(tiled_mlp=True)),  # rank 1 is blank, with fewer tokens than tiles
    (120, 1, 120, Treatment(checkpoint_every=2)),
    (200, 200, 96, Treatment(checkpoint_every=1, offload=True, tiled_mlp=True)),
)


# --- ZeRO-3 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded_steps(tmp_path_factory) -> dict:
    """{(treatment, tied): [{"losses": …, "gradients": …} of each rank]}, from one pair of processes."""
    return on_ranks(train_under_zero3, tmp_path_factory.mktemp("zero3"))


@pytest.mark.parametrize(("treatment", "tied"), CASES)
def test_zero3_with_accumulation_gives_the_plain_gradients(treatment, tied, sharded_steps):
    """Rank 1 has no target in any micro-batch; the loss is scaled behind the model."""
    expected = plain_steps(tied=tied)
    for rank, got in enumerate(sharded_steps[treatment, tied]):
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

    treatments.TILE_TOKENS = 40  # 192 tokens: 5 tiles, the last one short
    loss_module.TILE_ENTRIES = VOCABULARY * 50
    settings = zero_settings(stage=3, accumulation=ACCUMULATION) | {"gradient_clipping": 0.0}
    found = {}
    for name, tied in CASES:
        model = make_model(tied=tied)
        treat = TreatedModel(model, tiles=True, offload_tokens=2 * TOKENS)
        whole = CausalLMWithLoss(model, tiled_loss)
        optimizer = torch.optim.SGD(whole.parameters(), lr=0.0)
        engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=settings)
        step_losses = []
        for step in range(2):  # from the second on ZeRO-3 follows the trace of the first
            step_losses = []
            for micro in range(ACCUMULATION):
                treat(TREATMENTS[name], 2 * TOKENS)
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
    return found | {"other tokens": train_on_other_tokens(rank)}


def test_ranks_with_other_tokens_treat_each_micro_batch_alike(sharded_steps):
    """Every weight is gathered for every use, and every micro-batch is recomputed and tiled otherwise."""
    found = sharded_steps["other tokens"]
    model = make_model(tied=False)
    for index, (_, *tokens_of, _) in enumerate(MICRO_BATCHES):
        for rank, tokens in enumerate(tokens_of):
            batch = make_micro_batch(index, rank=rank, tokens=tokens)
            CausalLMWithLoss(model, tiled_loss)(**batch)[0].backward()
    for gradients in found:
        for name, parameter in model.named_parameters():
            error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-5, (name, error)


def make_micro_batch(index: int, *, rank: int, tokens: int) -> dict:
    """Two documents; of a single token, which then has no target."""
    generator = torch.Generator().manual_seed(10 * index + rank)
    ids = torch.randint(VOCABULARY, (1, tokens), generator=generator)
    layout = make_layout(
        np.unique([0, tokens // 3]),
        batch_size=1,
        row_length=tokens,
        pattern="intra_doc",
        anchor_placement="none",
    )
    labels = ids.roll(-1, 1) if tokens > 1 else torch.full_like(ids, IGNORE_INDEX)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": layout.position_ids,
        "layout": layout,
    }


def train_on_other_tokens(rank: int) -> dict[str, torch.Tensor]:
    """The gradients of a step."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    settings = zero_settings(stage=3, accumulation=len(MICRO_BATCHES))
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = make_model(tied=False)
    treat = TreatedModel(model, tiles=True, offload_tokens=200)
    whole = CausalLMWithLoss(model, tiled_loss)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=settings)
    for _ in range(2):  # from the second step on ZeRO-3 follows the trace of an earlier forward
        for index, (tokens, *tokens_of, treatment) in enumerate(MICRO_BATCHES):
            treat(treatment, tokens)
            loss_sum, _ = engine(**make_micro_batch(index, rank=rank, tokens=tokens_of[rank]))
            engine.backward(loss_sum * RANKS, scale_wrt_gas=False)
            if index == len(MICRO_BATCHES) - 1:
                gradients = {
                    n.removeprefix("model."): safe_get_full_grad(p).clone()
                    for n, p in engine.module.named_parameters()
                }
            engine.step()
    engine.destroy()
    return gradients


def zero_settings(*, stage: int, accumulation: int, bf16: bool = False) -> dict:
    settings = json.loads(ZERO3.read_text())
    settings["zero_optimization"]["stage"] = stage
    return settings | {
        "bf16": {"enabled": bf16},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }


# --- the expected peak ----------------------------------------------------------------------------

ZERO = [(stage, bf16) for stage in (1, 2, 3) for bf16 in (True, False)]
OF_RANKS = (2, 64)
BUCKETS = (1_000_000, 30_000)  # many weights of the model below in one message; most of them alone


@pytest.fixture(scope="module")
def held_under_zero(tmp_path_factory) -> dict:
    """{(ranks, stage, bf16, bucket): (what tensors held at once, the expected peak)}, in bytes."""
    folder = tmp_path_factory.mktemp("held")
    mp.spawn(hold_as_one_of_many, (str(folder),), nprocs=len(OF_RANKS))
    parts = [torch.load(folder / f"{ranks}.pt", weights_only=False) for ranks in OF_RANKS]
    return {case: found for part in parts for case, found in part.items()}


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize(("stage", "bf16"), ZERO)
@pytest.mark.parametrize("ranks", OF_RANKS)
def test_zero_holds_what_is_expected(ranks, stage, bf16, bucket, held_under_zero):
    """Of 2 ranks, most is the optimiser's; of 64, what ZeRO gathers and sends."""
    held, expected = held_under_zero[ranks, stage, bf16, bucket]
    assert held <= expected <= 1.2 * held


def hold_as_one_of_many(index: int, folder: str) -> None:
    """The first of many ranks, of which there are no others.

    PyTorch's group for such tests takes and gives tensors without a message. gloo would copy them, and free
    the copies when its threads come to it; on a GPU there are no copies.
    """
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import most_held

    torch.set_num_threads(1)
    ranks, tokens = OF_RANKS[index], 128
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    found = {}
    for (stage, bf16), bucket in itertools.product(ZERO, BUCKETS):
        dtype = torch.bfloat16 if bf16 else torch.float32
        settings = zero_settings(stage=stage, accumulation=2, bf16=bf16)
        settings["zero_optimization"]["reduce_bucket_size"] = bucket
        sizes = []

        def two_steps(
            dtype: torch.dtype = dtype, settings: dict = settings, s: list = sizes
        ) -> None:
            model = LlamaForCausalLM(config).to(dtype).train()
            s.append(ModelSizes.of(model))
            engine = make_engine("flash", device=torch.device("cpu"), dtype=dtype)
            set_attention(model, engine.attend)
            whole = CausalLMWithLoss(model, tiled_loss)
            optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-4)
            zero, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=settings)
            for micro in range(4):
                loss_sum, _ = zero(**make_micro_batch(micro, rank=0, tokens=tokens))
                zero.backward(loss_sum, scale_wrt_gas=False)
                zero.step()
            zero.destroy()

        held = most_held(two_steps)
        sharding = Sharding.of(settings, ranks=ranks)
        setup = Setup(sizes[0], dtype.itemsize, "cpu", sharding=sharding)
        expected = expected_peak(setup, Treatment(), tokens).total
        found[ranks, stage, bf16, bucket] = held, expected
    torch.save(found, Path(folder) / f"{ranks}.pt")
    dist.destroy_process_group()


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
