"""RoPE's frequencies stay float32, whatever type the weights have and whoever casts them.

Rounded to bfloat16 they turn far positions by many radians (arXiv 2411.13476). Libraries have rounded them
together with the weights: transformers as it loaded a model, DeepSpeed before 0.19.2 as it wrapped one.

    restore = keep_rotary_frequencies(model)      # just loaded
    model = wrap(model)
    restore()

Guarantees: after `restore()` every table of frequencies is float32 and holds what the model's configuration
says, or what somebody put there in float32 before `keep_rotary_frequencies`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def keep_rotary_frequencies(model: nn.Module) -> Callable[[], list[str]]:
    """Remember the float32 frequencies of a `model` that is not wrapped yet.

    Frequencies that were rounded already are computed anew, from the configuration.

    Returns:
        A function without arguments that puts them back into the same modules, and returns the names of
        the buffers that somebody had rounded or changed.

    Raises:
        ValueError: they were rounded already, and the model's code does not say how to compute them.
    """
    kept = [
        (name, module, own, _float32_frequencies(module, own))
        for prefix, module in model.named_modules()
        for own, _ in module.named_buffers(recurse=False)
        if (name := f"{prefix}.{own}").endswith("inv_freq")
    ]

    def restore() -> list[str]:
        changed = []
        for name, module, own, frequencies in kept:
            now = getattr(module, own)
            frequencies = frequencies.to(now.device)
            if now.dtype != torch.float32 or not now.equal(frequencies):
                setattr(module, own, frequencies)
                changed.append(name)
        return changed

    return restore


def _float32_frequencies(table: nn.Module, name: str) -> Tensor:
    """A copy of the buffer `name` of a rotary `table`, as it was before anybody rounded it."""
    buffer = getattr(table, name)
    if buffer.dtype == torch.float32 and not buffer.equal(buffer.bfloat16().float()):
        return buffer.clone()
    if not hasattr(table, "config"):
        raise ValueError(
            f"the RoPE frequencies of {type(table).__name__} were rounded to {buffer.dtype} as the model was "
            "loaded, and the class keeps no config to compute them from: load the model's code in float32"
        )
    # Modules of transformers compute their frequencies from the configuration as they are made.
    return getattr(type(table)(config=table.config), name)
