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

`train.py` gives one of the losses to `CausalLMWithLoss`, beside the optimiser: name another there.

Some families change what the head gives. Its output x becomes `scale · x` (Granite, Cohere), and that one
`softcap · tanh(x / softcap)` (Gemma 2). Every loss here takes both; `logit_settings` reads them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from importlib import metadata

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from anchor_context.layout import IGNORE_INDEX, DocumentLayout

TILE_ENTRIES = 2**25
"""Logits in one tile: 128 MiB in float32."""
LIGER_AT_LEAST = "0.8.4"
"""Before, its RMSNorm of heads counted elements in 32 bits, and was silently wrong above 2³¹ of them."""

LOGITS_TIMES = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "cohere_compass"), "logit_scale"),
    "hyperclovax": "logits_scaling",
}
"""model_type -> the setting that its logits are multiplied by. The same name means the opposite elsewhere."""
GRANITE = ("granite", "granite_swa")
GRANITE_MOE = ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared")
LOGITS_OVER = dict.fromkeys((*GRANITE, *GRANITE_MOE, "minicpm3"), "logits_scaling")
"""model_type -> the setting that its logits are divided by."""
CHANGE_LOGITS = (
    *("logits_scaling", "logit_scale", "lm_head_multiplier"),
    *("logits_soft_cap", "unpadded_vocab_size"),
)
"""Settings that change the logits in some family, found by reading transformers' causal models (5.24). One
that is neither of a family above nor of `final_logit_softcapping` is refused."""


class CausalLMWithLoss(nn.Module):
    """A causal language model whose forward returns its loss: what DeepSpeed wraps and trains.

    Only `model`'s parameters are in it, under the prefix "model.".
    """

    def __init__(
        self, model: PreTrainedModel, sum_of_losses: Callable[[Tensor, nn.Linear, Tensor], Tensor]
    ):
        """
        Args:
            sum_of_losses: (hidden_TE, head, labels_T) -> float32 scalar: `tiled_loss`, `liger_loss`,
                `plain_loss`, or one of your own; it is given the `logit_settings` of a family that has some.

        Raises:
            ValueError: the model's logits are more than its head's, changed by those settings.
        """
        super().__init__()
        check_weights(model)
        self.model, self.sum_of_losses = model, sum_of_losses
        self.logit_settings = logit_settings(model.config)

    def forward(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        layout: DocumentLayout,
        per_token: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(sum of the token losses, number of targets), two scalars, of this rank's tokens.

        Args:
            input_ids, position_ids, labels: (B, S) int64, labels already shifted.
            layout: of the whole micro-batch, also where this rank holds a part of its tokens.
            per_token: return in place of the sum each token's loss, as `tiled_token_losses` does.
        """
        hidden_BSE = self.model.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            layout=layout,
            use_cache=False,
            return_dict=True,  # whatever the model's config.json says
        ).last_hidden_state
        labels_T = labels.flatten()
        head = self.model.get_output_embeddings()
        loss_of = tiled_token_losses if per_token else self.sum_of_losses
        losses = loss_of(hidden_BSE.flatten(0, 1), head, labels_T, **self.logit_settings)
        return losses, (labels_T != IGNORE_INDEX).sum()


def tiled_loss(
    hidden_TE: Tensor,
    head: nn.Linear,
    labels_T: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The summed cross entropy, tile by tile along the tokens: float32, a scalar.

    Args:
        hidden_TE: (T, E) the head's inputs. labels_T: (T,) int64, `IGNORE_INDEX` for no target.
        scale, softcap: what the head's output becomes, see above; computed in float32.
    """
    # Reading the weight here, inside the wrapped forward, makes ZeRO-3 gather it, once on every rank.
    return TiledCrossEntropy.apply(hidden_TE, head.weight, head.bias, labels_T, scale, softcap)


class TiledCrossEntropy(torch.autograd.Function):
    """Sum over targets of log Σ exp(logits) − logits[target], for logits = hidden Wᵀ + b, scaled and capped.

    Its gradient by the logits is softmax(logits) − onehot(target), which one tile's buffer holds in turn. For
    capped ones a second buffer holds the slope of the cap, 1 − tanh², and tiles are half as large.
    """

    @staticmethod
    def forward(
        ctx,
        hidden_TE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        scale: float,
        softcap: float | None,
    ):
        wanted = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden_TE) if wanted[0] else None
        grad_weight = torch.zeros_like(weight_VE, dtype=torch.float32) if wanted[1] else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wanted[2] else None

        tile = min(tile_tokens(len(weight_VE), capped=softcap is not None), len(hidden_TE))
        buffer = hidden_TE.new_empty(tile, len(weight_VE), dtype=torch.float32)
        slopes = None if softcap is None else torch.empty_like(buffer)
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
            if scale != 1:
                logits *= scale
            if softcap is not None:
                tanh = logits.div_(softcap).tanh_()
                slope = torch.square(tanh, out=slopes[: len(hidden)]).neg_().add_(1)
                logits *= softcap

            has_target = labels != IGNORE_INDEX
            target = labels.where(has_target, 0)[:, None]
            largest = logits.amax(1, keepdim=True)
            target_logit = logits.gather(1, target) - largest
            total = logits.sub_(largest).exp_().sum(1, keepdim=True)
            loss_sum += (total.log() - target_logit).where(has_target[:, None], 0).sum()

            grad_logits = logits.mul_(has_target[:, None] / total)
            grad_logits.scatter_add_(1, target, -has_target[:, None].to(logits.dtype))
            if softcap is not None:
                grad_logits *= slope
            if scale != 1:
                grad_logits *= scale
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
            None,
            None,
        )


def tile_tokens(vocabulary: int, *, capped: bool) -> int:
    """Tokens of a tile."""
    return max(1, TILE_ENTRIES // (2 if capped else 1) // vocabulary)


def plain_loss(
    hidden_TE: Tensor,
    head: nn.Linear,
    labels_T: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """As `tiled_loss`, by autograd: what to start from for a loss of your own.

    Costs a second forward of the head: a tile's logits are computed again in backward instead of being kept.
    And in bfloat16 the head's gradient is rounded after every tile.
    """
    weight, bias = head.weight, head.bias  # as in `tiled_loss`

    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = _logits(hidden, weight, bias, scale=scale, softcap=softcap)
        return cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    size = max(1, TILE_ENTRIES // len(weight))
    tiles = zip(hidden_TE.split(size), labels_T.split(size), strict=True)
    once_more = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(loss_of, *tile, **once_more) for tile in tiles]).sum()


@torch.no_grad()
def tiled_token_losses(
    hidden_TE: Tensor,
    head: nn.Linear,
    labels_T: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The cross entropy of each token, (T,) float32, 0 without a target: for validation, without gradients.

    Arguments as `tiled_loss`, which is its sum to float32 rounding.
    """
    weight, bias = head.weight, head.bias  # as in `tiled_loss`
    size = tile_tokens(len(weight), capped=softcap is not None)
    tiles = zip(hidden_TE.split(size), labels_T.split(size), strict=True)
    return torch.cat(
        [
            cross_entropy(
                _logits(hidden, weight, bias, scale=scale, softcap=softcap),
                labels,
                ignore_index=IGNORE_INDEX,
                reduction="none",
            )
            for hidden, labels in tiles
        ]
    )


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, scale: float, softcap: float | None
) -> Tensor:
    """(T, V) float32, as the family's own forward makes them."""
    logits = linear(hidden, weight, bias).float() * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def liger_loss(
    hidden_TE: Tensor,
    head: nn.Linear,
    labels_T: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The summed cross entropy by Liger's fused linear kernel (CUDA).

    It caps logits, and has no scale: the hidden states are scaled instead, which is exact for powers of two
    (Granite's, most of Cohere's) and a head without a bias. Otherwise it would round them all once more, so
    there the tiled loss computes.
    """
    if scale != 1 and (math.frexp(scale)[0] != 0.5 or head.bias is not None):
        return tiled_loss(hidden_TE, head, labels_T, scale=scale, softcap=softcap)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32, softcap=softcap
    )
    if scale != 1:
        hidden_TE = hidden_TE * scale
    return loss(head.weight, hidden_TE, labels_T, head.bias)


def liger_available(device: torch.device) -> bool:
    """Whether Liger's kernels run on `device`, at any size: they are Triton's, for CUDA."""
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return False
    try:
        return Version(metadata.version("liger-kernel")) >= Version(LIGER_AT_LEAST)
    except metadata.PackageNotFoundError:  # a nightly build, which has another name
        return True


def logit_settings(config) -> dict[str, float]:
    """What makes logits of the head's output: `scale` and `softcap`, each only where the model has it.

    Raises:
        ValueError: the configuration changes the logits in another way.
    """
    text = config.get_text_config()
    kind, settings = text.model_type, {}
    times, over = LOGITS_TIMES.get(kind), LOGITS_OVER.get(kind)
    for setting in CHANGE_LOGITS:
        value = getattr(text, setting, None)
        if value in (None, 1):
            continue
        if setting not in (times, over):
            raise ValueError(
                f"{kind}: config.{setting}={value} changes the logits after the head, in a way that the loss "
                "here does not compute"
            )
        settings["scale"] = value if setting == times else 1 / value
    if softcap := getattr(text, "final_logit_softcapping", None):
        settings["softcap"] = softcap
    return settings


def check_weights(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model of more than a base model and a head: the loss would leave it out."""
    head = model.get_output_embeddings()
    known = {id(p) for part in (model.base_model, head) if part for p in part.parameters()}
    others = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    lacks = [
        *["no head"] * (head is None),
        *["no base model to tell from it"] * (model.base_model is model),
        *[f"other weights besides ({name}, …)" for name in others[:1]],
    ]
    if lacks:
        raise ValueError(
            f"{model.config.model_type}: the loss is of a base model and a linear head, and this one has "
            f"{lacks[0]}"
        )


class _BaseOutput(tuple):
    """What a base model returns, with nothing in it but `last_hidden_state`."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Raise `ValueError` where a model makes other logits of its head's output than the losses here.

    Its own forward is asked, with a small head and hidden states in place of its own, so the `model` may lie
    on the meta device. One whose forward cannot be asked so is believed.
    """
    head = nn.utils.skip_init(nn.Linear, 4, 9, bias=False)  # it draws no random numbers
    own_head, base = model.get_output_embeddings(), model.base_model
    head.weight.copy_(torch.linspace(-1, 2, 36).view(9, 4))
    hidden = torch.linspace(-2, 1, 12).view(1, 3, 4)
    model.set_output_embeddings(head)
    base.forward = lambda *_, **__: _BaseOutput([hidden])
    try:
        found = model(input_ids=torch.zeros(1, 3, dtype=torch.long), return_dict=True).logits
    # Whatever such a forward does beside with its base model's output.
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return
    finally:
        del base.forward
        model.set_output_embeddings(own_head)
    settings = {"scale": 1.0, "softcap": None} | logit_settings(model.config)
    expected = _logits(hidden, head.weight, None, **settings)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{model.config.model_type}: the model changes the logits after the head in a way that the loss "
            "here does not compute"
        )


def settle_router_loss(config, *, leave_out: bool, remedy: str) -> None:
    """Refuse the loss that a mixture of experts adds to balance its routers, or switch it off.

    It is a product of means over the tokens of a call, no sum over tokens: ranks and micro-batches that
    group the same rows otherwise would train something else.

    Args:
        config: of the model; changed in place where the loss is left out.
        remedy: the setting that leaves it out, for the message.

    Raises:
        ValueError: the configuration asks for that loss, and nobody said to leave it out.
    """
    text = config.get_text_config()
    if not getattr(text, "output_router_logits", False):
        return
    if not leave_out:
        raise ValueError(
            f"{config.model_type}: output_router_logits=true in its config.json adds a loss that balances "
            "the routers, which is no sum over tokens and would depend on how rows are grouped into "
            f"micro-batches and ranks: leave it out with {remedy}, or set it to false there"
        )
    text.output_router_logits = False
