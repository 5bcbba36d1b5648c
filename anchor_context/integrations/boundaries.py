"""Document boundaries as other people's code states them: in the arguments of a model's forward.

The project's own path never needs this: its loader hands over a `DocumentLayout`. A training script
of transformers or TRL instead passes either `cu_seq_lens_q` (boundaries, from a padding-free collator)
or packed `position_ids` that restart at 0 with every document. Both are that library's own
definition of a packed row, and only those two are read here; token ids never say where documents are.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from anchor_context.attention.patterns import make_layout
from anchor_context.layout import DocumentLayout


def document_starts(
    *,
    batch_size: int,
    row_length: int,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> np.ndarray | None:
    """Where documents start in the B·S flattened tokens, or None if the call does not say.

    Args:
        cu_seqlens: (documents + 1,) integers over the flattened tokens, as transformers'
            `cu_seq_lens_q`; what lies after the last of them is padding. It counts before positions.
        position_ids: (B, S) or (1, S) integers. They describe documents if every row begins at 0 and
            positions grow up to the next 0. Anything else, left padding for instance, says nothing.

    Raises:
        ValueError: boundaries that do not increase, or that lie outside the rows.
    """
    total = batch_size * row_length
    rows = np.arange(0, total, row_length)
    if cu_seqlens is not None:
        boundaries = cu_seqlens.detach().cpu().numpy().astype(np.int64)
        if boundaries[0] != 0 or (np.diff(boundaries) < 0).any() or boundaries[-1] > total:
            raise ValueError(
                f"cu_seq_lens_q must rise from 0 to at most {total}, the {batch_size} × {row_length} "
                f"tokens of this call; it is {boundaries.tolist()}"
            )
        return np.union1d(rows, boundaries[boundaries < total])
    if position_ids is None or position_ids.ndim > 2:  # (3, B, S): of images and video
        return None
    if tuple(position_ids.shape[-1:]) == (row_length,):
        positions = np.broadcast_to(position_ids.detach().cpu().numpy(), (batch_size, row_length))
        starts = positions == 0
        grows = np.diff(positions, axis=1) > 0
        if starts[:, 0].all() and (starts[:, 1:] | grows).all():
            return np.flatnonzero(starts)
    return None


def layout_of_starts(
    starts: np.ndarray, *, like: Tensor, pattern: str, anchor_placement: str
) -> DocumentLayout:
    """The layout of rows with documents at `starts`, for the (B, S) tensor `like`, on its device."""
    batch_size, row_length = like.shape
    return make_layout(
        starts,
        batch_size=batch_size,
        row_length=row_length,
        pattern=pattern,
        anchor_placement=anchor_placement,
    ).to(like.device)
