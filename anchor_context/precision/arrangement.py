"""A row of equal documents under a pattern: positions, before and after a shift, and who sees whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anchor_context.attention.patterns import PATTERNS, make_layout, mask_predicate
from anchor_context.layout import DocumentLayout


@dataclass(frozen=True)
class Arrangement:
    """Positions and visibility in one row of S tokens, as its layout has them."""

    layout: DocumentLayout
    """Of one row, anchors at the start of every document."""

    @property
    def name(self) -> str:
        return self.layout.pattern

    @property
    def positions(self) -> Tensor:
        """(S,) int64"""
        return self.layout.position_ids[0]

    def shifted(self, shift: int) -> Tensor:
        """The positions after a shift, at which the anchors stay where they are."""
        moves = torch.ones_like(self.positions)
        if PATTERNS[self.name].anchored:
            moves[self.layout.cu_seqlens[:-1].long()] = 0
        return self.positions + shift * moves

    def seen(self, queries: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """The first token that each query sees, (queries,) int64, and all that it does, (queries, S) bool.

        `window` (tokens, the query included, as transformers counts) hides what is farther, but no anchor.
        """
        row = torch.zeros((), dtype=torch.long, device=queries.device)
        index = torch.arange(self.layout.row_length, device=queries.device)
        mask = mask_predicate(self.layout, sliding_window=window)
        visible = mask(row, row, queries[:, None], index[None])
        return visible.int().argmax(dim=1), visible


def arrange(pattern: str, row_length: int, documents: int, device: torch.device) -> Arrangement:
    """The pattern's positions and visibility in a row of so many equal documents."""
    layout = make_layout(
        document_starts(row_length, documents),
        batch_size=1,
        row_length=row_length,
        pattern=pattern,
        anchor_placement=PATTERNS[pattern].placement("per_document"),
    )
    return Arrangement(layout.to(device))


def document_starts(row_length: int, documents: int) -> np.ndarray:
    return np.arange(documents) * row_length // documents
