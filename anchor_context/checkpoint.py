"""Checkpoints to resume from: written whole or not at all, verified before they are loaded.

    checkpoints/checkpoint_{steps}_{rows}/
        manifest.json        written last: sizes, SHA-256, steps, rows, ZeRO layout, the caller's state
        model/…              DeepSpeed's files: weights and optimiser, one pair per rank
        rank_{rank}.pt       the rank's random states and its optimiser's settings
    checkpoints/abandoned-{n}/…    those that a run left behind when it was resumed from an earlier one

Guarantees: a folder of that name was complete when it got it (written under another name, every file
synced, renamed). A file that is missing, cut or changed is found by `verify_checkpoint`. A save that
the disk refuses leaves the earlier checkpoints as they were, and all ranks learn of it alike. With the same
number of ranks a resumed run continues bit for bit; with another, DeepSpeed's universal checkpoint
redistributes the same float32 values. With the optimiser offloaded it continues to rounding: DeepSpeed's CPU
Adam multiplies the powers of its betas up from step to step, and computes them anew after a resume.

Loads without running foreign code: DeepSpeed asks `torch.load` for full unpickling, which
runs whatever a file says. Here PyTorch's own switch turns that into `weights_only` loading for the
duration, and only the classes in `_deepspeed_classes` are let through; any other is an error that names the
file and the class.

Costs: saving writes 12 bytes per parameter (float32 weights and both Adam moments; 2 more in bfloat16)
at the speed of disk and SHA-256, while training waits. Finding one reads it whole. Loading with another
number of ranks writes and reads as much again, in one process. All machines must share the folder.
"""

from __future__ import annotations

import copyreg
import errno
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from termcolor import colored

from anchor_context.agreement import on_one_rank

MANIFEST = "manifest.json"
MODEL_TAG = "model"
UNFINISHED = ".unfinished-"
ABANDONED = "abandoned-"
NAME = re.compile(r"checkpoint_(\d+)_(\d+)")
CHUNK_BYTES = 1 << 20

# DeepSpeed puts this enum into its files. Python 3.11.2 (Debian 12's) by itself pickles a member as a call of
# `getattr`, which no `weights_only` load allows, or should; later versions by themselves do as this does.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


# --------------------------------------------------------------------------------------------------
# Save.


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, *, steps: int, rows: int, state: dict, keep: int
) -> Path | None:
    """Save all that the next step depends on. Collective, between two optimiser steps.

    Args:
        output_dir: the run's; the checkpoint goes to `output_dir/checkpoints/checkpoint_{steps}_{rows}`.
        steps: optimiser steps done.
        rows: rows trained: the place in the data, whatever the number of ranks.
        state: what else the caller wants back, as JSON can hold it (the main rank's counts).
        keep: checkpoints to keep, at least 1. The oldest ones go, after the new one is complete.

    Returns:
        Its path, or None where the disk refused (full, read-only, gone): a message names path and
        error, earlier checkpoints are untouched, and the caller can go on.

    Raises:
        ValueError: `keep` below 1.
        RuntimeError: a rank failed for another reason than the disk; on all ranks.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} must be at least 1: a run resumes from its last checkpoint")
    engine = _engine(accelerator)
    folder = Path(output_dir) / "checkpoints"
    final = folder / f"checkpoint_{steps}_{rows}"
    unfinished = folder / f"{UNFINISHED}{final.name}"

    try:
        on_one_rank(accelerator, partial(_prepare, folder, unfinished))
        files = _RankFiles(unfinished)
        with _writing_through(engine, files):
            engine.save_checkpoint(str(unfinished), MODEL_TAG, save_latest=False)
        rank_state = {"random": _random_states(), "param_groups": _settings(engine)}
        files.save(rank_state, unfinished / f"rank_{accelerator.process_index}.pt")

        # One entry per rank, in the same order everywhere: all ranks decide the same from here on.
        ranks = gather_object([(files.error, files.written)])
        errors = [error for error, _ in ranks if error is not None]
        if errors:
            raise errors[0]
        content = {
            "steps": steps,
            "rows": rows,
            "layout": _layout(engine),
            "files": {name: entry for _, written in ranks for name, entry in written.items()},
            "state": state,
        }
        on_one_rank(accelerator, partial(_finish, unfinished, final, content))
    except OSError as error:
        on_one_rank(accelerator, partial(shutil.rmtree, unfinished, ignore_errors=True))
        if accelerator.is_main_process:
            code = errno.errorcode.get(error.errno, "?")
            _warn(
                f"checkpoint of step {steps} not saved: {error.filename or final}: {error.strerror} "
                f"(errno {error.errno}, {code}). Earlier checkpoints are untouched; training goes on"
            )
        return None
    if accelerator.is_main_process:
        _delete_oldest(folder, final, keep=keep)
    return final


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """While `path` is written: what the system refused is raised as `OSError`, whoever reports it.

    safetensors and tokenizers raise classes of their own, or none in particular, with the number as text.
    """
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _prepare(folder: Path, unfinished: Path) -> None:
    """Make an empty `unfinished`, and remove what killed runs left of theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover)
    (unfinished / MODEL_TAG).mkdir(parents=True)


def _finish(unfinished: Path, final: Path, content: dict) -> None:
    """Write the manifest, sync the folders, and give the checkpoint its name."""
    # As it will be read back: keys are text, tuples are lists.
    content = json.loads(json.dumps(content))
    manifest = {"sha256": _content_digest(content), "content": content}
    with (unfinished / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        _sync(file)
    _sync_folder(unfinished / MODEL_TAG)
    _sync_folder(unfinished)
    replaced = final.with_name(f"{UNFINISHED}replaced-{final.name}")
    if final.exists():  # the caller saved this step before
        final.rename(replaced)
    unfinished.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _delete_oldest(folder: Path, newest: Path, *, keep: int) -> None:
    others = [path for path in _checkpoints(folder) if path != newest]
    for path in others[: max(0, len(others) - (keep - 1))]:
        try:
            # Renamed first: killed in the middle, it must not look like a damaged checkpoint.
            doomed = path.rename(folder / f"{UNFINISHED}deleted-{path.name}")
            shutil.rmtree(doomed)
        except OSError as error:
            _warn(f"old checkpoint not deleted: {error}")


class _RankFiles(TorchCheckpointEngine):
    """Writes and syncs a rank's files, in DeepSpeed's place. The first error is kept instead of raised.

    DeepSpeed ends a save with a barrier, in which the other ranks would wait for one that raised.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, dict] = {}
        """Path within the checkpoint -> size in bytes and SHA-256."""
        self.error: OSError | RuntimeError | None = None

    def create(self, info: object) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """`_prepare` made the folders. DeepSpeed would make them on one rank, while the others wait."""

    def save(self, state_dict: object, path: str | Path) -> None:
        if self.error is not None:
            return
        try:
            with open(path, "wb") as file:
                counted = _HashedFile(file)
                torch.save(state_dict, counted)
                _sync(file)
        except (OSError, RuntimeError) as error:
            # PyTorch's writer may raise a RuntimeError of its own on the way out of the disk's error.
            cause = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is not None:
                self.error = OSError(cause.errno, cause.strerror, str(path))
            else:
                self.error = RuntimeError(f"{path}: {error}")
        else:
            name = Path(path).relative_to(self.folder).as_posix()
            self.written[name] = {"bytes": counted.size, "sha256": counted.digest.hexdigest()}


class _HashedFile:
    """A file to write to from front to back; counts and hashes on the way, so nothing is read again."""

    def __init__(self, file) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data) -> int:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def _writing_through(engine: DeepSpeedEngine, files: _RankFiles) -> Iterator[None]:
    """DeepSpeed writes through `files`, and leaves its recovery scripts out of the checkpoint."""
    before = engine.checkpoint_engine
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda folder: None
    try:
        yield
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script  # the class's own again


# --------------------------------------------------------------------------------------------------
# Find.


def check_resume(resume: str) -> None:
    """Raise `ValueError` where `--resume PATH` names no checkpoint.

    Cheap, to be called before any heavy work; `find_checkpoint` says whether it is whole.
    """
    if resume in ("never", "auto"):
        return
    path = Path(resume)
    where = "checkpoints are the folders checkpoints/checkpoint_STEPS_ROWS in a run's --output-dir"
    if not path.is_dir():
        raise ValueError(f"--resume {resume}: no such folder; {where}")
    missing = [name for name in (MANIFEST, MODEL_TAG) if not (path / name).exists()]
    if missing:
        raise ValueError(
            f"--resume {resume} is no checkpoint (it has no {' and no '.join(missing)}); {where}; "
            "a model to train on goes to --model_name_or_path"
        )


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` means. Not collective: run it on one rank, by `on_one_rank`.

    Args:
        resume: `never`; `auto`, the newest complete one in `output_dir`; or a checkpoint's path.

    Returns:
        Its path; None for `never`, and for `auto` where there is none yet.

    Raises:
        ValueError: the named checkpoint is none or damaged, or, for `auto`, every one is damaged.
    """
    check_resume(resume)
    if resume == "never":
        return None
    if resume != "auto":
        problems = verify_checkpoint(Path(resume))
        if problems:
            raise ValueError(
                f"--resume {resume} cannot be loaded: {_first(problems)}; name another"
            )
        return Path(resume)
    found = _checkpoints(Path(output_dir) / "checkpoints")
    for path in reversed(found):
        problems = verify_checkpoint(path)
        if not problems:
            return path
        _warn(f"{path} is damaged and skipped: {_first(problems)}")
    if found:
        raise ValueError(
            f"--resume auto: every checkpoint in {found[0].parent} is damaged; "
            "to start again, name another --output-dir"
        )
    return None


def state_of_checkpoint(path: Path) -> dict:
    """The caller's state, with `steps` and `rows`, of a checkpoint that `find_checkpoint` gave."""
    content = _read_manifest(Path(path))
    return content["state"] | {"steps": content["steps"], "rows": content["rows"]}


def set_aside_abandoned(output_dir: Path, resumed: Path) -> None:
    """Take the checkpoints that a run resumed from `resumed` leaves behind out of its way. On one rank.

    Those at its place or a later one are of another course of the training, or damaged: neither
    `--resume auto` nor `keep` may count them as this run's. Nothing is deleted: they move to
    `checkpoints/abandoned-{n}/`, where `--resume PATH` still finds them.
    """
    content = _read_manifest(resumed)
    place = (content["steps"], content["rows"])
    folder = Path(output_dir) / "checkpoints"
    later = [path for path in _checkpoints(folder) if _place(path) >= place]
    abandoned = [path for path in later if not path.samefile(resumed)]
    if not abandoned:
        return
    numbered = (folder / f"{ABANDONED}{number}" for number in itertools.count(1))
    aside = next(path for path in numbered if not path.exists())
    aside.mkdir()
    for path in abandoned:
        path.rename(aside / path.name)
    _sync_folder(folder)
    names = ", ".join(path.name for path in abandoned)
    _warn(
        f"{names}: later than {resumed} and not this run's; moved to {aside}, delete them at will"
    )


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint, a line per problem; empty if it is complete. Reads all of it."""
    path = Path(path)
    try:
        files = _read_manifest(path)["files"]
    except OSError as error:
        return [f"{MANIFEST}: {error.strerror}"]
    except ValueError as error:
        return [f"{MANIFEST}: {error}"]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        problems = threads.map(lambda name: _check_file(path / name, files[name]), files)
        return [
            f"{name}: {problem}" for name, problem in zip(files, problems, strict=True) if problem
        ]


def _check_file(path: Path, entry: dict) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{size:,} bytes, not {entry['bytes']:,}"
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        return error.strerror or str(error)
    return None if digest.hexdigest() == entry["sha256"] else "its contents have changed (SHA-256)"


def _read_manifest(path: Path) -> dict:
    """The manifest's content. Raises OSError, or ValueError where it was changed or cut."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or manifest.keys() != {"sha256", "content"}:
        raise ValueError("not a checkpoint's manifest")
    if manifest["sha256"] != _content_digest(manifest["content"]):
        raise ValueError("its contents have changed (SHA-256)")
    return manifest["content"]


def _content_digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in folder.glob("checkpoint_*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_place)


def _place(path: Path) -> tuple[int, int]:
    """Steps and rows, from a checkpoint's name."""
    steps, rows = NAME.fullmatch(path.name).groups()
    return int(steps), int(rows)


# --------------------------------------------------------------------------------------------------
# Load.


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """Load a checkpoint that `find_checkpoint` gave, right after `accelerator.prepare`. Collective.

    With another number of ranks (or ZeRO sub-group size) than at the save, one process first converts
    it beside the original, by DeepSpeed's `ds_to_universal`, and the copy is removed after loading.
    Random states are then not restored: those of other ranks mean nothing here; the caller's seed stays.

    Raises:
        ValueError: it is of another ZeRO stage, or holds objects of classes that nothing here wrote.
        RuntimeError: it could not be converted.
    """
    engine = _engine(accelerator)
    path = Path(path)
    content = on_one_rank(accelerator, partial(_read_manifest, path))
    if content["layout"]["zero_stage"] != engine.zero_optimization_stage():
        raise ValueError(
            f"{path} was saved under ZeRO stage {content['layout']['zero_stage']}, "
            f"this run has {engine.zero_optimization_stage()}: launch it with the same"
        )
    on_one_rank(accelerator, partial(_refuse_foreign, path))
    if content["layout"] == _layout(engine):
        with _weights_only(path):
            _load_engine(engine, path)
            rank_state = torch.load(
                path / f"rank_{accelerator.process_index}.pt", weights_only=True
            )
        _restore_random_states(rank_state["random"])
    else:
        converted = on_one_rank(accelerator, partial(_convert, path))
        with _weights_only(path), _universal(engine):
            _load_engine(engine, converted)
            rank_state = torch.load(path / "rank_0.pt", weights_only=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(converted, ignore_errors=True)
        _mend_universal(engine, rank_state["param_groups"])


def _load_engine(engine: DeepSpeedEngine, folder: Path) -> None:
    before = _settings(engine)
    loaded, _ = engine.load_checkpoint(str(folder), MODEL_TAG)
    if loaded is None:
        raise ValueError(f"DeepSpeed found nothing to load in {folder / MODEL_TAG}")
    # The saved groups replaced ours. Where torch's AdamW saved them, they lack settings that CPU Adam reads.
    for group, own in zip(engine.optimizer.param_groups, before, strict=True):
        group.update(own | group)


def _mend_universal(engine: DeepSpeedEngine, settings: list[dict]) -> None:
    """Put right what DeepSpeed 0.19.8 does to the optimiser when it loads a universal checkpoint.

    Every group gets the settings of the first, weight decay among them. And all states share one step
    tensor, which each of them then increments, so Adam's bias correction runs ahead; or they hold the plain
    number that CPU Adam saved, which torch's AdamW cannot take.
    """
    for group, saved in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(saved)
    for state in engine.optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).clone()


def _convert(path: Path) -> Path:
    """Make a universal checkpoint of `path` in a new folder beside it, in a process of its own.

    New each time: such a process outlives a run that is killed, and would go on writing into the next one's.
    """
    converted = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}universal-", dir=path.parent))
    repository = str(Path(__file__).parents[1])
    python_path = [repository, *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "anchor_context.checkpoint",
            path / MODEL_TAG,
            converted / MODEL_TAG,
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(python_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode != 0:
        shutil.rmtree(converted, ignore_errors=True)
        lines = run.stdout.strip().splitlines()[-15:]
        raise RuntimeError(
            f"{path} could not be converted for this number of ranks:\n" + "\n".join(lines)
        )
    return converted


def _convert_main(source: str, target: str) -> None:
    """The process that `_convert` starts. One worker each: they would be forked, and use more memory."""
    from deepspeed.checkpoint.ds_to_universal import main

    with _weights_only(Path(source)):
        main(
            Namespace(
                input_folder=source,
                output_folder=target,
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )


@contextmanager
def _universal(engine: DeepSpeedEngine) -> Iterator[None]:
    """As `"checkpoint": {"load_universal": true}` in DeepSpeed's configuration, for one load."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


@contextmanager
def _weights_only(checkpoint: Path) -> Iterator[None]:
    """`torch.load` unpickles tensors, plain containers and `_deepspeed_classes`, whatever its caller asks.

    The variable is PyTorch's only switch that also binds a caller who passes `weights_only=False`.
    Raises ValueError where something in the checkpoint is refused.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_classes()):
            yield
    except pickle.UnpicklingError as error:
        raise ValueError(_foreign(checkpoint, "more than tensors and numbers")) from error
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _refuse_foreign(path: Path) -> None:
    """Raise `ValueError` for the first file that names what `_weights_only` would refuse. Runs nothing of it.

    The load itself refuses it, too, but does not say where it is, and advises to unpickle in full.
    """
    for file in sorted(path.rglob("*.pt")):
        with _weights_only(file):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if names:
            raise ValueError(_foreign(file, ", ".join(sorted(names))))


def _foreign(file: Path, what: str) -> str:
    return (
        f"{file} holds {what}, which no checkpoint saved here does, and loading it could run foreign code: "
        "--resume another checkpoint, or start again in another --output-dir"
    )


def _deepspeed_classes() -> list[type]:
    """What DeepSpeed puts into its files besides tensors and numbers: plain data, all of it."""
    return [DynamicLossScaler, LossScaler, ZeroStageEnum]


# --------------------------------------------------------------------------------------------------
# The parts.


def _engine(accelerator: Accelerator) -> DeepSpeedEngine:
    assert accelerator.deepspeed_engine_wrapped is not None, (
        "after accelerator.prepare, with DeepSpeed"
    )
    # Without a GPU Accelerate counts one process, unless it is told the backend.
    assert accelerator.num_processes == torch.distributed.get_world_size()
    return accelerator.deepspeed_engine_wrapped.engine


def _layout(engine: DeepSpeedEngine) -> dict:
    """How ZeRO cuts the state into files. ZeRO shards over all ranks, whatever the parallel layout is."""
    return {
        "ranks": torch.distributed.get_world_size(),
        "zero_stage": int(engine.zero_optimization_stage()),
        "sub_group_size": engine.zero_sub_group_size(),
    }


def _settings(engine: DeepSpeedEngine) -> list[dict]:
    """Learning rate, betas, weight decay, … of every parameter group."""
    groups = engine.optimizer.param_groups
    return [{k: v for k, v in group.items() if k != "params"} for group in groups]


def _random_states() -> dict:
    """The states of all generators, as tensors and plain numbers."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_random_states(states: dict) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """So that the names in it survive a power cut, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first(problems: list[str]) -> str:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more


def _warn(message: str) -> None:
    print(colored(message, "yellow"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    _convert_main(*sys.argv[1:])
