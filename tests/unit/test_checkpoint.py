"""Checkpoints: complete or not there, bit for bit the same run after them, any number of ranks."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
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

from anchor_context import checkpoint
from anchor_context.agreement import on_one_rank
from anchor_context.checkpoint import (
    ABANDONED,
    MANIFEST,
    check_resume,
    disk_errors,
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


def launch(ranks: int, job, folder: Path, *, mixed_precision: str = "no") -> dict:
    """Run `job(accelerator, run, folder)` on every rank; return what rank 0 returned."""
    port = random.SystemRandom().randrange(20000, 60000)
    mp.spawn(_rank_main, args=(ranks, port, job, folder, mixed_precision), nprocs=ranks)
    return torch.load(folder / "result.pt", weights_only=True)


def _rank_main(rank: int, ranks: int, port: int, job, folder: Path, mixed_precision: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_DEEPSPEED": "true",
    }
    torch.set_num_threads(1)
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, set_seed

    config = {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": mixed_precision == "bf16"},
        "steps_per_print": 10**9,
    }
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
    killed = checkpoints / f"{checkpoint.UNFINISHED}checkpoint_2_8"
    if accelerator.is_main_process:
        killed.mkdir(parents=True)
        (killed / "half").write_bytes(b"half")
    accelerator.wait_for_everyone()

    saved = save(folder, steps=SAVED_AT, rows=SAVED_AT * ROWS, keep=1)
    assert saved == checkpoints / "checkpoint_3_12"
    before = manifest_time(saved)
    assert save(folder, steps=SAVED_AT, rows=SAVED_AT * ROWS, keep=1) == saved
    assert manifest_time(saved) != before, "what lies there may be of another course: it is written"
    draws = run.draws()

    # One rank's disk is full: every rank learns of it, and nothing has changed.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if accelerator.process_index == accelerator.num_processes - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    refused = save(folder, steps=4, rows=16, keep=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert refused is None
    # The folder cannot be made.
    if accelerator.is_main_process:
        (folder / "file").write_text("in the way")
    assert save(folder / "file", steps=4, rows=16, keep=1) is None
    # It goes away between its making and DeepSpeed's first look at it, which is one rank's.
    prepare = checkpoint._prepare
    checkpoint._prepare = partial(make_and_lose, prepare)
    assert save(folder / "lost", steps=4, rows=16, keep=1) is None
    checkpoint._prepare = prepare
    accelerator.wait_for_everyone()
    assert [path.name for path in checkpoints.iterdir()] == [saved.name]

    losses += [run.step(n) for n in range(SAVED_AT, STEPS)]
    weights = run.weights()

    # The next ones push out the oldest, and only it; what was abandoned on going back to 8 does not count.
    many = folder / "many/checkpoints"
    for steps in (8, 10):
        save(folder / "many", steps=steps, rows=steps * ROWS, keep=2)
    back = partial(set_aside_abandoned, folder / "many", many / "checkpoint_8_32")
    on_one_rank(accelerator, back)
    for steps, kept in ((9, {"8_32", "9_36"}), (10, {"9_36", "10_40"}), (11, {"10_40", "11_44"})):
        save(folder / "many", steps=steps, rows=steps * ROWS, keep=2)
        accelerator.wait_for_everyone()
        assert {p.name for p in many.glob("checkpoint_*")} == {f"checkpoint_{k}" for k in kept}
        accelerator.wait_for_everyone()  # else the main rank makes the next one while others look
    save(folder / "many", steps=12, rows=48, keep=1)
    accelerator.wait_for_everyone()
    assert {p.name for p in many.iterdir()} == {"checkpoint_12_48", f"{ABANDONED}1"}
    assert verify_checkpoint(many / f"{ABANDONED}1/checkpoint_10_40") == []
    return {"losses": losses, "weights": weights, "draws": draws}


def make_and_lose(prepare, folder: Path, unfinished: Path) -> None:
    prepare(folder, unfinished)
    shutil.rmtree(folder)
    folder.write_text("in the way")


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


def test_a_conversion_runs_no_foreign_code(two_ranks, tmp_path):
    hostile, ran = tmp_path / "hostile", tmp_path / "ran"
    make_hostile(two_ranks[0] / "checkpoints/checkpoint_3_12", hostile, ran)
    with pytest.raises(RuntimeError, match="(?s)could not be converted.*more than tensors and"):
        checkpoint._convert(hostile)
    assert not ran.exists() and not list(tmp_path.glob(f"{checkpoint.UNFINISHED}*"))


def test_a_conversion_that_outlives_its_run_has_its_folder_for_itself(monkeypatch, tmp_path):
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(checkpoint.subprocess, "run", lambda *_, **__: done)
    first, second = (checkpoint._convert(tmp_path / "checkpoint_1_4") for _ in range(2))
    assert first != second
    for folder in (first, second):
        assert folder.is_dir() and folder.name.startswith(checkpoint.UNFINISHED)


def test_a_conversion_finds_its_libraries_where_the_run_does(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(
        checkpoint.subprocess,
        "run",
        lambda *_, env, **__: started.append(env) or SimpleNamespace(returncode=0),
    )
    repository = str(Path(checkpoint.__file__).parents[1])
    for before, expected in ((f"/one{os.pathsep}/two", ["/one", "/two"]), ("", [])):
        monkeypatch.setenv("PYTHONPATH", before)
        checkpoint._convert(tmp_path / "checkpoint_1_4")
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
    files = checkpoint._RankFiles(tmp_path)
    files.save({"zero_stage": ZeroStageEnum.weights}, tmp_path / "optim_states.pt")
    assert files.error is None
    checkpoint._refuse_foreign(tmp_path)
    with checkpoint._weights_only(tmp_path):
        loaded = torch.load(tmp_path / "optim_states.pt", weights_only=False)
    assert loaded["zero_stage"] is ZeroStageEnum.weights


class EngineOf:
    """As much of DeepSpeed's engine as loading looks at: an optimiser, and what a checkpoint puts into it."""

    def __init__(self, *, own: dict, saved: dict):
        base = SimpleNamespace(state={0: {"step": 3}, 1: {"step": 3}, 2: {}})
        self.optimizer = SimpleNamespace(param_groups=[{"params": [], **own}], optimizer=base)
        self.saved = saved

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict]:
        self.optimizer.param_groups = [{"params": [], **self.saved}]
        return folder, {}


def test_another_optimiser_keeps_the_settings_that_the_saved_one_has_not(tmp_path):
    """CPU Adam, for an offloaded optimiser, loads what torch's AdamW saved."""
    engine = EngineOf(own={"lr": 1.0, "bias_correction": True}, saved={"lr": 0.5, "fused": None})
    checkpoint._load_engine(engine, tmp_path)
    assert checkpoint._settings(engine) == [{"lr": 0.5, "bias_correction": True, "fused": None}]


def test_a_plain_step_becomes_a_tensor_of_each_states_own():
    """torch's AdamW, on another number of ranks, loads what CPU Adam saved."""
    engine = EngineOf(own={"lr": 1.0}, saved={})
    checkpoint._mend_universal(engine, [{"lr": 0.5}])
    first, second, empty = engine.optimizer.optimizer.state.values()
    first["step"] += 1
    assert (first["step"].item(), second["step"].item(), empty) == (4, 3, {})


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
    (tmp_path / f"checkpoints/{checkpoint.UNFINISHED}checkpoint_5_20/model").mkdir(parents=True)
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


@settings(max_examples=60, deadline=None)
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
        save_checkpoint(None, Path("."), steps=1, rows=1, state={}, keep=0)
