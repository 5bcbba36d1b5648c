"""What DeepSpeed 0.19.8's files need: open this when DeepSpeed is upgraded.

* To be written by us (`RankFiles`): hashed on the way, synced, and an error of one rank's disk told to
  all instead of leaving the others in DeepSpeed's barrier.
* To be loaded without running foreign code. DeepSpeed asks `torch.load` for full unpickling, which runs
  whatever a file says. Here PyTorch's own switch turns that into `weights_only` loading for the duration,
  and only the classes in `_deepspeed_classes` are let through; any other is an error that names the file
  and the class.
* To be converted for another number of ranks by DeepSpeed's `ds_to_universal`, and the optimiser to be put
  right afterwards (`load_universal`).
"""

from __future__ import annotations

import copyreg
import glob
import hashlib
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from accelerate import Accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from anchor_context.files import UNFINISHED, sync

MODEL_TAG = "model"
"""The folder within a checkpoint that holds DeepSpeed's files."""

# DeepSpeed puts this enum into its files. Python 3.11.2 (Debian 12's) by itself pickles a member as a call of
# `getattr`, which no `weights_only` load allows, or should; later versions by themselves do as this does.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


def engine_of(accelerator: Accelerator) -> DeepSpeedEngine:
    assert accelerator.deepspeed_engine_wrapped is not None, (
        "after accelerator.prepare, with DeepSpeed"
    )
    # Without a GPU Accelerate counts one process, unless it is told the backend.
    assert accelerator.num_processes == torch.distributed.get_world_size()
    return accelerator.deepspeed_engine_wrapped.engine


def zero_layout(engine: DeepSpeedEngine) -> dict:
    """How ZeRO cuts the state into files. ZeRO shards over all ranks, whatever the parallel layout is."""
    return {
        "ranks": torch.distributed.get_world_size(),
        "zero_stage": int(engine.zero_optimization_stage()),
        "sub_group_size": engine.zero_sub_group_size(),
    }


def settings_of(engine: DeepSpeedEngine) -> list[dict]:
    """Learning rate, betas, weight decay, … of every parameter group."""
    groups = engine.optimizer.param_groups
    return [{k: v for k, v in group.items() if k != "params"} for group in groups]


# --------------------------------------------------------------------------------------------------
# Save.


class RankFiles(TorchCheckpointEngine):
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
            sync(Path(path))
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


def save_engine(engine: DeepSpeedEngine, files: RankFiles) -> None:
    """DeepSpeed writes its state through `files`, and leaves its recovery scripts out. Collective.

    And weights that are not trained: the model that the run began with has them.
    """
    before = engine.checkpoint_engine
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda folder: None
    try:
        engine.save_checkpoint(
            str(files.folder), MODEL_TAG, save_latest=False, exclude_frozen_parameters=True
        )
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script  # the class's own again


# --------------------------------------------------------------------------------------------------
# Load.


def load_engine(engine: DeepSpeedEngine, folder: Path) -> None:
    """What `save_engine` wrote, on as many ranks. Collective; inside `weights_only`."""
    before = settings_of(engine)
    # ZeRO-1 under bfloat16 prints a line of its own on every rank.
    with plain_path(folder) as plain, redirect_stdout(io.StringIO()):
        loaded, _ = engine.load_checkpoint(
            str(plain), MODEL_TAG, custom_load_fn=_load_trained_weights
        )
    if loaded is None:
        raise ValueError(f"DeepSpeed found nothing to load in {folder / MODEL_TAG}")
    # The saved groups replaced ours. Where torch's AdamW saved them, they lack settings that CPU Adam reads.
    for group, own in zip(engine.optimizer.param_groups, before, strict=True):
        group.update(own | group)
    # ZeRO 1 and 2 would go on with the clipping of the run that saved.
    engine.optimizer.clip_grad = engine.gradient_clipping()


def _load_trained_weights(src: dict, dst: torch.nn.Module) -> None:
    """As a strict `dst.load_state_dict(src)`, but for weights that are not trained."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    kept = {name for name, p in dst.named_parameters(remove_duplicate=False) if not p.requires_grad}
    if wrong := [*unexpected, *sorted(set(missing) - kept)]:
        raise ValueError(f"the checkpoint is of another model: {', '.join(wrong[:5])}")


def partition_again(engine: DeepSpeedEngine) -> None:
    """After a load, as a new run begins: with every parameter partitioned. Collective.

    ZeRO-3's load gathers the small ones, and the first forward records what it has to gather. A skipped step
    leaves them partitioned, and the forward after it would end in an error of DeepSpeed's.
    """
    if engine.zero_optimization_partition_weights():
        engine.optimizer.checkpoint_event_prologue()


@contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """A path to `folder` that DeepSpeed can find files under: it takes a path for a pattern (`[1e-3]`).

    That is the folder's own, or else a link in a temporary folder, which goes with the context.
    """
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / "checkpoint"
        if glob.escape(place) != place:
            raise ValueError(
                f"{folder} has one of the characters *?[ in its path, and so has the folder for temporary "
                f"files, {place}: set TMPDIR to another, or rename the first"
            )
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


def load_universal(engine: DeepSpeedEngine, folder: Path, settings: list[dict]) -> None:
    """What `convert` made, on any number of ranks. Collective; inside `weights_only`.

    Args:
        settings: as `settings_of` gave them at the save.
    """
    # As `"checkpoint": {"load_universal": true}` in DeepSpeed's configuration, for this one load.
    engine._config.load_universal_checkpoint = True
    try:
        load_engine(engine, folder)
    finally:
        engine._config.load_universal_checkpoint = False
    _mend_universal(engine, settings)


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


def convert(path: Path) -> Path:
    """Make a universal checkpoint of `path` in a new folder beside it, in a process of its own.

    New each time: such a process outlives a run that is killed, and would go on writing into the next one's.
    """
    needs = (
        "--resume with another number of ranks writes a copy beside the checkpoint: make room there, or "
        "resume with as many ranks as saved it"
    )
    try:
        converted = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}universal-", dir=path.parent))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {needs}", str(path.parent)) from error
    repository = str(Path(__file__).parents[2])
    python_path = [repository, *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "anchor_context.run.deepspeed_files",
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
        refused = re.search(r"\[Errno (\d+)\]|\(os error (\d+)\)", run.stdout)
        if refused:
            number = int(refused[1] or refused[2])
            raise OSError(number, f"{os.strerror(number)}; {needs}", str(converted))
        raise RuntimeError(
            f"{path} could not be converted for this number of ranks:\n" + "\n".join(lines)
        )
    return converted


def _convert_main(source: str, target: str) -> None:
    """The process that `convert` starts. One worker each: they would be forked, and use more memory."""
    from deepspeed.checkpoint.ds_to_universal import main

    from_path, to_path = Path(source), Path(target)
    with (
        weights_only(from_path),
        plain_path(from_path.parent) as plain_from,
        plain_path(to_path.parent) as plain_to,
    ):
        main(
            Namespace(
                input_folder=str(plain_from / from_path.name),
                output_folder=str(plain_to / to_path.name),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )


@contextmanager
def weights_only(checkpoint: Path) -> Iterator[None]:
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


def refuse_foreign(path: Path) -> None:
    """Raise `ValueError` for the first file that `weights_only` would refuse, or that is none of PyTorch's.

    The load itself refuses it, too, but does not say where it is, and advises to unpickle in full. Runs
    nothing of it.
    """
    for file in sorted(path.rglob("*.pt")):
        try:
            with weights_only(file):
                names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except (RuntimeError, ValueError, EOFError, pickle.PickleError) as error:
            raise ValueError(_foreign(file, "what torch.save does not write")) from error
        if names:
            raise ValueError(_foreign(file, ", ".join(sorted(names))))


def _foreign(file: Path, what: str) -> str:
    return (
        f"{file} holds {what}, which no checkpoint saved here does, and loading it could run foreign code: "
        "--resume another checkpoint, or start again in another --output-dir"
    )


def _deepspeed_classes() -> list[type]:
    """What DeepSpeed puts into its files besides tensors and numbers: plain data, all of it."""
    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


if __name__ == "__main__":
    _convert_main(*sys.argv[1:])
