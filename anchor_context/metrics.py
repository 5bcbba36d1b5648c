"""The record of a run: one JSON line per optimiser step, and the loss plot.

Guarantees: figures are honest. Tokens per second count no padding; the MFU counts the pattern's own
attention work, and the figure that counts full causal attention, as others publish it, stands beside
it under its own name. Reading a device tensor waits for the device, so steps are kept as tensors and
written every `--logging_steps`; their step time is then the mean over those steps.

`StepProfiler` is the microscope besides: a torch profiler trace of a few steps.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from termcolor import colored

PEAK_BF16_FLOPS = {  # dense, per second, from the vendors' data sheets
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,  # before "H100": the first name that fits counts
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}


@dataclass(frozen=True)
class ModelWork:
    """What one token, and one attended pair, cost: the factors of the model's floating-point work."""

    matmul_parameters: int
    """Parameters that multiply every token: all but the input embedding."""
    attention_width: int
    """layers × heads × head dimension."""

    @classmethod
    def of(cls, config, *, parameters: int) -> ModelWork:
        """From a transformers configuration and the number of distinct parameters."""
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        width = config.num_hidden_layers * config.num_attention_heads * head_dim
        return cls(matmul_parameters=parameters - embedding, attention_width=width)

    def flops(self, *, tokens: int, pairs: int) -> float:
        """Forward and backward work: 6 per parameter and token, 12 per pair and attention width.

        (PaLM, arXiv 2204.02311, appendix B; a pair costs 2 multiply-adds forward, twice that
        backward.) Recomputation does not count.
        """
        return 6 * self.matmul_parameters * tokens + 12 * self.attention_width * pairs


def peak_flops(device: torch.device) -> float | None:
    """bfloat16 operations per second that the GPU's data sheet promises; None if unknown or no GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_BF16_FLOPS.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: the allocator's on a GPU, the process's resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # Linux; its getrusage would count the launcher too, which became this process
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MetricsFile:
    """`metrics.jsonl`: appends one object per step, in the file before the call returns.

    Where the disk refuses, a message says so once; the lines wait, and come with the next one that it takes.
    """

    def __init__(self, path: Path, *, keep_steps: int):
        """Continue the file behind step `keep_steps`; what a killed run wrote past it is dropped."""
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= keep_steps]
        # Written beside it, so that a kill here leaves the old file whole.
        rewritten = path.with_name(f".{path.name}.rewritten")
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept))
        rewritten.replace(path)
        self._end = path.stat().st_size
        """Where the whole lines end: what a full disk cut off lies behind it, and is written over."""
        self._waiting = b""

    def append(self, record: dict) -> None:
        refused_before = bool(self._waiting)
        self._waiting += (json.dumps(record) + "\n").encode()
        try:
            with self.path.open("r+b") as stream:
                stream.truncate(self._end)
                stream.seek(self._end)
                stream.write(self._waiting)
        except OSError as error:
            if not refused_before:
                _warn(
                    f"{self.path} not written: {error.strerror} (errno {error.errno}). Its lines wait "
                    "until the disk takes them; training goes on"
                )
        else:
            self._end += len(self._waiting)
            self._waiting = b""


def read_metrics(path: Path) -> list[dict]:
    """The records of a `metrics.jsonl`; a last line that was cut off by a kill is left out."""
    text = path.read_text() if path.exists() else ""
    whole_lines = text[: text.rfind("\n") + 1]  # a line is whole once its end is written
    return [json.loads(line) for line in whole_lines.splitlines()]


def losses_at_the_ends(records: list[dict]) -> str:
    """The first loss and the last in words; in longer runs the last ten's mean, since rows differ."""
    last = records[-10:] if len(records) >= 20 else records[-1:]
    mean = " (the last 10's mean)" if len(last) > 1 else ""
    steps = f"{records[-1]['step']:,} steps"
    return f"{_mean_loss(records[:1])} -> {_mean_loss(last)} in {steps}{mean}"


def _mean_loss(records: list[dict]) -> str:
    finite = [record["loss"] for record in records if record["loss"] is not None]
    return f"{sum(finite) / len(finite):.3f}" if finite else "not finite"


def plot_loss(metrics: Path, plot: Path) -> None:
    """Draw loss and learning rate against tokens seen, as a PNG; a message where the disk refuses.

    A plot is no reason to call a finished run failed. Without records there is none.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(metrics)
    if not records:
        return
    tokens = [record["tokens_seen"] for record in records]
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    losses = [math.nan if record["loss"] is None else record["loss"] for record in records]
    line = axis.plot(tokens, losses, color="C0", label="loss")
    axis.set_xlabel("tokens seen")
    axis.xaxis.set_major_locator(pyplot.MaxNLocator(5))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_ylabel("loss (nats per target token)")
    axis.grid(alpha=0.3)
    rate_axis = axis.twinx()
    rates = [record["learning_rate"] for record in records]
    line += rate_axis.plot(tokens, rates, color="C1", alpha=0.6, label="learning rate")
    rate_axis.set_ylabel("learning rate")
    rate_axis.set_ylim(bottom=0)
    axis.legend(handles=line, loc="upper right")
    axis.set_title(f"loss {losses_at_the_ends(records)}")
    try:
        figure.savefig(plot, dpi=120)
    except OSError as error:
        _warn(f"{plot} not written: {error.strerror} (errno {error.errno})")
    pyplot.close(figure)


class StepProfiler:
    """Writes a torch profiler trace of some steps (`--profile_steps A:B`), for Perfetto."""

    def __init__(self, steps: str | None, folder: Path, *, rank: int):
        """Of steps "A:B", into folder/steps-A-B.rank-R.json.gz; None profiles nothing."""
        self.profile = None
        if steps is not None:
            self.first, self.last = parse_profile_steps(steps)
            self.trace = folder / f"steps-{self.first}-{self.last}.rank-{rank}.json.gz"
        else:
            self.first = self.last = 0  # steps count from 1

    def before(self, step: int) -> None:
        """Call before optimiser step `step`. A resumed run may come in between A and B."""
        if self.profile is None and self.first <= step <= self.last:
            self.profile = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self.profile.start()

    def after(self, step: int, *, final: bool = False) -> None:
        """Call after it; `final` if the run ends here, perhaps before B."""
        if self.profile is not None and (final or step == self.last):
            self.profile.stop()
            self.trace.parent.mkdir(parents=True, exist_ok=True)
            self.profile.export_chrome_trace(str(self.trace))
            self.profile, self.first, self.last = None, 0, 0


def parse_profile_steps(steps: str) -> tuple[int, int]:
    """ "A:B" -> the first and the last step to profile, counted from 1.

    Raises:
        ValueError: not two whole numbers, or no step.
    """
    first, colon, last = steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(
            f"--profile_steps {steps} must be A:B, the first and the last step to profile, such as 3:5"
        )
    return int(first), int(last)


def _warn(message: str) -> None:
    print(colored(message, "red"), file=sys.stderr, flush=True)
