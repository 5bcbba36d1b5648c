"""Who is where in a packed micro-batch: everything that an attention engine may know about its rows.

Guarantees: document boundaries are data. They come from the packer through `cu_seqlens`; nothing in
the project infers them from token ids or from positions that happen to be 0.
Costs: a few small integer tensors per micro-batch, built once in a loader worker.

A layout always describes the *whole* lines of a micro-batch. Under sequence parallelism a rank holds a part
of their tokens, but who may see whom is a question about the whole line, so the layout stays whole.

Words, here and in all rooms:
    document      one text, or the piece of one that a row's end cut off
    row           what packing makes: documents laid end to end, S tokens
    unit          the smallest thing that attention does not cross: a document, or a whole row (`full`)
    micro-batch   what one forward sees: B rows, or whole units of several rows end to end as one line (1, T)
    anchor        the token that all of a document's tokens see: at each document's start, or one per line
    starts        where things start; boundaries: the same, with the end behind them; cu_seqlens: boundaries
                  in the form that kernels take, int32 over the flattened tokens
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token without a target (PyTorch's and transformers' convention)."""


# eq=False: two layouts are the same only if they are one object, so an engine may cache by layout.
@dataclass(frozen=True, eq=False)
class DocumentLayout:
    """The documents of B lines of S tokens each: B rows, or one line of whole units (B = 1).

    With two rows of six tokens, documents of 4 + 2 and 3 + 3 tokens, per-document anchors (`^`):

        tokens           ^ a a a ^ b      ^ c c ^ d d
        cu_seqlens       0       4     6        9      12
        unit_boundaries  0       4     6        9      12      (of the pattern `full`: 0 6 12)
        document_ids     0 0 0 0 1 1      2 2 2 3 3 3
        position_ids     0 1 2 3 0 5      0 1 2 0 4 5

    Padding at a line's end is a document like any other; it differs only in having no targets.
    """

    cu_seqlens: Tensor
    """(documents + 1,) int32: where each document starts in the B·S flattened tokens, then B·S.
    A line's end is always a boundary. Of interleaved rows: where each chunk starts."""
    unit_boundaries: Tensor
    """(units + 1,) int32: the same of what attention does not cross (`Pattern.unit`): `cu_seqlens` itself, or
    the boundaries of the rows."""
    document_ids: Tensor
    """(B, S) int32: the document of each token, counted over the whole micro-batch. Of interleaved rows: the
    number of its document's first chunk, so that `cu_seqlens[document_id]` is where its document starts."""
    position_ids: Tensor
    """(B, S) int64: rotary positions, which the token's row gave it by the pattern's rule."""
    max_seqlen: int
    """Tokens in the longest document (of interleaved rows: the longest chunk). A plain integer, so that no
    kernel has to ask the device."""
    longest_unit: int
    """The same between `unit_boundaries`."""
    pattern: str
    """A key of `patterns.PATTERNS`."""
    anchor_placement: str
    """"per_document", "shared", or "none" for the patterns without an anchor. A shared anchor is the first
    token of its line."""
    interleaved: bool
    """Whether a document lies in several chunks, other documents' chunks between them. No set of segments
    says then which tokens are one document's; `document_ids` do."""

    @property
    def batch_size(self) -> int:
        return self.document_ids.shape[0]

    @property
    def row_length(self) -> int:
        """S, the tokens of a line."""
        return self.document_ids.shape[1]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DocumentLayout:
        """The same layout with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> DocumentLayout:
        """The same layout in page-locked memory (called by `torch.utils.data.DataLoader`)."""
        return self._map(Tensor.pin_memory)

    def _map(self, change) -> DocumentLayout:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: change(t) for name, t in tensors.items() if isinstance(t, Tensor)}
        )
