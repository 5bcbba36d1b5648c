"""What is done in a forward and its backward so that fewer activations are held, and the model that does it.

Guarantees: losses and gradients are those of the model without it, to float32 rounding, also under ZeRO-3
with gradient accumulation, with tied embeddings, and where a rank has no target. What is recomputed, and the
number of tiles, follow from the number of tokens that is handed over, never from this rank's own tensors:
ranks that hand over the same number enter the same collectives of ZeRO-3, whatever they hold.
Costs: a recomputed layer's forward is computed once more in the backward; it keeps its (tokens × hidden)
input alone, which offloading keeps in host memory (`offload.py`). A tiled MLP computes its own forward once
more, and holds the (tokens × intermediate) activations of one tile alone; in the backward also a float32 sum
of its weights' gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from anchor_context.memory.offload import OffloadedCheckpoints

TILE_TOKENS = 4_096
"""Tokens in one tile of an MLP: enough to keep a GPU busy."""


@dataclass(frozen=True)
class Treatment:
    """What is recomputed in one forward's backward, and what is computed in parts."""

    checkpoint_every: int = 0
    """Every n-th layer is recomputed: 1 is all of them; 0 is none."""
    offload: bool = False
    """Inputs of recomputed layers wait in host memory."""
    tiled_mlp: bool = False
    """MLPs compute `TILE_TOKENS` tokens at a time."""

    def recomputes(self, layer: int) -> bool:
        """Whether layer number `layer` is computed again in the backward."""
        return self.checkpoint_every > 0 and layer % self.checkpoint_every == 0

    def __str__(self) -> str:
        recomputed = {
            0: "nothing recomputed",
            1: "every layer recomputed",
            2: "every 2nd layer recomputed",
        }.get(self.checkpoint_every, f"every {self.checkpoint_every}th layer recomputed")
        offloaded = ", its input in host memory" if self.offload else ""
        return recomputed + offloaded + ", MLPs in tiles" * self.tiled_mlp


class TreatedModel:
    """Gives one model's next forward a treatment: `treated(treatment, tokens)`."""

    def __init__(self, model: PreTrainedModel, *, tiles: bool, offload_tokens: int = 0):
        """
        Args:
            tiles: whether any treatment will tile the MLPs.
            offload_tokens: the most tokens of a forward whose checkpoints are offloaded.
        """
        self._model = model
        self._tiling = tile_mlps(model) if tiles else None
        self._offloaded = OffloadedCheckpoints(most_tokens=offload_tokens)
        self._treatment = Treatment()

    def __call__(self, treatment: Treatment, tokens: int) -> None:
        """From now on; a backward must be done before the next call.

        Args:
            tokens: of the micro-batch, the same number on all ranks: the most that any of them holds.
        """
        if treatment.tiled_mlp:
            self._tiling.tiles = -(-tokens // TILE_TOKENS)
        elif self._tiling is not None:
            self._tiling.tiles = 1
        self._offloaded.begin()
        if treatment == self._treatment:
            return
        self._treatment = treatment
        if not treatment.checkpoint_every:
            self._model.activation_checkpointing_disable()
            return
        self._model.activation_checkpointing_enable(every_n_layers=treatment.checkpoint_every)
        if treatment.offload:
            for layer in self._model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer._gradient_checkpointing_func = self._offloaded.checkpoint


@dataclass
class Tiling:
    """Into how many tiles the MLPs of one model cut their tokens. 1: none."""

    tiles: int = 1


def tile_mlps(model: PreTrainedModel) -> Tiling:
    """Let every SwiGLU MLP of this one `model` compute its tokens in `Tiling.tiles` parts, which may change.

    Raises:
        ValueError: no module has gate_proj, up_proj and down_proj.
    """
    mlps = [m for m in model.modules() if is_swiglu_mlp(m)]
    if not mlps:
        raise ValueError(
            f"--tiled_mlp yes: {type(model).__name__} has no MLP with gate_proj, up_proj and down_proj, "
            "as LLaMA, Mistral and Qwen have; use --tiled_mlp no"
        )
    tiling = Tiling()

    def tiled(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
        whole = mlp.forward
        weights = list(mlp.parameters())

        def forward(x_BSE: Tensor) -> Tensor:
            if tiling.tiles == 1:
                return whole(x_BSE)
            # As one row: the forward then makes the same tiles as the backward, whatever B is.
            x_TE = x_BSE.flatten(0, -2)
            # `chunk` makes as many tiles as it is asked for of a multiple of them alone.
            short = -len(x_TE) % tiling.tiles
            if short:
                x_TE = pad(x_TE, (0, 0, 0, short))
            out_TE = TiledMLP.apply(x_TE, whole, weights, tiling.tiles)
            if short:
                out_TE = out_TE[:-short]
            return out_TE.view_as(x_BSE)

        return forward

    for mlp in mlps:
        mlp.forward = tiled(mlp)
    return tiling


def is_swiglu_mlp(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))


class TiledMLP(torch.autograd.Function):
    """An MLP's forward, one tile of its tokens after the other; its backward computes each tile's once more.

    DeepSpeed has a function of this name (Arctic Long Sequence Training, arXiv 2506.13996), whose way to tell
    ZeRO that a weight's gradient is not ready before the last tile is taken here. But there the tiles'
    gradients add up in the weights' own type: in bfloat16 the sum of 256 tiles was off by 1.6 %, of 1,024 by
    12 %. Here it is float32.
    """

    @staticmethod
    def forward(
        ctx,
        x_TE: Tensor,
        mlp: Callable[[Tensor], Tensor],
        weights: list[nn.Parameter],
        tiles: int,
    ) -> Tensor:
        """`mlp(x_TE)`; T is a multiple of `tiles`."""
        ctx.save_for_backward(x_TE)
        ctx.mlp, ctx.weights, ctx.tiles = mlp, [w for w in weights if w.requires_grad], tiles
        return torch.cat([mlp(x) for x in x_TE.chunk(tiles)])

    @staticmethod
    def backward(ctx, dout_TE: Tensor):
        (x_TE,) = ctx.saved_tensors
        dx_TE = torch.empty_like(x_TE)
        sums: dict[nn.Parameter, Tensor] = {}
        tiles = zip(*(tensor.chunk(ctx.tiles) for tensor in (x_TE, dout_TE, dx_TE)), strict=True)
        for number, (x, dout, dx) in enumerate(tiles, start=1):
            last = number == ctx.tiles
            for weight in ctx.weights:
                weight.ds_grad_is_ready = last  # DeepSpeed reads it behind every backward
                _take_gradient(weight, sums)
            # ZeRO-3 leaves a part of a weight here, which takes no `grad` as large as the whole.
            hooks = [w.register_hook(partial(_added, s)) for w, s in sums.items()] if last else []
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.mlp(x)
            torch.autograd.backward(out, dout)
            dx.copy_(x.grad)
            for hook in hooks:
                hook.remove()
        return dx_TE, None, None, None


def _added(total: Tensor, gradient: Tensor) -> Tensor:
    """The whole gradient of a weight, rounded once to its type, from the last tile's."""
    return total.add_(gradient).to(gradient.dtype)


def _take_gradient(weight: nn.Parameter, sums: dict[nn.Parameter, Tensor]) -> None:
    """Move what a narrow weight's gradient is so far into its float32 sum."""
    if weight.grad is None or weight.grad.dtype.itemsize >= 4:
        return
    if weight in sums:
        sums[weight] += weight.grad
    else:
        sums[weight] = weight.grad.float()
    weight.grad = None
