"""Perplexity by position on long documents.

Guarantees: every position is measured on the same documents, those that fill the longest length, so that
a difference between positions is the model's and not the texts'. The anchor comes first and is no
target.
Costs: one forward per document, and the logits of `CHUNK` tokens at a time.
"""

from __future__ import annotations

import math
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
    hidden = model.base_model(token_ids[None], use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    losses = [
        cross_entropy(head(some).float(), targets, reduction="none")
        for some, targets in zip(hidden[:-1].split(CHUNK), token_ids[1:].split(CHUNK), strict=True)
    ]
    return torch.cat(losses).cpu()


def position_ranges(longest: int) -> list[tuple[int, int]]:
    """[first, last) positions of targets: 1–63, 64–127, 128–255 … up to the longest length."""
    edges = [1]
    edge = 64
    while edge < longest:
        edges.append(edge)
        edge *= 2
    edges.append(longest)
    return list(pairwise(edges))


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
