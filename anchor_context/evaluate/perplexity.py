"""Perplexity by position.

A target's position is the number of tokens before it in its document, the anchor counted.

Guarantees: the logits are the model's own, scaled or capped behind the head as its forward does. The anchor
comes first and is no target. By `perplexity_rows` every position is measured on the same documents, those
that fill the longest length, so that a difference between positions is the model's and not the texts'. By
`every_document_rows` all documents count, as in validation during training, whose `sums_by_position` it is.
Costs: one forward per document, another of a single token per `CHUNK` tokens, and the logits of `CHUNK`
tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

CHUNK = 1024
"""Tokens whose logits exist at once."""


@torch.inference_mode()
def token_losses(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """The negative log likelihood of token_ids[1:] (nats), (S − 1,) float32, from token_ids (S,)."""
    token_ids = token_ids.to(model.device)
    pieces = zip(logits_in_pieces(model, token_ids[:-1]), token_ids[1:].split(CHUNK), strict=True)
    losses = [
        cross_entropy(logits.float(), targets, reduction="none") for logits, targets in pieces
    ]
    return torch.cat(losses).cpu()


def logits_in_pieces(model: PreTrainedModel, token_ids: Tensor) -> Iterator[Tensor]:
    """The logits of token_ids (S,), `CHUNK` tokens (≤ CHUNK, vocabulary) at a time.

    What a model does behind its head it does to each token alone. So the whole row goes through once up
    to the head, and then every piece from the head on, in the forward of a single token.
    """
    head_inputs = []

    def take(head_input: Tensor) -> Tensor:
        head_inputs.append(head_input)
        return head_input[:, :1]

    _forward(model, token_ids, take)
    assert len(head_inputs) == 1, (
        f"{type(model).__name__} applies its head {len(head_inputs)} times"
    )
    for piece in head_inputs[0].split(CHUNK, dim=1):
        yield _forward(model, token_ids[:1], lambda _, piece=piece: piece)[0]


def _forward(
    model: PreTrainedModel, token_ids: Tensor, replace: Callable[[Tensor], Tensor]
) -> Tensor:
    """The model's logits (1, tokens, vocabulary) with `replace(x)` for its head's input x."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (replace(args[0]),))
    try:
        return model(token_ids[None], use_cache=False).logits
    finally:
        hook.remove()


def position_ranges(longest: int) -> list[tuple[int, int]]:
    """[first, last) positions of targets: 1–63, 64–127, 128–255 … up to the longest length."""
    edges = [1]
    edge = 64
    while edge < longest:
        edges.append(edge)
        edge *= 2
    edges.append(longest)
    return list(pairwise(edges))


def first_positions(longest: int) -> list[int]:
    """Where the ranges of `position_ranges` begin; the last one then has no end."""
    return [first for first, _ in position_ranges(max(2, longest))]


def sums_by_position(losses: Tensor, positions: Tensor, firsts: list[int]) -> Tensor:
    """The sum of the losses in each range of positions, and the number of its targets: (2, ranges) float64.

    Args:
        losses: (T,) float32. positions: (T,) int64, below `firsts[0]` where there is no target.
        firsts: where the ranges begin, increasing.
    """
    ranges = torch.bucketize(positions, torch.tensor(firsts, device=positions.device), right=True)
    inside = ranges[:, None] == torch.arange(1, len(firsts) + 1, device=positions.device)
    sums = torch.where(inside, losses.double()[:, None], 0).sum(0)
    return torch.stack([sums, inside.sum(0).double()])


def every_document_rows(losses: list[Tensor], lengths: list[int]) -> list[dict]:
    """The lines of the CSV file where all documents count: by position, then all targets up to a length.

    Args:
        losses: of each document, (targets,) float: target position p is at index p − 1.
    """
    positions = torch.cat([torch.arange(1, len(loss) + 1) for loss in losses])
    longest, every = int(positions.max()), torch.cat(losses)
    firsts = first_positions(longest)
    rows = [
        ("position", first, last, *sums)
        for first, last, sums in zip(
            firsts,
            [*(following - 1 for following in firsts[1:]), longest],
            sums_by_position(every, positions, firsts).T.tolist(),
            strict=True,
        )
    ]
    for length in lengths:
        loss = every.double()[positions <= length]
        rows.append(("length", 1, length, loss.sum().item(), len(loss)))
    return [
        {
            "kind": kind,
            "first": first,
            "last": last,
            "loss": total / targets,
            "loss_standard_error": None,
            "perplexity": math.exp(total / targets),
            "documents": sum(len(loss) >= first for loss in losses),
            "targets": int(targets),
        }
        for kind, first, last, total, targets in rows
    ]


def perplexity_rows(losses: list[Tensor], lengths: list[int]) -> list[dict]:
    """The lines of the CSV file: by position, then of the first `length` tokens.

    Args:
        losses: of each document, (longest − 1,) float: target position p is at index p − 1.
    """
    stacked = torch.stack([loss.double() for loss in losses])
    rows = []
    ranges = [("position", *ends) for ends in position_ranges(max(lengths))]
    ranges += [("length", 1, length) for length in lengths]
    for kind, first, last in ranges:
        per_document = stacked[:, first - 1 : last - 1].mean(dim=1)
        mean = per_document.mean().item()
        spread = per_document.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else None
        rows.append(
            {
                "kind": kind,
                "first": first,
                "last": last - 1,
                "loss": mean,
                "loss_standard_error": spread,
                "perplexity": math.exp(mean),
                "documents": len(losses),
            }
        )
    return rows
