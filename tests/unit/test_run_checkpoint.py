"""Checkpoints: complete or not there, bit for bit the same run after them, any number of ranks."""

from __future__ import annotations

import errno
import glob
import json
import os
import pickle
import random
import resource
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from deepspeed.runtime.zero.config import ZeroStageEnum
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from anchor_context.files import UNFINISHED, disk_errors
from anchor_context.run import checkpoint, deepspeed_files
from anchor_context.run.agreement import on_one_rank
from anchor_context.run.checkpoint import (
    ABANDONED,
    MANIFEST,
    Progress,
    RunCheckpoints,
    check_resume,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside_abandoned,
    state_of_checkpoint,
    verify_checkpoint,
)

STATE = {"tokens_seen": 12345678901234567890, "loss_sum": 0.1 + 0.2, "by_source": {"10": 1, "9": 2}}
SAVED_AT, STEPS, ROWS = 3, 6, 4


# --------------------------------------------------------------------------------------------------
# A tiny run under Accelerate and DeepSpeed ZeRO-3, gloo processes on the CPU.


def launch(
    ranks: int,
    job,
    folder: Path,
    *,
    mixed_precision: str = "no",
    stage: int = 3,
    clipping: float = 1.0,
) -> dict:
    """Run `job(accelerator, run, folder)` on every rank; return what rank 0 returned."""
    port = random.SystemRandom().randrange(20000, 60000)
    config = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clipping,
        "bf16": {"enabled": mixed_precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }
    mp.spawn(_rank_main, args=(ranks, port, job, folder, mixed_precision, config), nprocs=ranks)
    return torch.load(folder / "result.pt", weights_only=True)


def _rank_main(
    rank: int, ranks: int, port: int, job, folder: Path, mixed_precision: str, config: dict
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_DEEPSPEED": "true",
    }
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # as train.py: it would be compiled
    )
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, set_seed

    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    set_seed(7)
    result = job(accelerator, TinyRun(accelerator), folder)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


class TinyRun:
    """A two-layer model; decay on the matrices only; the global batch is cut over the ranks."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        model = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 3))
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": 0.5},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def step(self, number: int) -> float:
        """The mean loss of the global batch. The learning rate falls with the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + number)
        inputs = torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(number))
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = inputs[rank::ranks].to(next(self.model.parameters()).dtype)
        loss = self.model(mine).float().square().sum() / ROWS
        self.accelerator.backward(loss * ranks)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.accelerator.reduce(loss.detach(), "sum").item()

    def weights(self) -> dict:
        return self.accelerator.get_state_dict(self.model) or {}

    def draws(self) -> torch.Tensor:
        """(ranks, 3): the next number of every generator of every rank."""
        drawn = [random.random(), np.random.rand(), torch.rand((), dtype=torch.float64).item()]
        return self.accelerator.gather(torch.tensor([drawn], dtype=torch.float64))


def undisturbed(accelerator, run: TinyRun, folder: Path) -> dict:
    """Train, saving at SAVED_AT; afterwards whatever can go wrong with saving goes wrong."""
    losses = [run.step(n) for n in range(SAVED_AT)]
    for _ in range(accelerator.process_index):
        run_ahead = (random.random(), np.random.rand(), torch.rand(()))  # ranks' states differ
        assert run_ahead
    save = partial(save_checkpoint, accelerator, state=STATE)
    checkpoints = folder / "checkpoints"
    killed = checkpoints / f"{UNFINISHED}checkpoint_2_8"
    if accelerator.is_main_process:
        killed.mkdir(parents=True)
        (killed / "half").write_bytes(b"half")
    accelerator.wait_for_everyone()

    saved = save(folder, steps=SAVED_AT, rows=SAVED_AT * ROWS)
    assert saved == checkpoints / "checkpoint_3_12"
    before = manifest_time(saved)
    assert save(folder, steps=SAVED_AT, rows=SAVED_AT * ROWS) == saved
    assert manifest_time(saved) != before, "what lies there may be of another course: it is written"
    draws = run.draws()

    # One rank's disk is full: every rank learns of it, and nothing has changed.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if accelerator.process_index == accelerator.num_processes - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    refused = save(folder, steps=4, rows=16)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert refused is None
    # The folder cannot be made.
    if accelerator.is_main_process:
        (folder / "file").write_text("in the way")
    assert save(folder / "file", steps=4, rows=16) is None
    # It goes away between its making and DeepSpeed's first look at it, which is one rank's.
    prepare = checkpoint._prepare
    checkpoint._prepare = partial(make_and_lose, prepare)
    assert save(folder / "lost", steps=4, rows=16) is None
    checkpoint._prepare = prepare
    accelerator.wait_for_everyone()
    assert [path.name for path in checkpoints.iterdir()] == [saved.name]

    losses += [run.step(n) for n in range(SAVED_AT, STEPS)]
    weights = run.weights()

    # The next ones push out the oldest, and only it, once a step has shown that they are good; what was
    # abandoned on going back to 8 does not count.
    many = folder / "many/checkpoints"
    for steps in (8, 10):
        save(folder / "many", steps=steps, rows=steps * ROWS)
    back = partial(set_aside_abandoned, folder / "many", many / "checkpoint_8_32")
    on_one_rank(accelerator, back)
    for keep, steps, before, after in (
        (2, 9, {"8_32", "9_36"}, {"8_32", "9_36"}),
        (2, 10, {"8_32", "9_36", "10_40"}, {"9_36", "10_40"}),
        (2, 11, {"9_36", "10_40", "11_44"}, {"10_40", "11_44"}),
        (1, 12, {"10_40", "11_44", "12_48"}, {"12_48"}),
    ):
        run_checkpoints = RunCheckpoints(accelerator, folder / "many", keep=keep, resumed=None)
        run_checkpoints.save(steps=steps, rows=steps * ROWS, state=STATE)
        for kept, finite in ((before, False), (after, True)):
            run_checkpoints.judge(finite=finite)
            accelerator.wait_for_everyone()
            assert {p.name for p in many.glob("checkpoint_*")} == {f"checkpoint_{k}" for k in kept}
            accelerator.wait_for_everyone()  # else the main rank goes on while others look
    assert {p.name for p in many.iterdir()} == {"checkpoint_12_48", f"{ABANDONED}1"}
    assert verify_checkpoint(many / f"{ABANDONED}1/checkpoint_10_40") == []
    return {"losses": losses, "weights": weights, "draws": draws}


def make_and_lose(prepare, folder: Path, name: str) -> Path:
    unfinished = prepare(folder, name)
    shutil.rmtree(folder)
    folder.write_text("in the way")
    return unfinished


def resumed(accelerator, run: TinyRun, folder: Path) -> dict:
    """Train on from the checkpoint, after something hostile was refused."""
    hostile = folder / "hostile"
    if accelerator.is_main_process:
        make_hostile(folder / "checkpoints/checkpoint_3_12", hostile, folder / "ran")
    accelerator.wait_for_everyone()
    named = rf"^{hostile}/model/\S+_states\.pt holds posix\.mkdir, .* --resume another checkpoint"
    with pytest.raises(ValueError, match=named) as refused:
        load_checkpoint(accelerator, hostile)
    for advice_of_torch in ("\n", "\033", "weights_only"):
        assert advice_of_torch not in str(refused.value)
    assert not (folder / "ran").exists()

    path = find_checkpoint(folder, "auto")
    ranks = json.loads((path / MANIFEST).read_text())["content"]["layout"]["ranks"]
    same_ranks = ranks == accelerator.num_processes
    load_checkpoint(accelerator, path)
    engine = accelerator.deepspeed_engine_wrapped.engine
    assert engine.optimizer.clip_grad == engine.gradient_clipping(), "not that of the saved run"
    assert state_of_checkpoint(path) == STATE | {"steps": SAVED_AT, "rows": SAVED_AT * ROWS}
    draws = run.draws() if same_ranks else None
    decays = [group["weight_decay"] for group in run.optimizer.param_groups]
    losses = [run.step(n) for n in range(SAVED_AT, STEPS)]
    accelerator.wait_for_everyone()
    assert [p.name for p in path.parent.iterdir()] == [path.name], "the conversion is cleaned up"
    return {"losses": losses, "weights": run.weights(), "draws": draws, "decays": decays}


def manifest_time(path: Path) -> int:
    return (path / MANIFEST).stat().st_mtime_ns


class Hostile:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def make_hostile(source: Path, target: Path, marker: Path) -> None:
    """A complete checkpoint in which unpickling one file would make the folder `marker`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for file in (target / "model").glob("*_states.pt"):
        torch.save(torch.load(file, weights_only=False) | {"more": Hostile(marker)}, file)
    content = checkpoint._read_manifest(target)
    for name, entry in content["files"].items():
        data = (target / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": checkpoint.hashlib.sha256(data).hexdigest()}
    manifest = {"sha256": checkpoint._content_digest(content), "content": content}
    (target / MANIFEST).write_text(json.dumps(manifest))
    assert verify_checkpoint(target) == []


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, dict]:
    """An undisturbed run's folder and result."""
    folder = tmp_path_factory.mktemp("two_ranks")
    return folder, launch(2, undisturbed, folder)


def copy_run(two_ranks, tmp_path: Path) -> Path:
    shutil.copytree(two_ranks[0] / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


# --------------------------------------------------------------------------------------------------
# Resuming.


def test_same_ranks_continue_bit_for_bit(two_ranks, tmp_path):
    expected = two_ranks[1]
    result = launch(2, resumed, copy_run(two_ranks, tmp_path))
    assert result["losses"] == expected["losses"][SAVED_AT:]
    assert expected["draws"][0].tolist() != expected["draws"][1].tolist(), "the case is vacuous"
    assert torch.equal(result["draws"], expected["draws"])
    assert result["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert torch.equal(result["weights"][name], weight), name


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_other_ranks_continue_the_same_run(two_ranks, tmp_path, ranks):
    expected = two_ranks[1]
    result = launch(ranks, resumed, copy_run(two_ranks, tmp_path))
    assert result["losses"] == pytest.approx(expected["losses"][SAVED_AT:], rel=1e-6)
    assert result["decays"] == [0.5, 0.0], "DeepSpeed alone would give both groups the first's"
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_bfloat16_continues_bit_for_bit(tmp_path):
    expected = launch(2, undisturbed, tmp_path, mixed_precision="bf16")
    result = launch(2, resumed, copy_run((tmp_path, None), tmp_path / "2"), mixed_precision="bf16")
    assert result["losses"] == expected["losses"][SAVED_AT:]
    other = launch(1, resumed, copy_run((tmp_path, None), tmp_path / "1"), mixed_precision="bf16")
    assert other["losses"] == pytest.approx(expected["losses"][SAVED_AT:], rel=1e-2)


@pytest.mark.parametrize(
    ("stage", "mixed_precision", "tolerance"),
    [
        (1, "bf16", 1e-2),  # this pair has an optimiser class of its own
        (2, "no", 1e-6),
        pytest.param(1, "no", 1e-6, marks=pytest.mark.slow),
        pytest.param(2, "bf16", 1e-2, marks=pytest.mark.slow),
    ],
)
def test_zero_1_and_2_continue_on_the_same_ranks_and_on_others(
    stage, mixed_precision, tolerance, tmp_path
):
    """With another clipping norm, which shows in no loss yet; DeepSpeed would go on with the saved one."""
    zero = {"stage": stage, "mixed_precision": mixed_precision}
    expected = launch(2, undisturbed, tmp_path, **zero)
    result = launch(2, resumed, copy_run((tmp_path, None), tmp_path / "2"), clipping=99.0, **zero)
    assert result["losses"] == expected["losses"][SAVED_AT:]
    other = launch(1, resumed, copy_run((tmp_path, None), tmp_path / "1"), clipping=99.0, **zero)
    assert other["losses"] == pytest.approx(expected["losses"][SAVED_AT:], rel=tolerance)
    assert other["decays"] == [0.5, 0.0]


def test_a_conversion_runs_no_foreign_code(two_ranks, tmp_path):
    hostile, ran = tmp_path / "hostile", tmp_path / "ran"
    make_hostile(two_ranks[0] / "checkpoints/checkpoint_3_12", hostile, ran)
    with pytest.raises(RuntimeError, match="(?s)could not be converted.*more than tensors and"):
        deepspeed_files.convert(hostile)
    assert not ran.exists() and not list(tmp_path.glob(f"{UNFINISHED}*"))


def test_a_conversion_that_outlives_its_run_has_its_folder_for_itself(monkeypatch, tmp_path):
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(deepspeed_files.subprocess, "run", lambda *_, **__: done)
    first, second = (deepspeed_files.convert(tmp_path / "checkpoint_1_4") for _ in range(2))
    assert first != second
    for folder in (first, second):
        assert folder.is_dir() and folder.name.startswith(UNFINISHED)


def test_a_conversion_finds_its_libraries_where_the_run_does(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(
        deepspeed_files.subprocess,
        "run",
        lambda *_, env, **__: started.append(env) or SimpleNamespace(returncode=0),
    )
    repository = str(Path(deepspeed_files.__file__).parents[2])
    for before, expected in ((f"/one{os.pathsep}/two", ["/one", "/two"]), ("", [])):
        monkeypatch.setenv("PYTHONPATH", before)
        deepspeed_files.convert(tmp_path / "checkpoint_1_4")
        assert started.pop()["PYTHONPATH"].split(os.pathsep) == [repository, *expected]


def test_the_hostile_file_is_hostile(two_ranks, tmp_path):
    hostile, ran = tmp_path / "hostile", tmp_path / "ran"
    make_hostile(two_ranks[0] / "checkpoints/checkpoint_3_12", hostile, ran)
    torch.load(next((hostile / "model").glob("*")), weights_only=False)
    assert ran.exists()


def test_files_of_every_python_can_be_loaded(monkeypatch, tmp_path):
    """Python 3.11.2 by itself pickles an enum's member as `getattr(ZeroStageEnum, "weights")`."""

    def by_name(stage: ZeroStageEnum, protocol: int) -> tuple:
        return getattr, (type(stage), stage.name)

    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", by_name)
    files = deepspeed_files.RankFiles(tmp_path)
    files.save({"zero_stage": ZeroStageEnum.weights}, tmp_path / "optim_states.pt")
    assert files.error is None
    deepspeed_files.refuse_foreign(tmp_path)
    with deepspeed_files.weights_only(tmp_path):
        loaded = torch.load(tmp_path / "optim_states.pt", weights_only=False)
    assert loaded["zero_stage"] is ZeroStageEnum.weights


class EngineOf:
    """As much of DeepSpeed's engine as loading looks at: an optimiser, and what a checkpoint puts into it."""

    def __init__(self, *, own: dict, saved: dict):
        base = SimpleNamespace(state={0: {"step": 3}, 1: {"step": 3}, 2: {}})
        self.optimizer = SimpleNamespace(param_groups=[{"params": [], **own}], optimizer=base)
        self.saved = saved

    def gradient_clipping(self) -> float:
        return 1.0

    def load_checkpoint(self, folder: str, tag: str, *, custom_load_fn) -> tuple[str, dict]:
        self.optimizer.param_groups = [{"params": [], **self.saved}]
        return folder, {}


def test_another_optimiser_keeps_the_settings_that_the_saved_one_has_not(tmp_path):
    """CPU Adam, for an offloaded optimiser, loads what torch's AdamW saved."""
    engine = EngineOf(own={"lr": 1.0, "bias_correction": True}, saved={"lr": 0.5, "fused": None})
    deepspeed_files.load_engine(engine, tmp_path)
    assert deepspeed_files.settings_of(engine) == [
        {"lr": 0.5, "bias_correction": True, "fused": None}
    ]


def test_a_plain_step_becomes_a_tensor_of_each_states_own():
    """torch's AdamW, on another number of ranks, loads what CPU Adam saved."""
    engine = EngineOf(own={"lr": 1.0}, saved={})
    deepspeed_files._mend_universal(engine, [{"lr": 0.5}])
    first, second, empty = engine.optimizer.optimizer.state.values()
    first["step"] += 1
    assert (first["step"].item(), second["step"].item(), empty) == (4, 3, {})


# --------------------------------------------------------------------------------------------------
# Where the run stands.


def test_progress_counts_steps():
    progress = Progress()
    for rows, skipped in ((4, False), (4, True), (4, True), (1, False), (4, True)):
        progress.advance(rows=rows, tokens=100 * rows, skipped=skipped)
    assert progress == Progress(step=5, rows=17, tokens_seen=1700, bad_steps=3, bad_in_a_row=1)


@pytest.mark.parametrize("new", [False, True])
def test_progress_is_restored_from_checkpoints_old_and_new(new, tmp_path):
    """The old ones' state lacks what the manifest says beside it."""
    progress = Progress(step=4, rows=8, tokens_seen=8192, bad_steps=3, bad_in_a_row=2)
    state = {"tokens_seen": 8192, "bad_steps": 3, "bad_in_a_row": 2, "stream": {"--seed": 42}}
    if new:
        state |= asdict(progress)
    layout = {"ranks": 2, "zero_stage": 3, "sub_group_size": 1000000000}
    content = {"steps": 4, "rows": 8, "layout": layout, "files": {}, "state": state}
    manifest = {"sha256": checkpoint._content_digest(content), "content": content}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    restored = state_of_checkpoint(tmp_path)
    assert Progress.of(restored) == progress and restored["stream"] == {"--seed": 42}


# --------------------------------------------------------------------------------------------------
# Finding.


@pytest.fixture
def run_folder(two_ranks, tmp_path) -> Path:
    """A run with two good checkpoints."""
    folder = copy_run(two_ranks, tmp_path)
    checkpoints = folder / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint_3_12", checkpoints / "checkpoint_10_40")
    return folder


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def test_the_newest_is_found_by_its_number_not_its_name(run_folder):
    assert find_checkpoint(run_folder, "auto").name == "checkpoint_10_40"
    assert find_checkpoint(run_folder, "never") is None
    path = str(run_folder / "checkpoints/checkpoint_3_12")
    assert find_checkpoint(run_folder, path) == Path(path)


def test_nothing_to_resume_from_is_a_fresh_run(tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None
    (tmp_path / f"checkpoints/{UNFINISHED}checkpoint_5_20/model").mkdir(parents=True)
    assert find_checkpoint(tmp_path, "auto") is None


def test_a_path_that_is_no_checkpoint_is_told_where_they_are(tmp_path):
    for resume in ("never", "auto"):
        check_resume(resume)
    where = (
        "; checkpoints are the folders checkpoints/checkpoint_STEPS_ROWS in a run's --output-dir"
    )
    nowhere = str(tmp_path / "nowhere")
    for check in (check_resume, partial(find_checkpoint, tmp_path)):
        with pytest.raises(ValueError, match=f"^--resume {nowhere}: no such folder{where}$"):
            check(nowhere)
    prepared_rows = tmp_path / "rows"
    prepared_rows.mkdir()
    (prepared_rows / MANIFEST).write_text("{}")
    (tmp_path / "model").mkdir()
    for folder, lacks in ((prepared_rows, "no model"), (tmp_path, "no manifest.json")):
        with pytest.raises(ValueError) as refused:
            check_resume(str(folder))
        assert str(refused.value) == (
            f"--resume {folder} is no checkpoint (it has {lacks}){where}; "
            "a model to train on goes to --model_name_or_path"
        )


def test_a_run_taken_back_leaves_the_later_checkpoints_aside(two_ranks, tmp_path, capsys):
    run_folder = copy_run(two_ranks, tmp_path)
    checkpoints = run_folder / "checkpoints"
    old, later = checkpoints / "checkpoint_3_12", checkpoints / "checkpoint_10_40"
    shutil.copytree(old, checkpoints / "checkpoint_2_8")
    set_aside_abandoned(run_folder, old)
    assert find_checkpoint(run_folder, "auto") == old, "the newest abandons nothing"
    assert not capsys.readouterr().err

    shutil.copytree(old, later)
    aside = [checkpoints / f"{ABANDONED}{n}" for n in (1, 2, 3)]
    set_aside_abandoned(run_folder, old)
    assert f"checkpoint_10_40: later than {old} and not this run's" in capsys.readouterr().err
    assert find_checkpoint(run_folder, "auto") == old
    assert find_checkpoint(run_folder, str(aside[0] / later.name)) == aside[0] / later.name

    # A second time, from among those aside: what has the same place in the run is not the same.
    shutil.copytree(old, checkpoints / "checkpoint_3_16")
    other = shutil.copytree(old, aside[0] / "checkpoint_3_12")
    set_aside_abandoned(run_folder, other)
    assert {p.name for p in aside[1].iterdir()} == {"checkpoint_3_12", "checkpoint_3_16"}
    assert {p.name for p in aside[0].iterdir()} == {"checkpoint_3_12", "checkpoint_10_40"}

    # From another folder's checkpoint into a new one.
    set_aside_abandoned(tmp_path / "new", other)
    assert not (tmp_path / "new").exists()


def test_a_damaged_newest_checkpoint_is_set_aside_not_deleted(run_folder):
    damaged = run_folder / "checkpoints/checkpoint_10_40"
    flip(damaged / "rank_0.pt", 100)
    set_aside_abandoned(run_folder, find_checkpoint(run_folder, "auto"))
    assert not damaged.exists()
    assert (run_folder / f"checkpoints/{ABANDONED}1/checkpoint_10_40/rank_0.pt").exists()


DAMAGES = {
    "flipped byte": lambda file: flip(file, file.stat().st_size // 2),
    "missing": lambda file: file.unlink(),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "model/zero_pp_rank_0_mp_rank_00_model_states.pt",
        "model/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "rank_1.pt",
        MANIFEST,
    ],
)
def test_damage_is_named_and_the_one_before_taken(run_folder, capsys, name, damage):
    damaged = run_folder / "checkpoints/checkpoint_10_40"
    DAMAGES[damage](damaged / name)
    (problem,) = verify_checkpoint(damaged)
    assert problem.startswith(name)
    assert find_checkpoint(run_folder, "auto").name == "checkpoint_3_12"
    told = capsys.readouterr().err
    assert str(damaged) in told and name in told and "skipped" in told
    with pytest.raises(ValueError, match=name):
        find_checkpoint(run_folder, str(damaged))


def test_all_damaged_is_an_error_not_a_fresh_run(run_folder):
    for path in (run_folder / "checkpoints").iterdir():
        flip(path / "rank_0.pt", 100)
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
        find_checkpoint(run_folder, "auto")


def test_every_file_is_in_the_manifest(run_folder):
    path = run_folder / "checkpoints/checkpoint_3_12"
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert files - {MANIFEST} == checkpoint._read_manifest(path)["files"].keys()
    assert len(files) == 7


@settings(max_examples=60)
@given(data=st.data())
def test_any_changed_byte_is_found(two_ranks, data):
    path = two_ranks[0] / "checkpoints/checkpoint_3_12"
    names = sorted(checkpoint._read_manifest(path)["files"])
    file = path / data.draw(st.sampled_from(names))
    before = file.read_bytes()
    try:
        flip(file, data.draw(st.integers(0, len(before) - 1)))
        assert len(verify_checkpoint(path)) == 1
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("old, new", [('"steps": 3', '"steps": 4'), ("12345678901", "12345678902")])
def test_a_changed_number_in_the_manifest_is_found(run_folder, old, new):
    path = run_folder / "checkpoints/checkpoint_3_12"
    text = (path / MANIFEST).read_text()
    assert old in text
    (path / MANIFEST).write_text(text.replace(old, new))
    assert verify_checkpoint(path) == [f"{MANIFEST}: its contents have changed (SHA-256)"]


def test_libraries_in_rust_say_that_the_disk_refused_as_everyone_does(tmp_path):
    tensors = {"weight": torch.zeros(10_000)}
    tokenizer = Tokenizer(WordLevel({f"word {n}": n for n in range(1000)}, unk_token="word 0"))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (lambda path: save_file(tensors, path), lambda path: tokenizer.save(str(path))):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
        try:
            with pytest.raises(OSError) as caught, disk_errors(tmp_path):
                write(tmp_path / "file")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(tmp_path)
        write(tmp_path / "file")
    with pytest.raises(ValueError, match="of another kind"), disk_errors(tmp_path):
        raise ValueError("of another kind")


def test_keeping_none_is_refused():
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        RunCheckpoints(None, Path("."), keep=0, resumed=None)


# --------------------------------------------------------------------------------------------------
# Good, unproven, in doubt: without DeepSpeed, a checkpoint is a folder.


@pytest.fixture
def course(monkeypatch, tmp_path):
    """course(steps, resumed=None, keep=2): a run of which every step is followed by a save.

    `steps` has a letter for each: "." a finite one, "x" one that is not (nothing is saved then).
    """

    def save(accelerator, output_dir, *, steps, rows, state):
        path = output_dir / f"checkpoints/checkpoint_{steps}_{rows}"
        shutil.rmtree(path, ignore_errors=True)
        (path / "model").mkdir(parents=True)
        (path / MANIFEST).touch()
        return path

    def run(steps: str, *, resumed: Path | None = None, keep: int = 2) -> RunCheckpoints:
        checkpoints = RunCheckpoints(MAIN, tmp_path, keep=keep, resumed=resumed)
        first = 1 if resumed is None else int(resumed.name.split("_")[1]) + 1
        for number, letter in enumerate(steps, start=first):
            checkpoints.judge(finite=letter == ".")
            if letter == ".":
                checkpoints.save(steps=number, rows=4 * number, state={})
        return checkpoints

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    monkeypatch.setattr(checkpoint, "verify_checkpoint", lambda path: [])
    return run


MAIN = SimpleNamespace(is_main_process=True)


def steps_kept(output: Path) -> list[int]:
    return sorted(int(p.name.split("_")[1]) for p in (output / "checkpoints").glob("checkpoint_*"))


def test_a_diverging_run_keeps_its_good_checkpoints(course, tmp_path, capsys):
    """Step 5 breaks the weights, with a finite gradient."""
    checkpoints = course(".....xxxxxxxxx")
    assert steps_kept(tmp_path) == [3, 4, 5]
    assert checkpoints.last_good() == tmp_path / "checkpoints/checkpoint_4_16"
    assert find_checkpoint(tmp_path, "auto") == checkpoints.last_good()
    assert "checkpoint_5_20: the step after it was not finite" in capsys.readouterr().err
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoints/checkpoint_5_20"))


def test_a_bad_batch_puts_nothing_in_doubt_for_long(course, tmp_path):
    course("....x")
    assert find_checkpoint(tmp_path, "auto").name == "checkpoint_3_12"
    checkpoints = course("....x.")
    assert steps_kept(tmp_path) == [3, 4, 6]
    assert checkpoints.last_good().name == "checkpoint_4_16"
    assert find_checkpoint(tmp_path, "auto").name == "checkpoint_6_24", "nothing speaks against it"


def test_what_a_step_proved_stays_good(course, tmp_path):
    """The next course goes bad at once, in a batch perhaps; its checkpoint was good before."""
    course("...xx")
    proven, in_doubt = (tmp_path / f"checkpoints/checkpoint_{n}_{4 * n}" for n in (2, 3))
    assert course("xxx", resumed=proven).last_good() == proven
    assert course("xxx", resumed=in_doubt).last_good() == proven
    assert course(".", resumed=in_doubt).last_good() == in_doubt, "it was a bad batch"


def test_a_place_is_saved_once(course, tmp_path, monkeypatch):
    """By the run that made it, or the one that resumed it and was stopped before its first step."""
    checkpoints, last = course(".."), tmp_path / "checkpoints/checkpoint_2_8"
    resumed = course("", resumed=last)
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *_, **what: what["steps"])
    for ours in (checkpoints, resumed):
        assert ours.save(steps=2, rows=8, state={}) == last
        assert ours.save(steps=3, rows=12, state={}) == 3


def test_one_in_doubt_is_taken_where_there_is_no_other(course, tmp_path, capsys):
    assert course(".xx").last_good() is None
    assert find_checkpoint(tmp_path, "auto").name == "checkpoint_1_4"
    assert "checkpoint_1_4: the step after it was not finite" in capsys.readouterr().err


def test_checkpoints_of_before_these_notes_resume(course, tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"checkpoints/checkpoint_{number}_{4 * number}").mkdir(parents=True)
    newest = find_checkpoint(tmp_path, "auto")
    assert newest.name == "checkpoint_3_12"
    assert course("x", resumed=newest).last_good().name == "checkpoint_2_8"
    course("..", resumed=newest)
    assert steps_kept(tmp_path) == [3, 4, 5]


def test_nothing_is_noted_in_another_runs_folder(course, tmp_path):
    other = tmp_path / "other/checkpoints/checkpoint_7_28"
    other.mkdir(parents=True)
    checkpoints = course("xx", resumed=other)
    assert list(other.iterdir()) == [] and checkpoints.last_good() == other


def test_a_note_that_the_disk_refuses_is_a_warning(course, tmp_path, monkeypatch, capsys):
    course(".")
    path = tmp_path / "checkpoints/checkpoint_1_4"
    (path / f"{UNFINISHED}next_step").mkdir()
    monkeypatch.setattr(checkpoint, "whole", refuse)
    assert course("x", resumed=path).last_good() is None
    assert "checkpoint_1_4/next_step not written: No space left" in capsys.readouterr().err


def test_links_in_the_place_of_checkpoints_go_and_what_they_point_to_stays(course, tmp_path):
    course("..")
    old, moved = tmp_path / "checkpoints/checkpoint_1_4", tmp_path / "moved"
    old.rename(moved)
    old.symlink_to(moved)
    course("...", resumed=tmp_path / "checkpoints/checkpoint_2_8")
    assert 1 not in steps_kept(tmp_path) and (moved / MANIFEST).exists()
    assert not list((tmp_path / "checkpoints").glob(f"{UNFINISHED}*"))


def test_a_leftover_is_removed_or_named_and_saving_goes_on(tmp_path, monkeypatch, capsys):
    kept = tmp_path / "elsewhere/kept"
    kept.mkdir(parents=True)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, target in (("deleted-checkpoint_1_4", kept), ("checkpoint_2_8", "nowhere")):
        (folder / f"{UNFINISHED}{name}").symlink_to(target)
    unfinished = checkpoint._prepare(folder, "checkpoint_2_8")
    assert unfinished.name == f"{UNFINISHED}checkpoint_2_8" and kept.is_dir()
    assert list(folder.iterdir()) == [unfinished]

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoint, "remove", busy)
    other = checkpoint._prepare(folder, "checkpoint_2_8")
    assert other.name == f"{UNFINISHED}checkpoint_2_8-1" and (other / "model").is_dir()
    told = capsys.readouterr().err
    assert f"{unfinished} is left of a killed run, and cannot be removed: Device or" in told


@pytest.mark.parametrize("name", ["plain", "sweep_lr=[1e-3,2e-3]", "what?", "all*"])
def test_a_path_with_a_pattern_s_characters_is_found(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").touch()
    with deepspeed_files.plain_path(tmp_path / name) as plain:
        assert [Path(found).name for found in glob.glob(f"{plain}/*")] == ["file"]
        link = plain if plain.is_symlink() else None
    assert (link is None) == (name == "plain")
    assert (tmp_path / name / "file").exists() and (link is None or not link.parent.exists())


def test_a_file_that_is_none_of_pytorchs_is_named(tmp_path):
    file = tmp_path / "rank_0.pt"
    for write in (
        lambda: file.write_bytes(pickle.dumps({"more": Hostile(tmp_path / "ran")})),
        lambda: torch.save(
            {"more": Hostile(tmp_path / "ran")}, file, _use_new_zipfile_serialization=False
        ),
        lambda: file.write_bytes(b""),
    ):
        write()
        with pytest.raises(ValueError, match=rf"^{file} holds .* --resume another checkpoint"):
            deepspeed_files.refuse_foreign(tmp_path)
        assert not (tmp_path / "ran").exists()


def test_a_conversion_that_the_disk_refuses_is_one_line(monkeypatch, tmp_path):
    lines = "Traceback\nOSError: [Errno 28] No space left on device"
    done = SimpleNamespace(returncode=1, stdout=lines)
    monkeypatch.setattr(deepspeed_files.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(OSError, match="No space left on device; --resume with another") as refused:
        deepspeed_files.convert(tmp_path / "checkpoint_1_4")
    assert refused.value.filename.startswith(str(tmp_path)) and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--resume with another number of ranks writes"):
        deepspeed_files.convert(tmp_path / "file/checkpoint_1_4")


def refuse(path: Path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
