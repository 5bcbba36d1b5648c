"""Ulysses attention by document, as yunchang layers: what `modified_files/yunchang` adds to the library.

A rank holds (B, S/U, H, D) of every row, U ranks in the group; the boundaries are those of the whole
rows. Both layers trade tokens for heads, attend, and trade back (arXiv 2309.14509), with gradients.
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch import Tensor, nn

from anchor_context.attention import flash, flex, kernels
from anchor_context.packed import document_starts, layout_of_starts


class _UlyssesByDocument(nn.Module):
    def __init__(self, sequence_process_group: dist.ProcessGroup | None = None):
        """`sequence_process_group`: the ranks that share a row; None is all of them."""
        super().__init__()
        self.group = sequence_process_group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        *,
        softmax_scale: float | None = None,
    ) -> Tensor:
        """Causal attention inside documents.

        Args:
            query: (B, S/U, H, D). key, value: (B, S/U, Hkv, D), kept grouped.
            cu_seqlens: (documents + 1,) int32 over the B·S flattened tokens of the whole rows.

        Returns:
            (B, S/U, H, D).

        Raises:
            ValueError: heads that do not divide over the ranks, or bad boundaries.
        """
        from anchor_context.parallel.account import CommAccount
        from anchor_context.parallel.ulysses import check_heads, ulysses  # imports yunchang itself

        degree = dist.get_world_size(self.group)
        check_heads(query.shape[2], degree)
        rows = query[..., 0, 0].new_empty(query.shape[0], query.shape[1] * degree)
        starts = document_starts(
            batch_size=rows.shape[0], row_length=rows.shape[1], cu_seqlens=cu_seqlens
        )
        layout = layout_of_starts(
            starts, like=rows, pattern=self.pattern, anchor_placement=self.anchor_placement
        )
        attend = ulysses(self._engine(query), self.group, CommAccount())
        scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return attend(*heads_first, layout, scale=scale).transpose(1, 2)


class VarLenUlyssesAttention(_UlyssesByDocument):
    """A token sees its own document: FlashAttention's variable-length kernels."""

    pattern, anchor_placement = "intra_doc", "none"

    def _engine(self, query: Tensor):
        kernel, _ = kernels.choose_kernel(query.device, query.dtype)
        return partial(flash.attend, kernel=kernel)


class UlyssesFlexAttention(_UlyssesByDocument):
    """A token sees its own document and the row's first token, the anchor: FlexAttention."""

    pattern, anchor_placement = "anchor", "shared"

    def __init__(self, sequence_process_group: dist.ProcessGroup | None = None):
        super().__init__(sequence_process_group)
        self._flex = flex.make_attend()

    def _engine(self, query: Tensor):
        return self._flex
