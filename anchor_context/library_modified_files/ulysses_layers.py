"""Ulysses attention by document, as yunchang layers: what `modified_files/yunchang` adds to the library.

A rank holds (B, S/U, H, D) of every row, U ranks in the group; the boundaries are those of the whole
rows. Both layers trade tokens for heads, attend, and trade back (arXiv 2309.14509), with gradients.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from anchor_context.engine import attend_on_first_use
from anchor_context.integrations.boundaries import document_starts, layout_of_starts
from anchor_context.parallel.groups import RankGrid


class _UlyssesByDocument(nn.Module):
    def __init__(self, sequence_process_group: dist.ProcessGroup | None = None):
        """`sequence_process_group`: the ranks that share a row; None is all of them."""
        super().__init__()
        self.group = sequence_process_group
        self._attend = None

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
        from anchor_context.parallel.ulysses import check_heads  # imports yunchang itself

        degree = dist.get_world_size(self.group)
        check_heads(query.shape[2], degree)
        rows = query[..., 0, 0].new_empty(query.shape[0], query.shape[1] * degree)
        starts = document_starts(
            batch_size=rows.shape[0], row_length=rows.shape[1], cu_seqlens=cu_seqlens
        )
        layout = layout_of_starts(
            starts, like=rows, pattern=self.pattern, anchor_placement=self.anchor_placement
        )
        if self._attend is None:
            grid = RankGrid(ulysses_degree=degree)
            self._attend = attend_on_first_use(self.engine, grid=grid, ulysses_group=self.group)
        scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return self._attend(*heads_first, layout, scale=scale).transpose(1, 2)


class VarLenUlyssesAttention(_UlyssesByDocument):
    """A token sees its own document: FlashAttention's variable-length kernels."""

    engine, pattern, anchor_placement = "flash", "intra_doc", "none"


class UlyssesFlexAttention(_UlyssesByDocument):
    """A token sees its own document and the row's first token, the anchor: FlexAttention."""

    engine, pattern, anchor_placement = "flex", "anchor", "shared"
