"""The flex engine: the pattern's predicate, compiled by PyTorch's FlexAttention.

Takes what boundaries cannot say: one anchor shared by the row, a sliding window that still sees the
anchor, chunks of documents in any order.

Guarantees: the block mask comes from each block's range of document ids, S/128 squared entries;
no S × S mask exists on CUDA. It is built once per layout and reused by every layer.
Costs on the CPU: FlexAttention has no backward there, so training goes through a dense mask made from
the same predicate, S × S booleans; the tests compare it with FlexAttention's own forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from anchor_context.attention.patterns import PATTERNS, mask_predicate
from anchor_context.layout import DocumentLayout

BLOCK = 128
"""Tokens per side of a mask block: FlexAttention's default."""


def make_attend() -> Callable[..., Tensor]:
    """A fresh flex engine: `attend(q, k, v, layout, *, scale, sliding_window=None)`.

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
    ) -> Tensor:
        on_cpu = q.device.type == "cpu"
        of_layout = masks.setdefault(layout, {})
        if sliding_window not in of_layout:
            build = dense_mask if on_cpu else block_mask
            of_layout[sliding_window] = build(layout, sliding_window=sliding_window)
        mask = of_layout[sliding_window]
        if on_cpu:
            return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        return compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)

    return attend


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
    """FlexAttention's block mask, from each block's smallest and largest document id.

    Two blocks can meet where their id ranges overlap; they meet everywhere, and need no predicate,
    where both ranges are one and the same document and the keys lie wholly before the queries. For
    documents that stand in one piece the ranges are exact; for interleaved chunks they may name a
    block too many, which the predicate then empties.
    """
    lowest, highest = _id_range_per_block(layout)
    blocks = lowest.shape[1]
    q_block = torch.arange(blocks, device=lowest.device)[:, None]
    k_block = torch.arange(blocks, device=lowest.device)[None, :]
    earlier, causal = k_block < q_block, k_block <= q_block

    if PATTERNS[layout.pattern].crosses_documents:
        meets = causal.expand(layout.batch_size, -1, -1)
        everywhere = earlier.expand(layout.batch_size, -1, -1)
    else:
        overlap = (lowest[:, :, None] <= highest[:, None, :]) & (
            highest[:, :, None] >= lowest[:, None, :]
        )
        one_document = (lowest == highest)[:, :, None] & (lowest == highest)[:, None, :]
        meets = overlap & causal
        everywhere = overlap & one_document & earlier
    if sliding_window is not None:
        nearest = q_block * BLOCK - (k_block * BLOCK + BLOCK - 1)
        farthest = q_block * BLOCK + BLOCK - 1 - k_block * BLOCK
        everywhere = everywhere & (farthest < sliding_window)
        if layout.anchor_placement != "per_document":  # there the document's start stays visible
            meets = meets & (nearest < sliding_window)
    if layout.anchor_placement == "shared":
        meets = meets | ((k_block == 0) & causal)

    partial = meets & ~everywhere
    return BlockMask.from_kv_blocks(
        *_counts_and_indices(partial),
        *_counts_and_indices(everywhere),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_predicate(layout, sliding_window=sliding_window),
        seq_lengths=(layout.row_length, layout.row_length),
    )


def _id_range_per_block(layout: DocumentLayout) -> tuple[Tensor, Tensor]:
    """The smallest and the largest document id in each block: two (B, blocks) tensors."""
    ids = layout.document_ids
    short = -layout.row_length % BLOCK
    if short:
        ids = torch.cat([ids, ids[:, -1:].expand(-1, short)], dim=1)
    blocks = ids.unflatten(1, (-1, BLOCK))
    return blocks.amin(2), blocks.amax(2)


def _counts_and_indices(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, K) bool -> how many key blocks each query block meets, and which, chosen ones first."""
    counts = chosen.sum(-1, dtype=torch.int32)[:, None]
    indices = torch.argsort(chosen.to(torch.uint8), dim=-1, descending=True, stable=True)
    return counts, indices.to(torch.int32)[:, None]
