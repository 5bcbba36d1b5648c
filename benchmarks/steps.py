"""One training step of one model on one row under several plans: what the benchmarks of steps take.

    auto            this project, with the memory plan that `train.py` would take for the whole row
    PLANS           this project, with a plan by name, some of them in micro-batches
    plain_hf        a plain Hugging Face loop: padding-free rows (positions restart at every document, from
                    which transformers makes its block-diagonal mask), sdpa, the model's own loss over full
                    logits

All of them end with the same torch AdamW. No DeepSpeed: one process.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from common import document_lengths, layout_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from anchor_context.attention.patterns import layout_of_units
from anchor_context.engine import make_engine
from anchor_context.integrations.models import set_attention
from anchor_context.layout import IGNORE_INDEX
from anchor_context.loss import CausalLMWithLoss, liger_available, liger_loss, tiled_loss
from anchor_context.memory.liger import apply_liger
from anchor_context.memory.plan import apply_memory_plan, choose_memory_plan, free_memory
from anchor_context.memory.treatments import TreatedModel, Treatment
from anchor_context.run.device import peak_memory_bytes

VARIANTS = ("anchor", "full", "plain_hf")
"""What is compared: two patterns, and the plain loop."""


@dataclass(frozen=True)
class Shape:
    """A LLaMA's sizes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def config(self, *, max_length: int) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=max_length,
        )

    def model(self, *, device: torch.device, dtype: torch.dtype, max_length: int):
        torch.manual_seed(0)
        with device:
            return LlamaForCausalLM(self.config(max_length=max_length)).to(dtype).train()


TINY = Shape(2, 64, 172, 4, 2, 512)
"""For tests of the benchmarks."""
SMALL = Shape(8, 256, 688, 4, 2, 32_768)
"""The CPU's default: heads of 64."""
ONE_BILLION = Shape(16, 2048, 8192, 32, 8, 128_256)
"""LLaMA-3.2-1B's sizes, without tied embeddings."""
SHAPES = {"tiny": TINY, "small": SMALL, "1b": ONE_BILLION}


@dataclass(frozen=True)
class Plan:
    """What saves memory in a step."""

    treatment: Treatment
    micro_batch_tokens: int | None = None
    """Whole documents up to so many tokens make a forward; None: the whole row."""

    def __str__(self) -> str:
        if self.micro_batch_tokens is None:
            return str(self.treatment)
        return f"micro-batches of {self.micro_batch_tokens:,} tokens, {self.treatment}"


PLANS = {
    "micro_batches": Plan(Treatment(), micro_batch_tokens=32_768),
    "whole": Plan(Treatment()),
    "checkpointed": Plan(Treatment(1)),
    "tiled": Plan(Treatment(1, tiled_mlp=True)),
    "offloaded": Plan(Treatment(1, offload=True, tiled_mlp=True)),
}


class Step:
    """One optimiser step on a row: `Step(…)(lengths, pattern)` -> the mean loss, a tensor."""

    def __init__(
        self,
        plan: str | Plan,
        shape: Shape,
        *,
        device: torch.device,
        dtype: torch.dtype,
        row_length: int,
        **plan_for,
    ):
        """
        Args:
            plan: a plan, or "auto", a name in `PLANS`, or "plain_hf".
            row_length: of the longest row.
            plan_for: what "auto" tells `choose_memory_plan` besides; it may use the memory that is free.
        """
        self.device, self.dtype, self.vocabulary = device, dtype, shape.vocabulary
        self.plan = plan if isinstance(plan, Plan) else PLANS.get(plan)
        self.plain = plan == "plain_hf"
        self.model = shape.model(device=device, dtype=dtype, max_length=row_length)
        self.told = str(self.plan or plan)
        """The plan in words."""
        if self.plain:
            self.model.set_attn_implementation("sdpa")
        else:
            self.use_kernel(None)
            if self.plan is None:
                memory = choose_memory_plan(
                    self.model,
                    device=device,
                    row_tokens=row_length,
                    longest_unit=row_length,
                    **{"free_bytes": free_memory(device)} | plan_for,
                )
                self.treat = apply_memory_plan(self.model, memory)
                self.most_tokens, fused = memory.micro_batch_tokens, memory.liger.value
            else:
                fused = liger_available(device)
                if fused:
                    apply_liger(self.model)
                treatment = self.plan.treatment
                if device.type == "cpu":  # there is nowhere else to keep anything
                    treatment = replace(treatment, offload=False)
                treated = TreatedModel(
                    self.model,
                    tiles=treatment.tiled_mlp,
                    offload_tokens=row_length if treatment.offload else 0,
                )
                self.treat = partial(treated, treatment)
                self.most_tokens = self.plan.micro_batch_tokens or row_length
            self.with_loss = CausalLMWithLoss(self.model, liger_loss if fused else tiled_loss)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def use_kernel(self, name: str | None) -> None:
        """Compute attention with this kernel of the flash engine; None: the fastest here."""
        engine = make_engine("flash", device=self.device, dtype=self.dtype, kernel=name)
        set_attention(self.model, engine.attend)

    def __call__(self, lengths: np.ndarray, pattern: str) -> Tensor:
        """A step on a row of documents of these lengths. The plain loop has a pattern of its own."""
        tokens = torch.from_numpy(
            np.random.default_rng(0).integers(self.vocabulary, size=(1, int(lengths.sum())))
        ).to(self.device)
        losses = (
            self._plain(tokens, lengths) if self.plain else self._ours(tokens, lengths, pattern)
        )
        mean_loss = torch.zeros((), device=self.device)
        for loss in losses:
            loss.backward()
            mean_loss += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean_loss

    def _ours(self, tokens: Tensor, lengths: np.ndarray, pattern: str) -> Iterator[Tensor]:
        """The loss of every micro-batch, as its part of the mean over all targets of the row."""
        row = layout_of(lengths, pattern=pattern)
        same = (row.document_ids[:, 1:] == row.document_ids[:, :-1]).to(self.device)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        labels[:, :-1] = tokens[:, 1:].where(same, IGNORE_INDEX)
        targets = (labels != IGNORE_INDEX).sum()
        at_most = self.most_tokens
        if pattern == "full":  # whose tokens see the whole row
            at_most = int(lengths.sum())
        first = 0
        for documents in cut(lengths, at_most=at_most):
            here = slice(first, first + int(documents.sum()))
            first = here.stop
            layout = layout_of_units(
                documents,
                row.position_ids[0, here].numpy(),
                pattern=pattern,
                anchor_placement=row.anchor_placement,
                rows=np.zeros(len(documents), dtype=np.int64),
            ).to(self.device)
            self.treat(int(documents.sum()))
            loss_sum, _ = self.with_loss(
                input_ids=tokens[:, here],
                labels=labels[:, here],
                position_ids=layout.position_ids,
                layout=layout,
            )
            yield loss_sum / targets

    def _plain(self, tokens: Tensor, lengths: np.ndarray) -> Iterator[Tensor]:
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(tokens)
        labels = tokens.where(positions > 0, IGNORE_INDEX)  # the model shifts them itself
        yield self.model(
            input_ids=tokens, position_ids=positions[None], labels=labels, use_cache=False
        ).loss


def cut(lengths: np.ndarray, *, at_most: int) -> list[np.ndarray]:
    """A row's documents, in order, in pieces of at most so many tokens; a longer one is alone."""
    pieces: list[list[int]] = [[]]
    for length in lengths.tolist():
        if pieces[-1] and sum(pieces[-1]) + length > at_most:
            pieces.append([])
        pieces[-1].append(length)
    return [np.array(piece) for piece in pieces]


def peak_of_step(
    variant: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    lengths: np.ndarray,
    plan: str | Plan = "auto",
    plan_for: dict | None = None,
) -> int:
    """The most memory that a process uses which takes this step; run it by `in_fresh_process`."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    step = Step(
        "plain_hf" if variant == "plain_hf" else plan,
        shape,
        device=device,
        dtype=dtype,
        row_length=int(lengths.sum()),
        **plan_for or {},
    )
    # From now on the optimiser has its states.
    step(document_lengths(256, seed=0), variant)
    step(lengths, variant)
    return peak_memory_bytes(device)
