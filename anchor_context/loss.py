"""The training loss: a sum and a count over targets, without ever holding the logits.

Guarantees: the exact sum over all targets (labels other than -100) in float32, and gradients that may be
scaled afterwards by anything, so that a step's loss is one global mean and never a mean of means.
Works with tied embeddings and under ZeRO-3, and where this rank has no target at all.
Costs: at most `TILE_ENTRIES` logits at a time instead of tokens × vocabulary, and no second forward: each
tile's gradient is made in place of its logits while they are there. Liger's kernel does so on CUDA, plain
PyTorch elsewhere. Between forward and backward the head's float32 gradient and the hidden states' are kept.
The tiled loss never waits for the device. Liger's does so twice per micro-batch, whatever its arguments: it
counts the targets in forward, and in backward asks whether the incoming gradient is one.

Why not DeepSpeed's `TiledFusedLogitsLoss`: it runs the head's backward inside forward with an incoming
gradient of one, so any later scaling misses the head's weights, and with tied embeddings the second
gradient of the shared weight fails an assertion of ZeRO-3 (0.19.8). Here the head's gradient leaves through
autograd like any other, scaled.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
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
    """The summed cross entropy, tile by tile along the tokens: float32, a scalar.

    Args:
        hidden_TE: (T, E) the head's inputs. labels_T: (T,) int64, `IGNORE_INDEX` for no target.
    """
    # Reading the weight here, inside the wrapped forward, makes ZeRO-3 gather it, once on every rank.
    return TiledCrossEntropy.apply(hidden_TE, head.weight, head.bias, labels_T)


class TiledCrossEntropy(torch.autograd.Function):
    """Sum over targets of log Σ exp(logits) − logits[target], for logits = hidden Wᵀ + b.

    Its gradient by the logits is softmax(logits) − onehot(target), which one tile's buffer holds in turn.
    """

    @staticmethod
    def forward(ctx, hidden_TE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, labels_T: Tensor):
        wanted = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden_TE) if wanted[0] else None
        grad_weight = torch.zeros_like(weight_VE, dtype=torch.float32) if wanted[1] else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wanted[2] else None

        tile = min(max(1, TILE_ENTRIES // len(weight_VE)), len(hidden_TE))
        buffer = hidden_TE.new_empty(tile, len(weight_VE), dtype=torch.float32)
        loss_sum = hidden_TE.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden_TE), tile):
            here = slice(start, start + tile)
            hidden, labels = hidden_TE[here], labels_T[here]
            logits = buffer[: len(hidden)]
            if hidden.dtype == logits.dtype:
                torch.mm(hidden, weight_VE.T, out=logits)
            else:
                logits.copy_(hidden @ weight_VE.T)
            if bias_V is not None:
                logits += bias_V

            has_target = labels != IGNORE_INDEX
            target = labels.where(has_target, 0)[:, None]
            largest = logits.amax(1, keepdim=True)
            target_logit = logits.gather(1, target) - largest
            total = logits.sub_(largest).exp_().sum(1, keepdim=True)
            loss_sum += (total.log() - target_logit).where(has_target[:, None], 0).sum()

            grad_logits = logits.mul_(has_target[:, None] / total)
            grad_logits.scatter_add_(1, target, -has_target[:, None].to(logits.dtype))
            if wanted[2]:
                grad_bias += grad_logits.sum(0)
            if hidden.dtype == logits.dtype:
                if wanted[0]:
                    torch.mm(grad_logits, weight_VE, out=grad_hidden[here])
                if wanted[1]:
                    grad_weight.addmm_(grad_logits.T, hidden)
            else:  # bfloat16 products, as the head's own; their sum over tiles stays float32
                grad_logits = grad_logits.to(hidden.dtype)
                if wanted[0]:
                    grad_hidden[here] = grad_logits @ weight_VE
                if wanted[1]:
                    grad_weight += grad_logits.T @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight_VE.dtype
        return loss_sum

    @staticmethod
    def backward(ctx, scale: Tensor):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * scale).to(ctx.dtype),
            None if grad_bias is None else (grad_bias * scale).to(ctx.dtype),
            None,
        )


def liger_loss(hidden_TE: Tensor, head: nn.Linear, labels_T: Tensor) -> Tensor:
    """The summed cross entropy by Liger's fused linear kernel (CUDA)."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32
    )
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
