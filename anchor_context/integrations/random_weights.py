"""A model with the random weights that its configuration describes, to train from scratch.

One rank of every machine makes the weights, and writes them as a model's folder; then all load that folder as
they would any other. So the weights are the same on every rank, under every layout and ZeRO stage, also where
ZeRO-3 partitions them while they are loaded.

Guarantees: a function of the configuration and the seed; made in float32 and rounded once.
Costs: one process per machine holds the whole model on its CPU in float32, and the disk until it is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedModel

from anchor_context.files import UNFINISHED, disk_errors, remove
from anchor_context.integrations.language_model import forget_attention
from anchor_context.run.agreement import on_each_machine
from anchor_context.run.saved_model import Source, write_model


@contextmanager
def random_weights(
    accelerator: Accelerator,
    output: Path,
    model_class: type[PreTrainedModel],
    *,
    config: PretrainedConfig,
    source: Source,
    dtype: torch.dtype,
    seed: int,
) -> Iterator[str]:
    """Inside, a folder in `output` with a model of this configuration; gone afterwards. Collective.

    Raises:
        OSError: it cannot be written.
    """
    # Machines may share `output`.
    folder = output / f"{UNFINISHED}random-weights-{accelerator.process_index}"

    def write() -> str:
        with disk_errors(folder, "--output-dir"):
            remove(folder)  # a killed run's
            write_random_model(
                folder, model_class, config=config, source=source, dtype=dtype, seed=seed
            )
        return str(folder)

    yield on_each_machine(accelerator, write)
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        with suppress(OSError):  # what a network file system cannot let go of is no reason to end
            remove(folder)


def write_random_model(
    folder: Path,
    model_class: type[PreTrainedModel],
    *,
    config: PretrainedConfig,
    source: Source,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Write a model whose weights are drawn as transformers draws them for this configuration.

    Args:
        model_class: built by itself, because `from_config` would meet the other ranks under ZeRO-3.
        source: what the folder of the configuration holds besides weights.
    """
    config = copy.deepcopy(config)
    forget_attention(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(dtype)
    write_model(folder, model, model.state_dict(), source)
