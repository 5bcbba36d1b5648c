"""The reference engine: dense attention straight from the pattern's predicate.

It is what the other engines are tested against, in float64. Costs: S × S scores per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anchor_context.attention.patterns import mask_predicate
from anchor_context.layout import DocumentLayout


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention by the layout's pattern, with every score written out.

    Args:
        q: (B, H, S, D). k, v: (B, Hkv, S, D), Hkv dividing H.
        scale: factor of the scores before the softmax, usually 1 / sqrt(D).
        softcap: the scores are `softcap · tanh(score / softcap)`; None for the scores as they are.
        sinks: (H,) a logit per head that takes part in the softmax without a value; None for none.

    Returns:
        (B, H, S, D), in the dtype of q.
    """
    batch, heads, length, _ = q.shape
    kv_heads = k.shape[1]
    index = torch.arange(length, device=q.device)
    visible = mask_predicate(layout, sliding_window=sliding_window)(
        torch.arange(batch, device=q.device)[:, None, None],
        torch.zeros((), dtype=torch.long, device=q.device),
        index[None, :, None],
        index[None, None, :],
    )
    q_BKGSD = q.unflatten(1, (kv_heads, heads // kv_heads))
    scores = torch.einsum("bkgsd,bktd->bkgst", q_BKGSD, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:  # one column more, which the weights then leave out
        column_KG11 = sinks.to(scores.dtype).unflatten(0, q_BKGSD.shape[1:3])[..., None, None]
        column = column_KG11.expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("bkgst,bktd->bkgsd", weights, v).flatten(1, 2)
