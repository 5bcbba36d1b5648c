"""The training loss: a sum and a count over targets, without ever holding the logits.

Guarantees: the exact sum over all targets (labels other than -100) in float32, and gradients that may be
scaled afterwards by anything, so that a step's loss is one global mean and never a mean of means.
Works with tied embeddings and under ZeRO-3, and where this rank has no target at all.
Costs: at most `TILE_ENTRIES` logits at a time instead of tokens × vocabulary. On CUDA, Liger's fused
kernel computes the gradient along with the loss; elsewhere each tile's logits are computed once more in
the backward pass.

Why not DeepSpeed's `TiledFusedLogitsLoss`, which saves that recomputation: it runs the head's backward
inside forward with an incoming gradient of one, so any later scaling misses the head's weights, and with
tied embeddings the second gradient of the shared weight fails an assertion of ZeRO-3 (0.19.8).
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from anchor_context.layout import IGNORE_INDEX, DocumentLayout

TILE_ENTRIES = 2**25
"""Logits in one tile: 128 MiB in float32."""


class CausalLMWithLoss(nn.Module):
    """A causal language model whose forward returns its loss: what DeepSpeed wraps and trains.

    Only `model`'s parameters are in it, under the prefix "model.".
    """

    def __init__(self, model: PreTrainedModel, *, fused: bool):
        super().__init__()
        check_head(model.config)
        self.model = model
        self.sum_of_losses = liger_loss if fused else tiled_loss

    def forward(
        self, *, input_ids: Tensor, position_ids: Tensor, labels: Tensor, layout: DocumentLayout
    ) -> tuple[Tensor, Tensor]:
        """(sum of the token losses, number of targets), two scalars, of this rank's tokens.

        Args:
            input_ids, position_ids, labels: (B, S) int64, labels already shifted.
            layout: of the whole rows.
        """
        hidden_BSE = self.model.base_model(
            input_ids=input_ids, position_ids=position_ids, layout=layout, use_cache=False
        ).last_hidden_state
        labels_T = labels.flatten()
        head = self.model.get_output_embeddings()
        loss_sum = self.sum_of_losses(hidden_BSE.flatten(0, 1), head, labels_T)
        return loss_sum, (labels_T != IGNORE_INDEX).sum()


def tiled_loss(hidden_TE: Tensor, head: nn.Linear, labels_T: Tensor) -> Tensor:
    """The summed cross entropy, tile by tile along the tokens.

    The number of tiles depends on shapes alone, so that all ranks of ZeRO-3 gather the head's weights
    equally often.
    """

    def tile_loss(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden).float()
        return cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    tokens = max(1, TILE_ENTRIES // head.out_features)
    tiles = zip(hidden_TE.split(tokens), labels_T.split(tokens), strict=True)
    losses = [checkpoint(tile_loss, h, labels, use_reentrant=False) for h, labels in tiles]
    return torch.stack(losses).sum()


def liger_loss(hidden_TE: Tensor, head: nn.Linear, labels_T: Tensor) -> Tensor:
    """The summed cross entropy by Liger's fused linear kernel (CUDA)."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32
    )
    # Reading the weight here, inside the wrapped forward, makes ZeRO-3 gather it.
    return loss(head.weight, hidden_TE, labels_T, head.bias)


def liger_available(device: torch.device) -> bool:
    """Whether Liger's kernels run on `device`: they are Triton's, for CUDA."""
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def check_head(config) -> None:
    """Raise `ValueError` for a model whose logits are more than `head(hidden)`."""
    text = config.get_text_config()
    for setting in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(text, setting, None) not in (None, 1, 1.0):
            raise ValueError(
                f"{config.model_type}: config.{setting}={getattr(text, setting)} changes the logits "
                "after the head, which the loss here does not compute"
            )
