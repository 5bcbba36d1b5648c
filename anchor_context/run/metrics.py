"""The log of a run: one JSON line per optimiser step, and the progress bar.

Guarantees: figures are honest. Tokens per second count no padding; the MFU counts the pattern's own
attention work, and the figure that counts full causal attention, as others publish it, stands beside
it under its own name. A step's time is the mean over the steps that are logged together; saving is no part
of it.
Costs: reading a device tensor waits for the device, so steps are kept as tensors and read every
`--logging_steps`. That is the training loop's own only wait. ZeRO-3 waits too: behind its queued gathers
and reductions, at the end of every backward, and for the norm in every update; Liger's loss does twice per
micro-batch (`loss.py`), RoPE of the type dynamic in every forward.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from anchor_context.files import disk_errors, warn, whole
from anchor_context.run.device import peak_flops, peak_memory_bytes
from anchor_context.run.work import ModelWork


class StepLog:
    """The log of the steps: `metrics.jsonl`, `bad_steps.jsonl`, the trackers and the progress bar.

        for batch in log.timed(loader):  # the time that a step waits for its data is in the record
            ...
            log.step(...)                # every --logging_steps as `flush`
            with log.pause():            # a flush, too, and what happens inside takes no step's time
                ...
        log.close()

    To be made, and called, by all ranks alike.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output: Path,
        *,
        work: ModelWork,
        full_pairs: int,
        first_step: int,
        last_step: int,
        logging_steps: int,
    ):
        """Continue the files in `output`, as `MetricsFile` does, and start the clock.

        Args:
            full_pairs: the attention pairs of a step's rows if every token saw all before it.
            first_step: the number of steps done already. last_step: of steps in all.
        """
        self.accelerator, self.work, self.full_pairs = accelerator, work, full_pairs
        self.logging_steps = logging_steps
        self.metrics = self.bad_steps = None  # the main rank's
        if accelerator.is_main_process:
            self.metrics = MetricsFile(output / "metrics.jsonl", keep_steps=first_step)
            self.bad_steps = MetricsFile(output / "bad_steps.jsonl", keep_steps=first_step)
        peak = peak_flops(accelerator.device)
        self.peak = None if peak is None else peak * accelerator.num_processes
        self.bar = tqdm(
            total=last_step,
            initial=first_step,
            desc="training",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        self._last_step = last_step
        self._pace_since: tuple[int, float] | None = None  # the first steps logged, and when
        self._unlogged: list[dict] = []  # steps whose tensors nobody has waited for yet
        self._shown: dict[str, str] = {}  # in the progress bar, of the last step and validation
        self._data_wait = 0.0
        self._logged_at = time.perf_counter()

    def timed(self, batches: Iterable[dict]) -> Iterator[dict]:
        """The batches, the time that each is waited for counted."""
        iterator = iter(batches)  # here: the first step's time is not that of starting the workers

        def timed() -> Iterator[dict]:
            while True:
                asked_at = time.perf_counter()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                self._data_wait += time.perf_counter() - asked_at
                yield batch

        return timed()

    def step(self, **entry: object) -> None:
        """Note an optimiser step: what `finish_record` takes as its entry, and `loss`, a scalar on the
        device, the sum over this rank's targets. Collective."""
        self._unlogged.append(entry)
        self.bar.update()
        if entry["step"] % self.logging_steps == 0:
            self.flush()

    def bad_step(self, step: int, *, rows: list[int]) -> None:
        """Record that the optimiser skipped a step, and the rows it was of."""
        if self.bad_steps is not None:
            self.bad_steps.append({"step": step, "rows": rows})
            warn(f"step {step} skipped: its gradient is not finite")

    def flush(self) -> None:
        """Write what is noted; waits for the device. Collective."""
        if not self._unlogged:
            return
        losses = torch.stack([entry["loss"] for entry in self._unlogged])
        losses = self.accelerator.reduce(losses, "sum").tolist()
        seconds = time.perf_counter() - self._logged_at
        for entry, loss in zip(self._unlogged, losses, strict=True):
            record = finish_record(
                entry,
                loss=loss,
                step_seconds=seconds / len(self._unlogged),
                data_wait_share=self._data_wait / seconds,
                work=self.work,
                full_pairs=self.full_pairs,
                peak=self.peak,
                device=self.accelerator.device,
            )
            if self.metrics is not None:
                self.metrics.append(record)
            self._track(record, step=record["step"])
        self._show(step=self._expected_end(record["step"]) + describe_step(record))
        self._unlogged.clear()
        self._data_wait = 0.0
        self._logged_at += seconds

    def validation(self, step: int, figures: dict) -> None:
        """Add what a validation found behind step `step`, the last one, to its record. Within a `pause`.

        Args:
            figures: numbers, and objects of numbers, which trackers take as `key/name`.
        """
        if self.metrics is not None:
            self.metrics.add_to_last(figures)
        inside = [
            (f"{key}/{name}", number)
            for key, value in figures.items()
            if isinstance(value, dict)
            for name, number in value.items()
        ]
        self._track(dict([*figures.items(), *inside]), step=step)
        self._show(validation=f"eval loss {_in_words(figures['eval_loss'])}")

    def _show(self, **what: str) -> None:
        self._shown |= what
        self.bar.set_postfix_str(", ".join(self._shown.values()))

    def _track(self, record: dict, *, step: int) -> None:
        """Hand the trackers what is a number."""
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        try:
            self.accelerator.log(numbers, step=step)
        except OSError as error:  # no record is a reason to end a run
            warn(f"step {step} is not in the trackers: {error}")

    def _expected_end(self, step: int) -> str:
        """At the pace of all steps since the first were logged, with what came between them."""
        now, left = time.perf_counter(), self._last_step - step
        if self._pace_since is None:
            self._pace_since = step, now
        first, since = self._pace_since
        if step == first or not left:
            return ""
        seconds = (now - since) / (step - first) * left
        return f"ends {time_of_end(datetime.now(), seconds)}, "

    @contextmanager
    def pause(self, doing: str = "training") -> Iterator[None]:
        """For what is no training, as saving: the steps before it are logged, and the clock starts anew
        behind it. Meanwhile the progress bar tells what the run is `doing`. Collective."""
        self.flush()
        self.bar.set_description(doing)
        yield
        self.bar.set_description("training")
        self._logged_at = time.perf_counter()

    def close(self) -> None:
        """Write the rest, and end the progress bar. Collective."""
        self.flush()
        self.bar.close()


def finish_record(
    entry: dict,
    *,
    loss: float,
    step_seconds: float,
    data_wait_share: float,
    work: ModelWork,
    full_pairs: int,
    peak: float | None,
    device: torch.device,
) -> dict:
    """One line of `metrics.jsonl`; a figure that is not finite, or not known, is null.

    Args:
        loss: the sum over the step's targets on all ranks.
        full_pairs: the attention pairs of the step's rows if every token saw all before it.
        peak: bfloat16 operations per second of all GPUs together.
    """
    entry = dict(entry)
    tokens, pairs = entry.pop("tokens"), entry.pop("pairs")
    mean_loss, norm = loss / max(1, entry["target_tokens"]), float(entry["grad_norm"])
    mfu = mfu_if_full = None
    if peak is not None:
        mfu = work.flops(tokens=tokens, pairs=pairs) / (peak * step_seconds)
        mfu_if_full = work.flops(tokens=tokens, pairs=full_pairs) / (peak * step_seconds)
    return entry | {
        "loss": mean_loss if math.isfinite(mean_loss) else None,
        "grad_norm": norm if math.isfinite(norm) else None,
        "step_seconds": step_seconds,
        "tokens_per_second": tokens / step_seconds,
        "peak_memory_bytes": peak_memory_bytes(device),
        "mfu": mfu,
        "mfu_if_full_causal": mfu_if_full,
        "data_wait_share": data_wait_share,
    }


def time_of_end(now: datetime, seconds: float) -> str:
    """The time of day so many seconds from now; with the day where it is another one."""
    end = now + timedelta(seconds=seconds)
    days = (end.date() - now.date()).days
    day = "" if days == 0 else f"{end:%a} " if days < 7 else f"{end:%b} {end.day} "
    return f"{day}{end:%H:%M}"


def describe_step(record: dict) -> str:
    """What the progress bar shows."""
    loss = _in_words(record["loss"])
    mfu = "" if record["mfu"] is None else f", MFU {record['mfu']:.1%}"
    return (
        f"loss {loss}, lr {record['learning_rate']:.2e}, {record['tokens_per_second']:,.0f} tokens/s{mfu}, "
        f"{record['peak_memory_bytes'] / 2**30:.1f} GiB, data wait {record['data_wait_share']:.0%}"
    )


def _in_words(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


class MetricsFile:
    """`metrics.jsonl`: appends one object per step, in the file before the call returns.

    Where the disk refuses, a message says so once; the lines wait, and come with the next one that it takes.
    """

    def __init__(self, path: Path, *, keep_steps: int):
        """Continue the file behind step `keep_steps`; what a killed run wrote past it is dropped."""
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= keep_steps]
        with disk_errors(path, "--output-dir"), whole(path) as unfinished:
            unfinished.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._end = path.stat().st_size
        """Where the whole lines end: what a full disk cut off lies behind it, and is written over."""
        self._waiting = b""

    def append(self, record: dict) -> None:
        refused_before = bool(self._waiting)
        self._waiting += (json.dumps(record) + "\n").encode()
        try:
            # Not through a link: the file was made in __init__, and a link came later.
            descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "r+b") as stream:
                stream.truncate(self._end)
                stream.seek(self._end)
                stream.write(self._waiting)
        except OSError as error:
            if not refused_before:
                warn(
                    f"{self.path} not written: {error.strerror} (errno {error.errno}). Its lines wait "
                    "until the disk takes them; training goes on"
                )
        else:
            self._end += len(self._waiting)
            self._waiting = b""

    def add_to_last(self, more: dict) -> None:
        """Add keys to the last record, where there is one. The file is written anew, whole: whenever the
        process is stopped, the record is there with all of them or with none."""
        try:
            with os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
                on_disk = stream.read(self._end)
            lines = on_disk + self._waiting
            if not lines:
                return
            start = lines.rfind(b"\n", 0, -1) + 1
            line = (json.dumps(json.loads(lines[start:]) | more) + "\n").encode()
            if start >= len(on_disk):
                self._waiting = self._waiting[: start - len(on_disk)] + line
                return
            with whole(self.path) as unfinished:
                unfinished.write_bytes(lines[:start] + line)
            self._end = start + len(line)
        except OSError as error:
            warn(f"{self.path}: {error.strerror}; its last line lacks {', '.join(more)}")


def read_metrics(path: Path, *keys: str) -> list[dict]:
    """The records of a `metrics.jsonl` that have a step, and these keys.

    A last line that was cut off by a kill is left out; any other that is no such record is left out and told.
    """
    text = path.read_bytes() if path.exists() else b""
    whole_lines = text[: text.rfind(b"\n") + 1]  # a line is whole once its end is written
    records, broken = [], []
    for number, line in enumerate(whole_lines.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if (
            isinstance(record, dict)
            and isinstance(record.get("step"), int)
            and record.keys() >= {*keys}
        ):
            records.append(record)
        else:
            broken.append(number)
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        warn(f"{path}: line {broken[0]}{more} is no record of a step; left out")
    return records


def losses_at_the_ends(records: list[dict]) -> str:
    """The first loss and the last in words; in longer runs the last ten's mean, since rows differ."""
    last = records[-10:] if len(records) >= 20 else records[-1:]
    mean = " (the last 10's mean)" if len(last) > 1 else ""
    steps = f"{records[-1]['step']:,} steps"
    return f"{_mean_loss(records[:1])} -> {_mean_loss(last)} in {steps}{mean}"


def _mean_loss(records: list[dict]) -> str:
    finite = [record["loss"] for record in records if record["loss"] is not None]
    return f"{sum(finite) / len(finite):.3f}" if finite else "not finite"
