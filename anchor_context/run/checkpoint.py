"""Checkpoints to resume from: written whole or not at all, verified before they are loaded.

    checkpoints/checkpoint_{steps}_{rows}/
        manifest.json        written last: sizes, SHA-256, steps, rows, ZeRO layout, the caller's state
        model/…              DeepSpeed's files: weights and optimiser, one pair per rank
        rank_{rank}.pt       the rank's random states and its optimiser's settings
        next_step            whether the step after it was finite; not there before that step
    checkpoints/abandoned-{n}/…    those that a run left behind when it was resumed from an earlier one

What DeepSpeed's own files need is in `deepspeed_files.py`.

Guarantees: a folder of that name was complete when it got it (written under another name, every file
synced, renamed). A file that is missing, cut or changed is found by `verify_checkpoint`. A save that
the disk refuses leaves the earlier checkpoints as they were, and all ranks learn of it alike. A checkpoint
makes others go only when the step after it has shown that its weights are good. With the same
number of ranks a resumed run continues bit for bit; with another, DeepSpeed's universal checkpoint
redistributes the same float32 values. With the optimiser offloaded it continues to rounding: DeepSpeed's CPU
Adam multiplies the powers of its betas up from step to step, and computes them anew after a resume.

Costs: saving writes 12 bytes per trained parameter (float32 weights and both Adam moments; 2 more in
bfloat16) at the speed of disk and SHA-256, while training waits. What is not trained, the model has. Finding
one reads it whole. Loading with another number of ranks writes and reads as much again, in one process. All
machines must share the folder.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from anchor_context.files import UNFINISHED, put_in_place, remove, sync, warn, whole
from anchor_context.run.agreement import on_one_rank
from anchor_context.run.deepspeed_files import (
    MODEL_TAG,
    RankFiles,
    convert,
    engine_of,
    load_engine,
    load_universal,
    partition_again,
    refuse_foreign,
    save_engine,
    settings_of,
    weights_only,
    zero_layout,
)

MANIFEST = "manifest.json"
NEXT_STEP = "next_step"
FINITE, NOT_FINITE = "finite\n", "not finite\n"
"""What stands in `NEXT_STEP`."""
ABANDONED = "abandoned-"
NAME = re.compile(r"checkpoint_(\d+)_(\d+)")
CHUNK_BYTES = 1 << 20


@dataclass
class Progress:
    """Where a run stands, however often it was resumed on the way: what a checkpoint keeps as its state."""

    step: int = 0
    """Optimiser steps done."""
    rows: int = 0
    """Rows trained: the place in the data, whatever the number of ranks."""
    tokens_seen: int = 0
    """Without padding."""
    bad_steps: int = 0
    """Steps that were skipped because their gradient was not finite."""
    bad_in_a_row: int = 0

    @classmethod
    def of(cls, state: dict) -> Progress:
        """From what `state_of_checkpoint` gave."""
        names = ("rows", "tokens_seen", "bad_steps", "bad_in_a_row")
        return cls(step=state["steps"], **{name: state[name] for name in names})

    def advance(self, *, rows: int, tokens: int, skipped: bool) -> None:
        """By a step of so many rows and tokens, `skipped` if the weights stayed as they were."""
        self.step += 1
        self.rows += rows
        self.tokens_seen += tokens
        self.bad_steps += skipped
        self.bad_in_a_row = self.bad_in_a_row + 1 if skipped else 0


# --------------------------------------------------------------------------------------------------
# Save.


class RunCheckpoints:
    """The checkpoints of a run while it trains, and which of them are good.

        checkpoints = RunCheckpoints(accelerator, output_dir, keep=2, resumed=None)
        for ...:
            ...                              # a step
            checkpoints.judge(finite=...)    # whether its gradient was
            checkpoints.save(...)            # now and then, behind finite steps only

    The update that breaks the weights has a finite gradient itself; the step after it has none. So a
    checkpoint is *good* once the step after it was finite. Until then it is *unproven*, and kept beside
    `keep` good ones. A step that is not finite puts it *in doubt*, until a finite one follows: a bad batch
    breaks nothing. At most one is unproven at a time, the newest. To be made, and called, by all ranks alike.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, *, keep: int, resumed: Path | None
    ) -> None:
        """Of the run in `output_dir`.

        Args:
            keep: good checkpoints to keep, at least 1.
            resumed: the checkpoint that the run goes on from.

        Raises:
            ValueError: `keep` below 1.
        """
        if keep < 1:
            raise ValueError(
                f"keep={keep} must be at least 1: a run resumes from its last checkpoint"
            )
        self.accelerator, self.output_dir, self.keep = accelerator, Path(output_dir), keep
        self.folder = self.output_dir / "checkpoints"
        self.resumed = resumed
        self.unproven: Path | None = None
        """The newest checkpoint, as long as no finite step has followed it."""
        if resumed is not None and self._is_ours(resumed) and _next_step(resumed) != FINITE:
            self.unproven = resumed

    def save(self, *, steps: int, rows: int, state: dict) -> Path | None:
        """As `save_checkpoint`, unless the newest is of this very place. Collective."""
        if self.unproven is not None and _place(self.unproven) == (steps, rows):
            return self.unproven
        saved = save_checkpoint(
            self.accelerator, self.output_dir, steps=steps, rows=rows, state=state
        )
        self.unproven = saved or self.unproven
        return saved

    def judge(self, *, finite: bool) -> None:
        """Note of the unproven checkpoint, if there is one, whether the step after it was finite.

        If so it is good, and the oldest good ones beyond `keep` go.
        """
        judged = self.unproven
        if judged is None:
            return
        if finite:
            self.unproven = None
        if self.accelerator.is_main_process:
            _note_next_step(judged, FINITE if finite else NOT_FINITE)
            if finite:
                _delete_oldest(self.folder, keep=self.keep)

    def last_good(self) -> Path | None:
        """The newest checkpoint that `judge` found good; None if there is none."""
        good = [path for path in _not_in_doubt(self.folder) if path != self.unproven]
        if good:
            return good[-1]
        elsewhere = self.resumed is not None and not self._is_ours(self.resumed)
        return self.resumed if elsewhere else None

    def _is_ours(self, path: Path) -> bool:
        """Whether it lies in this run's folder: nothing is noted in another's."""
        return path.resolve().parent == self.folder.resolve()


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, *, steps: int, rows: int, state: dict
) -> Path | None:
    """Save all that the next step depends on. Collective, between two optimiser steps.

    Args:
        output_dir: the run's; the checkpoint goes to `output_dir/checkpoints/checkpoint_{steps}_{rows}`.
        steps: optimiser steps done.
        rows: rows trained: the place in the data, whatever the number of ranks.
        state: what else the caller wants back, as JSON can hold it (the main rank's counts).

    Returns:
        Its path, or None where the disk refused (full, read-only, gone): a message names path and
        error, earlier checkpoints are untouched, and the caller can go on.

    Raises:
        RuntimeError: a rank failed for another reason than the disk; on all ranks.
    """
    engine = engine_of(accelerator)
    folder = Path(output_dir) / "checkpoints"
    final = folder / f"checkpoint_{steps}_{rows}"
    unfinished = None

    try:
        unfinished = on_one_rank(accelerator, partial(_prepare, folder, final.name))
        files = RankFiles(unfinished)
        save_engine(engine, files)
        rank_state = {"random": _random_states(), "param_groups": settings_of(engine)}
        files.save(rank_state, unfinished / f"rank_{accelerator.process_index}.pt")

        # One entry per rank, in the same order everywhere: all ranks decide the same from here on.
        ranks = gather_object([(files.error, files.written)])
        errors = [error for error, _ in ranks if error is not None]
        if errors:
            raise errors[0]
        content = {
            "steps": steps,
            "rows": rows,
            "layout": zero_layout(engine),
            "files": {name: entry for _, written in ranks for name, entry in written.items()},
            "state": state,
        }
        on_one_rank(accelerator, partial(_finish, unfinished, final, content))
    except OSError as error:
        if unfinished is not None:
            on_one_rank(accelerator, partial(shutil.rmtree, unfinished, ignore_errors=True))
        if accelerator.is_main_process:
            code = errno.errorcode.get(error.errno, "?")
            reason = (
                f"{error.strerror} (errno {error.errno}, {code})" if error.errno else str(error)
            )
            warn(
                f"checkpoint of step {steps} not saved: {error.filename or final}: {reason}. Earlier "
                f"checkpoints are untouched; training goes on, and --output-dir needs room for the next"
            )
        return None
    return final


def _prepare(folder: Path, name: str) -> Path:
    """Make an empty folder for the checkpoint `name`, and remove what killed runs left of theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{UNFINISHED}*"):
        try:
            remove(leftover)
        except OSError as error:
            warn(f"{leftover} is left of a killed run, and cannot be removed: {error.strerror}")
    unfinished = _free(f"{folder}/{UNFINISHED}{name}")
    try:
        (unfinished / MODEL_TAG).mkdir(parents=True)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return unfinished


def _free(path: str) -> Path:
    """`path`, or the first of path-1, path-2, … that nothing has, not even a link to nowhere."""
    names = itertools.chain([path], (f"{path}-{number}" for number in itertools.count(1)))
    return next(Path(name) for name in names if not os.path.lexists(name))


def _finish(unfinished: Path, final: Path, content: dict) -> None:
    """Write the manifest, sync the folders, and give the checkpoint its name."""
    # As it will be read back: keys are text, tuples are lists.
    content = json.loads(json.dumps(content))
    manifest = {"sha256": _content_digest(content), "content": content}
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
    put_in_place(unfinished, final)


def _note_next_step(path: Path, verdict: str) -> None:
    if _next_step(path) == verdict:
        return
    try:
        with whole(path / NEXT_STEP) as unfinished:
            unfinished.write_text(verdict)
    except OSError as error:
        warn(f"{path / NEXT_STEP} not written: {error.strerror}; it should say: {verdict.strip()}")


def _next_step(path: Path) -> str | None:
    """What is noted about the step after a checkpoint; None if nothing is."""
    try:
        return (path / NEXT_STEP).read_text()
    except OSError:
        return None


def _not_in_doubt(folder: Path) -> list[Path]:
    """The checkpoints in `folder` but those that a step without a finite gradient followed; oldest first."""
    return [path for path in _checkpoints(folder) if _next_step(path) != NOT_FINITE]


def _delete_oldest(folder: Path, *, keep: int) -> None:
    for path in _not_in_doubt(folder)[:-keep]:
        try:
            # Renamed first: killed in the middle, it must not look like a damaged checkpoint.
            remove(path.rename(_free(f"{folder}/{UNFINISHED}deleted-{path.name}")))
        except OSError as error:
            warn(f"old checkpoint not deleted: {error}")


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
        resume: `never`; `auto`, the newest complete one in `output_dir`, and one in doubt
            (`RunCheckpoints`) only where there is no other; or a checkpoint's path.

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
                f"--resume {resume} cannot be loaded: {_in_words(problems)}; name another"
            )
        return Path(resume)
    found = _checkpoints(Path(output_dir) / "checkpoints")
    trusted = _not_in_doubt(Path(output_dir) / "checkpoints")
    in_doubt = [path for path in found if path not in trusted]
    for path in in_doubt:
        warn(f"{path}: the step after it was not finite; it is taken only if no other can be")
    for path in [*reversed(trusted), *reversed(in_doubt)]:
        problems = verify_checkpoint(path)
        if not problems:
            return path
        warn(f"{path} is damaged and skipped: {_in_words(problems)}")
    if found:
        raise ValueError(
            f"--resume auto: every checkpoint in {found[0].parent} is damaged; "
            "to start again, name another --output-dir"
        )
    return None


def _in_words(problems: list[str]) -> str:
    """The first one, and how many more there are."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more


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
    aside = next(path for path in numbered if not os.path.lexists(path))
    aside.mkdir()
    for path in abandoned:
        path.rename(aside / path.name)
    sync(folder)
    names = ", ".join(path.name for path in abandoned)
    warn(f"{names}: later than {resumed} and not this run's; moved to {aside}, delete them at will")


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
    engine = engine_of(accelerator)
    path = Path(path)
    content = on_one_rank(accelerator, partial(_read_manifest, path))
    if content["layout"]["zero_stage"] != engine.zero_optimization_stage():
        raise ValueError(
            f"{path} was saved under ZeRO stage {content['layout']['zero_stage']}, "
            f"this run has {engine.zero_optimization_stage()}: launch it with the same"
        )
    on_one_rank(accelerator, partial(refuse_foreign, path))
    if content["layout"] == zero_layout(engine):
        with weights_only(path):
            load_engine(engine, path)
            rank_state = torch.load(
                path / f"rank_{accelerator.process_index}.pt", weights_only=True
            )
        _restore_random_states(rank_state["random"])
    else:
        converted = on_one_rank(accelerator, partial(convert, path))
        with weights_only(path):
            rank_state = torch.load(path / "rank_0.pt", weights_only=True)
            load_universal(engine, converted, rank_state["param_groups"])
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(converted, ignore_errors=True)
    partition_again(engine)


# --------------------------------------------------------------------------------------------------
# Random states.


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
