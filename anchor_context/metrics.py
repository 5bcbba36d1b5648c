"""The record of a run: one JSON line per optimiser step, and the loss plot.

Guarantees: figures are honest. Tokens per second count no padding; the MFU counts the pattern's own
attention work, and the figure that counts full causal attention, as others publish it, stands beside
it under its own name. Reading a device tensor waits for the device, so steps are kept as tensors and
written every `--logging_steps`; their step time is then the mean over those steps.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

PEAK_BF16_FLOPS = {  # dense, per second, from the vendors' data sheets
    "B200": 2250e12,
    "H200": 989e12,
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
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MetricsFile:
    """`metrics.jsonl`: appends one object per step, on disk before the call returns."""

    def __init__(self, path: Path, *, keep_steps: int):
        """Continue the file behind step `keep_steps`; what a killed run wrote past it is dropped."""
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= keep_steps]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def append(self, record: dict) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """The records of a `metrics.jsonl`; a last line that was cut off by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.endswith("}"):
            records.append(json.loads(line))
    return records


def plot_loss(metrics: Path, plot: Path) -> None:
    """Draw loss and learning rate against tokens seen, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(metrics)
    tokens = [record["tokens_seen"] for record in records]
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    line = axis.plot(tokens, [record["loss"] for record in records], color="C0", label="loss")
    axis.set_xlabel("tokens seen")
    axis.set_ylabel("loss (nats per target token)")
    axis.grid(alpha=0.3)
    rate_axis = axis.twinx()
    rates = [record["learning_rate"] for record in records]
    line += rate_axis.plot(tokens, rates, color="C1", alpha=0.6, label="learning rate")
    rate_axis.set_ylabel("learning rate")
    rate_axis.set_ylim(bottom=0)
    axis.legend(handles=line, loc="upper right")
    axis.set_title(f"{records[-1]['step']} steps, final loss {records[-1]['loss']:.3f}")
    figure.savefig(plot, dpi=120)
    pyplot.close(figure)
