"""Checkpoints of layers that wait in host memory, copied there and back while the device computes.

A layer that is recomputed keeps one tensor for the backward: its input. Here that tensor leaves the device
behind the forward, and comes back one layer before the backward needs it, on a stream of its own:

    forward  layer 0   layer 1   layer 2   layer 3   backward  layer 3   layer 2   layer 1   layer 0
    copies   0 out     1 out     2 out     3 out                         1 back    0 back

When the backward begins, the last `LEAVING` inputs (2 and 3 above) are still on the device, and are taken
from there.

Guarantees: the device holds at most `LEAVING` + 1 of these inputs besides what the layer at work holds, in
forward and backward, however slow the copies are: the computing waits for them before it goes further. The
host buffers are page-locked, allocated once, and used again by every forward.
Costs: layers × (tokens × hidden) of host memory, rounded up by PyTorch to powers of two per layer.

Why not a library's: transformers copies on the computing stream, so nothing overlaps. DeepSpeed's engine
(0.19.8, private) fetches a tensor when it is needed and not before, and its buffers are kept by exact shape,
of which micro-batches have many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

LEAVING = 2
"""Inputs that may be on their way out at once: two, so that a copy has a layer's whole forward to end in."""


@dataclass(frozen=True)
class Checkpoint:
    """A layer's input that was copied to the host."""

    index: int
    """Which one of its forward, from 0."""
    host: Tensor
    """Its values, in the layer's page-locked buffer."""
    device: torch.device


class OffloadedCheckpoints:
    """The host buffers of one model, and what is on its way to them and back.

    Call `begin()` before each forward; layers call `checkpoint(function, input)` in place of
    `torch.utils.checkpoint.checkpoint`. One forward's backward must be done before the next begins.
    """

    def __init__(self, *, most_tokens: int):
        """For forwards of up to `most_tokens` tokens; longer ones make the buffers grow."""
        self._most_tokens = most_tokens
        self._buffers: list[Tensor] = []
        """One (elements,) per layer, of the inputs' dtype."""
        self._stream: Any = None
        self.begin()

    def begin(self) -> None:
        self._saved: list[Checkpoint] = []
        self._leaving: dict[int, tuple[Tensor, Any]] = {}
        """index -> (the input, still on the device; the event behind its copy)."""
        self._arriving: dict[int, tuple[Tensor, Any]] = {}
        """index -> (the input, on the device again; the event behind its copy)."""

    def checkpoint(self, function: Callable, *inputs: Any) -> Any:
        """`function(*inputs)`, recomputed in the backward from inputs that wait in host memory."""
        with saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(function, *inputs, use_reentrant=False)

    def _pack(self, tensor: Tensor) -> Tensor | Checkpoint:
        if tensor.numel() == 0:  # PyTorch's checkpoint saves a tensor without elements besides
            return tensor
        tensor = tensor.detach()  # held without its graph, should no backward come
        saved = Checkpoint(len(self._saved), self._host_memory(tensor), tensor.device)
        self._saved.append(saved)
        self._leaving[saved.index] = tensor, self._copy(saved.host, tensor)
        if len(self._leaving) > LEAVING:
            _, copied = self._leaving.pop(saved.index - LEAVING)
            # Only now may its memory on the device be used for something else.
            _backend(tensor.device).current_stream().wait_event(copied)
        return saved

    def _unpack(self, saved: Tensor | Checkpoint) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if saved.index in self._leaving:
            tensor, _ = self._leaving.pop(saved.index)
        else:
            tensor, copied = self._arriving.pop(saved.index, None) or self._fetch(saved)
            _backend(saved.device).current_stream().wait_event(copied)
        before = saved.index - 1  # the next one that the backward needs
        if before >= 0 and before not in self._leaving and before not in self._arriving:
            self._arriving[before] = self._fetch(self._saved[before])
        return tensor

    def _fetch(self, saved: Checkpoint) -> tuple[Tensor, Any]:
        tensor = torch.empty_like(saved.host, device=saved.device)
        return tensor, self._copy(tensor, saved.host)

    def _copy(self, to: Tensor, source: Tensor) -> Any:
        """Copy behind what is queued now, beside what is queued later; returns the event behind it."""
        device = to.device if source.device.type == "cpu" else source.device
        backend = _backend(device)
        if self._stream is None:
            self._stream = backend.Stream()
        # Behind the kernel that makes the source, or that last used the memory of the destination.
        self._stream.wait_stream(backend.current_stream())
        with backend.stream(self._stream):
            to.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def _host_memory(self, tensor: Tensor) -> Tensor:
        """The next layer's buffer, as long as `tensor` and of its shape."""
        index, length = len(self._saved), tensor.numel()
        if index == len(self._buffers):
            self._buffers.append(tensor.new_empty(0, device="cpu"))
        if len(self._buffers[index]) < length:
            self._buffers[index] = torch.empty(
                max(length, self._most_tokens * tensor.shape[-1]),
                dtype=tensor.dtype,
                pin_memory=tensor.device.type == "cuda",
            )
        return self._buffers[index][:length].view(tensor.shape)


def _backend(device: torch.device):
    """`torch.cuda`, or `torch.cpu`, whose streams do everything at once."""
    return torch.get_device_module(device)
