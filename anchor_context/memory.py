"""Long rows in little memory: gradient checkpointing, tiled MLPs and Liger's kernels, and who picks them.

`choose_memory_plan` settles each `auto` once, from the model, the device and the tokens that a rank holds
of a row, and keeps the reason for the log and for `args.json`; `apply_memory_plan` changes one model so.

Guarantees: losses and gradients are those of the model without it, to float32 rounding, also under ZeRO-3
with gradient accumulation, with tied embeddings, and where a rank has no target. `auto` picks only what
the model can use. Every choice depends on kinds and shapes alone, so all ranks agree without asking.
Costs: `full` computes each layer's forward once more in the backward, and keeps one (tokens × hidden) input
per layer; `offload` keeps that in pinned CPU memory, for two copies over the bus. A tiled MLP computes its
own forward once more, and holds the (tokens × intermediate) activations of one tile alone.

What stays without these is the loss's part (`loss.py`): the logits.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor_context.loss import liger_available
from anchor_context.rope.float32 import rotary_tables, wrap_rotation

CHECKPOINT_FROM = {"cuda": 8_192, "cpu": 32_768}
"""Tokens per rank and row from which `auto` checkpoints. On a GPU 32 layers of hidden size 4,096 keep
70 GiB at 8,192 tokens in bfloat16; the CPU's memory is larger, and its time dearer."""
OFFLOAD_FROM = 262_144
"""Tokens per rank and row from which `auto` offloads: the same model's checkpoints alone take 64 GiB."""
TILE_MLP_FROM = 131_072
"""Tokens per rank and row from which `auto` tiles: one MLP of intermediate size 14,336 keeps 14 GiB."""
TILE_TOKENS = 4_096
"""Tokens in one tile of an MLP: enough to keep a GPU busy."""


@dataclass(frozen=True)
class MemoryPlan:
    """What saves memory in a run, and why each."""

    gradient_checkpointing: Literal["none", "full", "offload"]
    gradient_checkpointing_reason: str
    tiled_mlp: bool
    tiled_mlp_reason: str
    liger: bool
    """Liger's RMSNorm, RoPE and SwiGLU, and its loss (`CausalLMWithLoss(fused=plan.liger)`)."""
    liger_reason: str

    def __str__(self) -> str:
        return (
            f"checkpointing {self.gradient_checkpointing} ({self.gradient_checkpointing_reason}), "
            f"tiled MLP {'yes' if self.tiled_mlp else 'no'} ({self.tiled_mlp_reason}), "
            f"Liger {'yes' if self.liger else 'no'} ({self.liger_reason})"
        )


def choose_memory_plan(
    model: PreTrainedModel,
    *,
    device: torch.device,
    row_tokens_per_rank: int,
    gradient_checkpointing: Literal["auto", "none", "full", "offload"] = "auto",
    tiled_mlp: Literal["auto", "yes", "no"] = "auto",
    liger: Literal["auto", "yes", "no"] = "auto",
) -> MemoryPlan:
    """Settle what the flags leave to `auto`.

    Args:
        row_tokens_per_rank: tokens of one micro-batch on one rank: batch size × row length over the
            ranks that share a row.

    Raises:
        ValueError: a value that cannot work with this model on this device, or is not among the choices.
    """
    on_cuda = device.type == "cuda"
    tokens = f"{row_tokens_per_rank:,} tokens per rank"
    asked = {
        "gradient_checkpointing": (gradient_checkpointing, ("auto", "none", "full", "offload")),
        "tiled_mlp": (tiled_mlp, ("auto", "yes", "no")),
        "liger": (liger, ("auto", "yes", "no")),
    }
    for flag, (value, choices) in asked.items():
        if value not in choices:
            raise ValueError(f"--{flag} {value} is unknown; choose from {list(choices)}")

    checkpointing, checkpointing_reason = gradient_checkpointing, "--gradient_checkpointing"
    if checkpointing == "auto":
        start = CHECKPOINT_FROM["cuda" if on_cuda else "cpu"]
        if row_tokens_per_rank < start:
            checkpointing, checkpointing_reason = "none", f"{tokens}, fewer than {start:,}"
        elif on_cuda and row_tokens_per_rank >= OFFLOAD_FROM:
            checkpointing, checkpointing_reason = "offload", f"{tokens}, {OFFLOAD_FROM:,} or more"
        else:
            checkpointing, checkpointing_reason = "full", f"{tokens}, {start:,} or more"
    elif checkpointing == "offload" and not on_cuda:
        # transformers would ask for pinned memory, which PyTorch has only beside an accelerator.
        checkpointing = "full"
        checkpointing_reason = (
            f"offload asked for; on the {device.type} there is nowhere else to keep them"
        )

    if checkpointing != "none" and not model.supports_gradient_checkpointing:
        why_not = f"transformers cannot checkpoint {model.config.model_type}"
        if gradient_checkpointing != "auto":
            raise ValueError(
                f"--gradient_checkpointing {gradient_checkpointing} cannot work here: {why_not}; use auto"
            )
        checkpointing, checkpointing_reason = "none", why_not

    tile, tile_reason = tiled_mlp == "yes", "--tiled_mlp"
    if tiled_mlp == "auto":
        tile = row_tokens_per_rank >= TILE_MLP_FROM
        bound = f"{TILE_MLP_FROM:,}"
        tile_reason = f"{tokens}, {bound} or more" if tile else f"{tokens}, fewer than {bound}"
    if tile and (why_not := _why_no_tiles(model)):
        if tiled_mlp == "yes":
            raise ValueError(f"--tiled_mlp yes cannot work here: {why_not}; use --tiled_mlp auto")
        tile, tile_reason = False, why_not

    use_liger, liger_reason = liger == "yes", "--liger"
    why_not = None if liger == "no" else _why_no_liger(model, device)
    if liger == "auto":
        use_liger, liger_reason = why_not is None, why_not or f"{device.type}, and installed"
    elif why_not:
        raise ValueError(f"--liger yes cannot work here: {why_not}; use --liger auto")
    return MemoryPlan(
        checkpointing, checkpointing_reason, tile, tile_reason, use_liger, liger_reason
    )


def _why_no_tiles(model: PreTrainedModel) -> str | None:
    if any(map(_is_swiglu_mlp, model.modules())):
        return None
    kind = model.config.model_type
    return (
        f"{kind} has no MLP with gate_proj, up_proj and down_proj, as LLaMA, Mistral and Qwen have"
    )


def _why_no_liger(model: PreTrainedModel, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"its kernels are Triton's, for CUDA, and this is {device.type}"
    if not liger_available(device):
        return "not installed: pip install liger-kernel==0.8.5"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    return None if kind in MODEL_TYPE_TO_APPLY_LIGER_FN else f"it has no kernels for {kind}"


def apply_memory_plan(model: PreTrainedModel, plan: MemoryPlan) -> None:
    """Change `model` as the plan made for it says; before `CausalLMWithLoss` and `accelerator.prepare`."""
    if plan.liger:
        apply_liger(model)
    if plan.tiled_mlp:  # after Liger, so that each tile is computed by its SwiGLU
        tile_mlps(model)
    if plan.gradient_checkpointing != "none":
        model.activation_checkpointing_enable(offload=plan.gradient_checkpointing == "offload")


def apply_liger(model: PreTrainedModel) -> None:
    """Give this one `model` Liger's RMSNorm, RoPE and SwiGLU; not its loss, whose place is `loss.py`.

    Its RoPE only where it is Liger's own default: where not, the family rotates otherwise (GLM-4 and
    DeepSeek turn neighbouring entries together). Gemma 3 and OLMo 3, which have a table for each kind of
    layer, keep their own too. `rotate_in_float32` (--rope_precision) may come afterwards, and then rotates
    in its place.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance, liger_rotary_pos_emb
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply_to_family = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    # Besides the instance, Liger exchanges the classes in the model's module: those are put back.
    modeling = vars(sys.modules[type(model).__module__])
    before = dict(modeling)
    # transformers' own Trainer calls this; Liger drops the keywords that a model has no use for.
    _apply_liger_kernel_to_instance(
        model,
        rms_norm=True,
        swiglu=True,
        rope=False,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )
    modeling.update(before)
    rope = inspect.signature(apply_to_family).parameters.get("rope")
    if rope is not None and rope.default and rotary_tables(model):
        wrap_rotation(model, lambda rotate: liger_rotary_pos_emb)


def tile_mlps(model: PreTrainedModel) -> Callable[[], None]:
    """Let every SwiGLU MLP of this one `model` compute `TILE_TOKENS` tokens at a time.

    DeepSpeed's `TiledMLP` does it (Arctic Long Sequence Training, arXiv 2506.13996). It tells ZeRO to
    reduce a weight's gradient after the last tile, so the number of tiles handed over must be exactly the
    number that `torch.chunk` makes of the tokens, or that gradient would never be reduced.

    Returns:
        A function without arguments that undoes it.

    Raises:
        ValueError: no module has gate_proj, up_proj and down_proj.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    mlps = [m for m in model.modules() if _is_swiglu_mlp(m)]
    if not mlps:
        raise ValueError(
            f"--tiled_mlp yes: {type(model).__name__} has no MLP with gate_proj, up_proj and down_proj, "
            "as LLaMA, Mistral and Qwen have; use --tiled_mlp no"
        )

    def tiled(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
        whole = mlp.forward
        weights = list(mlp.parameters())

        def forward(x_BSE: Tensor) -> Tensor:
            tiles = -(-x_BSE.shape[:-1].numel() // TILE_TOKENS)
            if tiles == 1:
                return whole(x_BSE)
            # As one row: the forward then makes the same tiles as the backward, whatever B is.
            x_TE = x_BSE.flatten(0, -2)
            return TiledMLP.apply(_call, whole, x_TE, tiles, weights).view_as(x_BSE)

        return forward

    before = [vars(mlp).get("forward") for mlp in mlps]
    for mlp in mlps:
        mlp.forward = tiled(mlp)

    def undo() -> None:
        for mlp, forward in zip(mlps, before, strict=True):
            if forward is None:
                del mlp.forward
            else:
                mlp.forward = forward

    return undo


def _call(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(x)


def _is_swiglu_mlp(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))
