"""The flex engine: the pattern's predicate, compiled by PyTorch's FlexAttention.

Takes what boundaries cannot say: one anchor shared by the row, chunks of documents in any order.

Guarantees: the block mask comes from each block's range of documents (rows, for `full`), S/128 squared
entries; no S × S mask exists on CUDA. It is built once per layout and reused by every layer. A pattern
with a rule of its own (`Pattern.sees`) takes PyTorch's way to the block mask, which evaluates every pair.
Costs on the CPU: FlexAttention has no backward there, so training goes through a dense mask made from
the same predicate, S × S booleans; the tests compare it with FlexAttention's own forward. With capped
scores or sinks every score is written out there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)
from torch.nn.functional import scaled_dot_product_attention

from anchor_context.attention.kernels.sinks import share_of_keys
from anchor_context.attention.patterns import PATTERNS, in_pieces, mask_predicate, unit_ids
from anchor_context.layout import DocumentLayout

BLOCK = 128
"""Tokens per side of a mask block: FlexAttention's default."""


def make_attend() -> Callable[..., Tensor]:
    """A fresh flex engine, `attend(q, k, v, layout, *, scale, …)` with the settings of `reference.attend`.

    q: (B, H, S, D); k, v: (B, Hkv, S, D), kept grouped; returns (B, H, S, D). Holds one compiled
    FlexAttention and the masks of the layouts that are alive.
    """
    compiled = compile_flex()
    masks: weakref.WeakKeyDictionary[DocumentLayout, dict] = weakref.WeakKeyDictionary()

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
        on_cpu = q.device.type == "cpu"
        of_layout = masks.setdefault(layout, {})
        if sliding_window not in of_layout:
            build = dense_mask if on_cpu else block_mask
            of_layout[sliding_window] = build(layout, sliding_window=sliding_window)
        mask = of_layout[sliding_window]
        if on_cpu and softcap is None and sinks is None:
            return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        score_mod = None if softcap is None else cap(softcap)
        if on_cpu:
            out, lse = dense_attention(q, k, v, mask, score_mod=score_mod, scale=scale)
            return out if sinks is None else with_sinks(out, lse, sinks)
        settings = {"block_mask": mask, "score_mod": score_mod, "scale": scale, "enable_gqa": True}
        if sinks is None:
            return compiled(q, k, v, **settings)
        out, aux = compiled(q, k, v, return_aux=AuxRequest(lse=True), **settings)
        return with_sinks(out, aux.lse, sinks)

    return attend


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """`out` (B, H, S, D) of attention whose log-sum-exp is `lse` (B, H, S), as with the `sinks` (H,) besides.

    Both carry gradients, so the sinks' share in the softmax does.
    """
    return (out * share_of_keys(lse, sinks)[..., None]).to(out.dtype)


@cache
def cap(softcap: float) -> Callable[..., Tensor]:
    """`softcap · tanh(score / softcap)` in FlexAttention's form; one function per cap, compiled once."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, score_mod: Callable | None, scale: float
) -> tuple[Tensor, Tensor]:
    """What FlexAttention computes, with gradients on the CPU: out (B, H, S, D) and its lse (B, H, S).

    Costs: H × S × S scores, several times.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.mT * scale
    if score_mod is not None:
        scores = score_mod(scores, *[None] * 4)  # a cap asks for no place
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v, lse


def compile_flex(backend: str | Callable = "inductor") -> Callable[..., Tensor]:
    """FlexAttention fused with its mask; documents reach it as tensors, so new ones compile nothing.

    PyTorch gives up after `torch._dynamo.config.recompile_limit` kinds of masks and shapes. `fullgraph`
    makes that an error; without it, it would go on unfused and write out every score.
    """
    return torch.compile(flex_attention, fullgraph=True, backend=backend)


def dense_mask(layout: DocumentLayout, *, sliding_window: int | None = None) -> Tensor:
    """(B, 1, S, S) bool: the predicate on every pair."""
    device = layout.document_ids.device
    index = torch.arange(layout.row_length, device=device)
    batch = torch.arange(layout.batch_size, device=device)
    return mask_predicate(layout, sliding_window=sliding_window)(
        batch[:, None, None, None],
        torch.zeros((), dtype=torch.long, device=device),
        index[None, None, :, None],
        index[None, None, None, :],
    )


def block_mask(layout: DocumentLayout, *, sliding_window: int | None = None) -> BlockMask:
    """FlexAttention's block mask, from each block's smallest and largest unit id.

    Two blocks can meet where their id ranges overlap; they meet everywhere, and need no predicate,
    where both ranges are one and the same unit and the keys lie wholly before the queries. For
    units that stand in one piece the ranges are exact; for interleaved chunks they may name a
    block too many, which the predicate then empties.
    """
    predicate = mask_predicate(layout, sliding_window=sliding_window)
    if PATTERNS[layout.pattern].sees is not None:
        shape = (layout.batch_size, None, layout.row_length, layout.row_length)
        return create_block_mask(
            predicate, *shape, device=layout.document_ids.device, BLOCK_SIZE=BLOCK
        )
    lowest, highest = _id_range_per_block(unit_ids(layout))
    blocks = lowest.shape[1]
    q_block = torch.arange(blocks, device=lowest.device)[:, None]
    k_block = torch.arange(blocks, device=lowest.device)[None, :]
    earlier, causal = k_block < q_block, k_block <= q_block

    overlap = (lowest[:, :, None] <= highest[:, None, :]) & (
        highest[:, :, None] >= lowest[:, None, :]
    )
    one_unit = (lowest == highest)[:, :, None] & (lowest == highest)[:, None, :]
    meets = overlap & causal
    everywhere = overlap & one_unit & earlier
    if sliding_window is not None:
        nearest = q_block * BLOCK - (k_block * BLOCK + BLOCK - 1)
        farthest = q_block * BLOCK + BLOCK - 1 - k_block * BLOCK
        everywhere = everywhere & (farthest < sliding_window)
        # With an anchor per document its start stays visible; between chunks stand tokens that do not count.
        apart = in_pieces(layout.pattern, interleaved=layout.interleaved)
        if layout.anchor_placement != "per_document" and not apart:
            meets = meets & (nearest < sliding_window)
    if layout.anchor_placement == "shared":
        meets = meets | ((k_block == 0) & causal)

    partial = meets & ~everywhere
    return BlockMask.from_kv_blocks(
        *_counts_and_indices(partial),
        *_counts_and_indices(everywhere),
        BLOCK_SIZE=BLOCK,
        mask_mod=predicate,
        seq_lengths=(layout.row_length, layout.row_length),
    )


def _id_range_per_block(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of (B, S) ids in each block: two (B, blocks) tensors."""
    short = -ids.shape[1] % BLOCK
    if short:
        ids = torch.cat([ids, ids[:, -1:].expand(-1, short)], dim=1)
    blocks = ids.unflatten(1, (-1, BLOCK))
    return blocks.amin(2), blocks.amax(2)


def _counts_and_indices(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, K) bool -> how many key blocks each query block meets, and which, chosen ones first."""
    counts = chosen.sum(-1, dtype=torch.int32)[:, None]
    indices = torch.argsort(chosen.to(torch.uint8), dim=-1, descending=True, stable=True)
    return counts, indices.to(torch.int32)[:, None]
