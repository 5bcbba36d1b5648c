"""What is done in a forward and its backward so that fewer activations are held, and the model that does it.

Guarantees: losses and gradients are those of the model without it, to float32 rounding, also under ZeRO-3
with gradient accumulation, with tied embeddings, and where a rank has no target. What is recomputed, and the
number of tiles, follow from the number of tokens that is handed over, never from this rank's own tensors:
ranks that hand over the same number enter the same collectives of ZeRO-3, whatever they hold.
Costs: a recomputed layer's forward is computed once more in the backward; it keeps its (tokens × hidden)
input alone, which offloading keeps in host memory (`offload.py`). A tiled MLP computes its own forward once
more, and holds the (tokens × intermediate) activations of one tile alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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

    DeepSpeed's `TiledMLP` does it (Arctic Long Sequence Training, arXiv 2506.13996). It tells ZeRO to
    reduce a weight's gradient after the last tile, so `torch.chunk` must make exactly the number of tiles
    that was asked for, or that gradient would never be reduced: of a multiple of it, it does.

    Raises:
        ValueError: no module has gate_proj, up_proj and down_proj.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

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
            short = -len(x_TE) % tiling.tiles
            if short:
                x_TE = pad(x_TE, (0, 0, 0, short))
            out_TE = TiledMLP.apply(_call, whole, x_TE, tiling.tiles, weights)
            if short:
                out_TE = out_TE[:-short]
            return out_TE.view_as(x_BSE)

        return forward

    for mlp in mlps:
        mlp.forward = tiled(mlp)
    return tiling


def is_swiglu_mlp(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))


def _call(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(x)
