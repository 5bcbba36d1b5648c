"""Checkpoints leave and come back in order, through buffers allocated once; nobody reads them too early."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from anchor_context.memory import offload
from anchor_context.memory.offload import LEAVING, OffloadedCheckpoints

LAYERS, HIDDEN = 5, 8


class Copies(OffloadedCheckpoints):
    """Copies as late as they may come: when the computing stream waits for them.

    Until then the destination holds what `torch.empty` left there, here NaN: whoever reads too early computes
    with it. Copies of one stream run in order.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        self.waiting: list = []
        self.log: list[str] = []
        self.most_on_the_way_out = 0

    def _copy(self, to, source):
        out = any(to.data_ptr() == buffer.data_ptr() for buffer in self._buffers)
        buffer = to if out else source
        index = [b.data_ptr() for b in self._buffers].index(buffer.data_ptr())
        self.log.append(f"{'out' if out else 'back'} {index}")
        if not out:
            to.fill_(torch.nan)
        self.waiting.append((to, source))
        return len(self.waiting)  # the event: so many copies are done

    def wait_event(self, event: int) -> None:
        self.most_on_the_way_out = max(self.most_on_the_way_out, len(self._leaving))
        for number, (to, source) in enumerate(self.waiting[:event]):
            if to is not None:
                to.copy_(source)
                self.waiting[number] = None, None


@pytest.fixture
def copies(monkeypatch) -> Copies:
    made = Copies(most_tokens=20)
    monkeypatch.setattr(offload, "_backend", lambda _: SimpleNamespace(current_stream=lambda: made))
    return made


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN))
        for _ in range(LAYERS)
    ).double()


def gradients(model: nn.ModuleList, *, tokens: int, checkpoint=None) -> list[torch.Tensor]:
    """Of the input and all weights, from one forward and backward."""
    torch.manual_seed(tokens)
    first = hidden = torch.randn(1, tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    for layer in model:
        hidden = hidden + (layer(hidden) if checkpoint is None else checkpoint(layer, hidden))
    return list(torch.autograd.grad(hidden.square().sum(), [first, *model.parameters()]))


def check_gradients(offloaded: OffloadedCheckpoints) -> None:
    """Also where a forward had no backward, and where the next one is shorter or longer."""
    model = layers()
    for tokens, backward in ((20, True), (7, True), (13, False), (20, True), (31, True)):
        offloaded.begin()
        if not backward:
            hidden = torch.randn(1, tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
            for layer in model:
                hidden = offloaded.checkpoint(layer, hidden)
            continue
        got = gradients(model, tokens=tokens, checkpoint=offloaded.checkpoint)
        for ours, plain in zip(got, gradients(model, tokens=tokens), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_gradients_are_the_plain_ones_on_the_cpu_s_streams():
    check_gradients(OffloadedCheckpoints(most_tokens=20))


def test_gradients_are_the_plain_ones_where_copies_come_late(copies):
    check_gradients(copies)


def test_they_come_back_one_layer_ahead_in_the_backward_s_order(copies):
    gradients(layers(), tokens=20, checkpoint=copies.checkpoint)
    out = [f"out {index}" for index in range(LAYERS)]
    # The last ones are still on the device, where the backward takes them.
    back = [f"back {index}" for index in reversed(range(LAYERS - LEAVING))]
    assert copies.log == out + back


def test_the_next_one_is_fetched_before_the_layer_is_recomputed(copies):
    model, order = layers(), []
    for index, layer in enumerate(model):
        layer.register_forward_pre_hook(
            lambda module, args, index=index: order.append((index, copies.log[-1]))
        )
    gradients(model, tokens=20, checkpoint=copies.checkpoint)
    recomputed = order[LAYERS:]
    assert recomputed == [(4, "out 4"), (3, "back 2"), (2, "back 1"), (1, "back 0"), (0, "back 0")]


def test_the_device_holds_few_of_them_however_slow_the_copies_are(copies):
    gradients(layers(), tokens=20, checkpoint=copies.checkpoint)
    assert copies.most_on_the_way_out == LEAVING
    assert not copies._leaving and not copies._arriving


def test_a_forward_without_a_backward_leaves_no_graph(copies):
    hidden = torch.randn(1, 5, HIDDEN, dtype=torch.float64, requires_grad=True)
    for layer in layers():
        hidden = copies.checkpoint(layer, hidden)
    assert len(copies._leaving) == LEAVING
    assert not any(tensor.requires_grad for tensor, _ in copies._leaving.values())
    assert not any(buffer.requires_grad for buffer in copies._buffers)


def test_buffers_are_allocated_once(copies):
    model = layers()
    gradients(model, tokens=3, checkpoint=copies.checkpoint)
    addresses = [buffer.data_ptr() for buffer in copies._buffers]
    assert [len(buffer) for buffer in copies._buffers] == [20 * HIDDEN] * LAYERS
    for tokens in (20, 1, 8):
        copies.begin()
        gradients(model, tokens=tokens, checkpoint=copies.checkpoint)
        assert [buffer.data_ptr() for buffer in copies._buffers] == addresses
    copies.begin()
    gradients(model, tokens=21, checkpoint=copies.checkpoint)  # more than was said
    assert [len(buffer) for buffer in copies._buffers] == [21 * HIDDEN] * LAYERS
