"""The folder of a run: who may write into it, and what lies in it besides checkpoints and metrics.

.lock            held by the main rank while it lives: one process writes here at a time
args.json        all flags as resolved, what was chosen by them, versions
step-{steps}/    a plain Hugging Face model and tokenizer, no code of this project needed
best/            such a model: that of the lowest validation loss (`--keep_best`), and which that is

python -m anchor_context.run.folder OUTPUT    # prints the short summary of a run
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from anchor_context.command_line import FlagParser, one_line_errors
from anchor_context.files import disk_errors, warn, whole
from anchor_context.run.agreement import on_one_rank
from anchor_context.run.metrics import losses_at_the_ends, read_metrics
from anchor_context.run.saved_model import Source, write_model

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "yunchang", "datasets")
"""Whose versions are recorded."""


LOCK = ".lock"


def claim_output(output: Path, *, resume: str) -> str:
    """Make the output folder this process's own, as long as it lives. On the main rank.

    The system takes the lock back when the process ends, however it ends, and no forked worker inherits it.
    On a network file system it holds between machines; where there are no locks a warning says so.

    Returns:
        What the lock's file says, for `sees_claim`.

    Raises:
        ValueError: another process writes there, or, as `check_output_is_free`, has written.
        OSError: the folder cannot be made or written.
    """
    with disk_errors(output, "--output-dir"):
        output.mkdir(parents=True, exist_ok=True)
        # Never closed: the lock would go with it.
        descriptor = os.open(output / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    claim = _claim()
    _lock(descriptor, fcntl.LOCK_EX, output)
    with disk_errors(output / LOCK, "--output-dir"):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, claim.encode(), 0)
        os.fsync(descriptor)  # other machines see what is written when a file is closed, or synced
    check_output_is_free(output, resume=resume)
    return claim


def _claim() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


SEE_SECONDS = 60.0
"""How long a network file system may remember that a file was not there."""


def sees_claim(output: Path, claim: str) -> bool:
    """Whether this machine sees the main rank's output folder, in which `claim_output` left its `claim`."""
    if claim == _claim():
        return True  # and to open and close the file here would give up the lock
    deadline = time.monotonic() + SEE_SECONDS
    while True:
        with suppress(OSError):
            if (output / LOCK).read_text() == claim:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(1)


def check_nobody_writes(output: Path) -> None:
    """Raise `ValueError` if a run that lives writes into the output folder. Changes nothing."""
    try:
        descriptor = os.open(output / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return  # then there is none, or `claim_output` says what is wrong
    try:
        _lock(descriptor, fcntl.LOCK_SH, output)  # shared: all ranks look at once
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int, output: Path) -> bool:
    """Whether the lock is ours. Raises `ValueError` where another process has it."""
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            raise ValueError(
                f"--output-dir {output}: {holder} writes there; wait for its end, or name another folder"
            ) from None
        if kind == fcntl.LOCK_EX:
            warn(
                f"{output / LOCK}: {error.strerror}; start no second run with this --output-dir, for nothing "
                "on this file system would stop it"
            )
        return False
    return True


def check_output_is_free(output: Path, *, resume: str) -> None:
    """Raise `ValueError` if another run lies in the output folder and nobody asked to continue it.

    A run with models but no checkpoint cannot be continued, and to start over would overwrite it.

    Args:
        resume: "never", "auto", or a checkpoint's path.
    """
    models = sorted(path.name for path in output.glob("step-*"))
    has_checkpoint = any(output.glob("checkpoints/checkpoint_*"))
    if resume == "auto":
        if models and not has_checkpoint:
            raise ValueError(
                f"--resume auto: {output} has models ({', '.join(models)}) but no checkpoint to continue "
                "from; name another --output-dir, and pass --checkpoint_every to be able to continue that one"
            )
        return
    named = resume != "never"
    if named and Path(resume).resolve().is_relative_to((output / "checkpoints").resolve()):
        return
    records = [n for n in ("args.json", "metrics.jsonl", "checkpoints") if (output / n).exists()]
    if found := records + models:
        whose = f" than that of --resume {resume}" if named else ""
        continue_it = ", or pass --resume auto to continue it" if has_checkpoint else ""
        raise ValueError(
            f"--output-dir {output} holds another run{whose} ({', '.join(found)}); "
            f"name another folder{continue_it}"
        )


def record_run(output: Path, **settings: object) -> None:
    """Write `args.json`: the settings, as JSON can hold them, and the versions of all that takes part."""
    record = settings | {
        # PyTorch itself knows for which CUDA it was built.
        "versions": {name: metadata.version(name) for name in PACKAGES}
        | {"torch": torch.__version__},
        "git_commit": git_commit(),
    }
    path = output / "args.json"
    with disk_errors(path, "--output-dir"), whole(path) as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")


def recorded_memory_plan(checkpoint: Path) -> dict | None:
    """The memory plan in the `args.json` of the checkpoint's run; None where there is none to read."""
    record = checkpoint.parent.parent / "args.json"
    try:
        return json.loads(record.read_bytes()).get("memory") if record.exists() else None
    except (ValueError, AttributeError):
        warn(f"{record} is not what a run wrote: the memory is planned anew")
        return None


def git_commit() -> str | None:
    """Of this checkout; None without git or outside a checkout."""
    if shutil.which("git") is None:
        return None
    command = ["git", "rev-parse", "HEAD"]
    asked = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return asked.stdout.strip() or None


def save_model(
    accelerator: Accelerator,
    model: torch.nn.Module,
    source: Source,
    folder: Path,
    *,
    must: bool,
    write: Callable[[Path, PreTrainedModel, dict[str, Tensor], Source], None] = write_model,
    validation: dict | None = None,
) -> None:
    """Write a plain Hugging Face model and tokenizer. Collective: ZeRO-3 gathers the weights.

    Where the disk refuses, training goes on with a message, unless the model `must` be saved: then it is
    tried again for `WAIT_SECONDS`, because the training would be lost with it.

    Args:
        model: a `CausalLMWithLoss`, prepared by Accelerate.
        source: of the model that is trained.
        write: writes the folder out of the model and its gathered weights.
        validation: what `validation_of` will say of it.

    Raises:
        OSError: the disk refused, to the end, what must be saved. Names path and flag.
    """
    weights = accelerator.get_state_dict(model)  # None off the main process

    def write_folder() -> None:
        plain = {name.removeprefix("model."): weight for name, weight in weights.items()}
        with disk_errors(folder, "--output-dir"), whole(folder) as unfinished:
            write(unfinished, accelerator.unwrap_model(model).model, plain, source)
            if validation is not None:
                (unfinished / VALIDATION).write_text(json.dumps(validation))

    try:
        on_one_rank(accelerator, partial(_patiently, write_folder) if must else write_folder)
    except OSError as error:
        if must:
            raise
        if accelerator.is_main_process:
            warn(f"the model of {folder.name} was not saved: {error}; training goes on")


VALIDATION = "validation.json"


def validation_of(folder: Path) -> dict | None:
    """The `step` and `eval_loss` of the model in `folder`; None where there is none, or nobody noted them."""
    try:
        return json.loads((folder / VALIDATION).read_bytes())
    except FileNotFoundError:
        return None


WAIT_SECONDS, PAUSE_SECONDS = 1800.0, 20.0


def _patiently(write: Callable[[], None]) -> None:
    """`write`, again and again while the disk refuses; its error after `WAIT_SECONDS`."""
    deadline, told = time.monotonic() + WAIT_SECONDS, False
    while True:
        try:
            return write()
        except OSError as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                warn(f"{error}; trying again for {WAIT_SECONDS / 60:.0f} minutes")
            told = True
        time.sleep(PAUSE_SECONDS)


def summary(output: Path) -> str:
    """What the run in `output` did, in a few lines, from its `args.json` and `metrics.jsonl`.

    Raises:
        ValueError: there is no run.
    """
    if not output.is_dir():
        raise ValueError(f"{output}: no such folder; give a run's --output-dir")
    if not (output / "args.json").exists():
        runs = sorted(path.parent for path in output.glob("*/args.json"))
        hint = f"did you mean {runs[0]}?" if runs else "it has no args.json"
        raise ValueError(f"{output} holds no run; {hint}")
    try:
        arguments = json.loads((output / "args.json").read_bytes())
        data, layout = arguments["data"], arguments["layout"]
        pattern = arguments["flags"]["attention_pattern"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{output / 'args.json'} is not what a run wrote: {error!r}") from error
    records = read_metrics(output / "metrics.jsonl", "loss", "tokens_per_second")
    lines = [f"run      {output} ({pattern}, {layout})"]
    if records:
        speeds = sorted(record["tokens_per_second"] for record in records)
        lines += [
            f"loss     {losses_at_the_ends(records)}",
            f"speed    {speeds[len(speeds) // 2]:,.0f} tokens/s (median)",
        ]
    if validated := [record for record in records if record.get("eval_loss") is not None]:
        best = min(validated, key=lambda record: record["eval_loss"])
        lines.append(
            f"valid    loss {validated[0]['eval_loss']:.3f} -> {validated[-1]['eval_loss']:.3f}, the lowest "
            f"{best['eval_loss']:.3f} at step {best['step']:,}"
        )
        if kept := validation_of(output / "best"):
            lines.append(
                f"best     {output / 'best'}, loss {kept['eval_loss']:.3f} at step {kept['step']:,}"
            )
    left_out = data["documents_left_out"]  # by --mixture or --upsample_long
    kept = f"{left_out:,} documents left out by the sampling" if left_out else "all kept"
    if held_out := data.get("held_out_documents"):
        kept += f", {held_out:,} more held out for validation"
    lines.append(
        f"data     {data['documents']:,} documents, {data['document_tokens']:,} tokens "
        f"in {data['rows']:,} rows, {kept} ({data['skipped_documents']:,} bad documents skipped)"
    )
    ours = [path for path in output.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    models = sorted(ours, key=lambda path: int(path.name.removeprefix("step-")))
    plot = output / "loss.png"
    lines += [
        f"model    {models[-1] if models else 'none yet'}",
        f"plot     {plot if plot.exists() else 'none yet'}",
        f"metrics  {output / 'metrics.jsonl'}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    with one_line_errors():
        parser = FlagParser(
            prog="python -m anchor_context.run.folder",
            description="Prints the short summary of a run.",
        )
        parser.add_argument("output", type=Path, help="a run's --output-dir")
        print(summary(parser.parse_args().output))
