"""One training step of three variants on the same model, rows and type: what the benchmarks of steps measure.

    anchor     this project: packed documents, each with its anchor; tiled or fused loss; memory plan
    full       the same, with plain causal attention over the whole row
    plain_hf   a plain Hugging Face loop: padding-free rows (positions restart at every document, from which
               transformers makes its block-diagonal mask), sdpa, the model's own loss over full logits

All of them end with the same torch AdamW. No DeepSpeed: one process.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from common import document_lengths, layout_of
from transformers import LlamaConfig, LlamaForCausalLM

from anchor_context.engine import make_engine
from anchor_context.layout import IGNORE_INDEX
from anchor_context.loss import CausalLMWithLoss
from anchor_context.memory import MemoryPlan, apply_memory_plan, choose_memory_plan
from anchor_context.metrics import peak_memory_bytes
from anchor_context.models import set_attention

VARIANTS = ("anchor", "full", "plain_hf")


@dataclass(frozen=True)
class Shape:
    """A LLaMA's sizes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    def model(self, *, device: torch.device, dtype: torch.dtype, max_length: int):
        torch.manual_seed(0)
        config = LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=max_length,
        )
        with device:
            return LlamaForCausalLM(config).to(dtype).train()


SMALL = Shape(8, 256, 688, 4, 2, 32_768)
"""The CPU's default: heads of 64."""
ONE_BILLION = Shape(16, 2048, 8192, 32, 8, 128_256)
"""LLaMA-3.2-1B's sizes, without tied embeddings."""


class Step:
    """One optimiser step on a row: `Step(…)(lengths)` -> the mean loss, a tensor."""

    def __init__(
        self,
        variant: str,
        shape: Shape,
        *,
        device: torch.device,
        dtype: torch.dtype,
        row_length: int,
        gradient_checkpointing: str = "auto",
    ):
        assert variant in VARIANTS, variant
        self.variant, self.device, self.vocabulary = variant, device, shape.vocabulary
        self.model = shape.model(device=device, dtype=dtype, max_length=row_length)
        self.plan: MemoryPlan | None = None
        if variant == "plain_hf":
            self.model.set_attn_implementation("sdpa")
        else:
            engine = make_engine("flash", device=device, dtype=dtype)
            set_attention(self.model, engine.attend)
            self.plan = choose_memory_plan(
                self.model,
                device=device,
                row_tokens_per_rank=row_length,
                gradient_checkpointing=gradient_checkpointing,
            )
            apply_memory_plan(self.model, self.plan)
            self.model = CausalLMWithLoss(self.model, fused=self.plan.liger)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def __call__(self, lengths: np.ndarray) -> torch.Tensor:
        tokens = torch.from_numpy(
            np.random.default_rng(0).integers(self.vocabulary, size=(1, int(lengths.sum())))
        ).to(self.device)
        forward = self._plain if self.variant == "plain_hf" else self._ours
        loss = forward(tokens, lengths)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _ours(self, tokens: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
        layout = layout_of(lengths, pattern=self.variant).to(self.device)
        same = layout.document_ids[:, 1:] == layout.document_ids[:, :-1]
        labels = torch.full_like(tokens, IGNORE_INDEX)
        labels[:, :-1] = tokens[:, 1:].where(same, IGNORE_INDEX)
        loss_sum, targets = self.model(
            input_ids=tokens, labels=labels, position_ids=layout.position_ids, layout=layout
        )
        return loss_sum / targets

    def _plain(self, tokens: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(tokens)
        labels = tokens.where(positions > 0, IGNORE_INDEX)  # the model shifts them itself
        return self.model(
            input_ids=tokens, position_ids=positions[None], labels=labels, use_cache=False
        ).loss


def peak_of_step(
    variant: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    lengths: np.ndarray,
    gradient_checkpointing: str = "auto",
) -> int:
    """The most memory that a process uses which takes this step; run it by `in_fresh_process`."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    step = Step(
        variant,
        shape,
        device=device,
        dtype=dtype,
        row_length=int(lengths.sum()),
        gradient_checkpointing=gradient_checkpointing,
    )
    step(document_lengths(256, seed=0))  # from now on the optimiser has its states
    step(lengths)
    return peak_memory_bytes(device)
