"""What both of the ablations train with: one variant at a time, all from the same weights and rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from common import seconds  # isort: skip
import torch
from torch import Tensor
from transformers import PreTrainedModel

from anchor_context.attention.patterns import PATTERNS
from anchor_context.engine import make_engine
from anchor_context.integrations.boundaries import layout_of_starts
from anchor_context.integrations.models import set_attention
from anchor_context.loss import CausalLMWithLoss, tiled_loss

PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}
COLOURS = {"start": "grey"} | {name: pattern.colour for name, pattern in PATTERNS.items()}


class Variant:
    """A pattern, a model in its precision, and AdamW on float32 master weights: `step(batches)`."""

    def __init__(
        self,
        pattern: str,
        precision: str,
        model: PreTrainedModel,
        start: dict[str, Tensor] | None,
        *,
        rate: Callable[[int], float],
    ):
        """
        Args:
            precision: what the variant is called by, beside its pattern.
            model: on its device, in its type; built in it, for a cast would round RoPE's frequencies too.
            start: float32 weights, or None for those that the model has.
            rate: of learning, by the number of steps done.
        """
        self.pattern, self.precision, self.rate = pattern, precision, rate
        self.model, self.device = model.train(), model.device
        if start is not None:
            model.load_state_dict(start)
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        # The flash kernels of CUDA take no float32.
        name = "flex" if self.device.type == "cuda" and model.dtype == torch.float32 else "flash"
        self._engine = make_engine(name, device=self.device, dtype=model.dtype)
        set_attention(model, self._engine.attend)
        self.engine = f"{self._engine.name}, {self._engine.kernel}"
        self.loss = CausalLMWithLoss(model, tiled_loss)
        self.weights = list(model.parameters())
        # The unrounded start, not the model's rounded copy of it.
        self.masters = [
            (p.detach() if start is None else start[name].to(self.device)).float().clone()
            for name, p in model.named_parameters()
        ]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=rate(0), betas=(0.9, 0.95), weight_decay=0.0
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batches: list[dict]) -> None:
        """One optimiser step on the mean loss over all targets of the micro-batches."""
        inputs = [inputs_of(batch, self.pattern, self.device) for batch in batches]
        self.seconds.append(seconds(lambda: self._step(inputs), self.device))

    def _step(self, micro_batches: list[dict]) -> None:
        self.losses.append(self.gradients(micro_batches).item())
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.param_groups[0]["lr"] = self.rate(len(self.losses) - 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.copy_masters()

    def gradients(self, micro_batches: list[dict]) -> Tensor:
        """The mean loss over all targets; leaves its gradient in the masters, summed in float32."""
        targets = sum((inputs["labels"] >= 0).sum() for inputs in micro_batches)
        mean = torch.zeros((), device=self.device)
        for inputs in micro_batches:
            loss = self.loss(**inputs)[0] / targets
            loss.backward()
            mean += loss.detach()
            for master, weight in zip(self.masters, self.weights, strict=True):
                gradient, weight.grad = weight.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        return mean

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Round the masters into the model."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            weight.copy_(master)

    @contextmanager
    def evaluated(self) -> Iterator[PreTrainedModel]:
        """The model with PyTorch's own causal attention."""
        self.model.set_attn_implementation("sdpa")
        self.model.eval()
        try:
            yield self.model
        finally:
            set_attention(self.model, self._engine.attend)
            self.model.train()


def inputs_of(batch: dict, pattern: str, device: torch.device) -> dict:
    """The model's arguments: tokens and labels of the batch, positions and mask of the pattern."""
    starts = batch["layout"].cu_seqlens[:-1].numpy()
    layout = layout_of_starts(
        starts,
        like=batch["input_ids"],
        pattern=pattern,
        anchor_placement=PATTERNS[pattern].placement("per_document"),
    ).to(device)
    return {
        "input_ids": batch["input_ids"].to(device),
        "labels": batch["labels"].to(device),
        "position_ids": layout.position_ids,
        "layout": layout,
    }


def mean_by(pairs: Iterable[tuple]) -> dict:
    values: dict = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    return {key: statistics.fmean(of_key) for key, of_key in values.items()}
