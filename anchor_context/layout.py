"""Who is where in a packed micro-batch: everything that an attention engine may know about its rows.

Guarantees: document boundaries are data. They come from the packer through `cu_seqlens`; nothing in
the project infers them from token ids or from positions that happen to be 0.
Costs: three small integer tensors per micro-batch, built once in a loader worker.

A layout always describes the *global* rows. Under sequence parallelism a rank holds a part of their
tokens, but who may see whom is a question about the whole row, so the layout stays whole.
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
    """The documents of B rows of S tokens each.

    With two rows of six tokens, documents of 4 + 2 and 3 + 3 tokens, per-document anchors (`^`):

        tokens         ^ a a a ^ b      ^ c c ^ d d
        cu_seqlens     0       4     6        9      12
        document_ids   0 0 0 0 1 1      2 2 2 3 3 3
        position_ids   0 1 2 3 0 5      0 1 2 0 4 5

    Padding at a row's end is a document like any other; it differs only in having no targets.
    """

    cu_seqlens: Tensor
    """(documents + 1,) int32: where each document starts in the B·S flattened tokens, then B·S.
    A row's end is always a boundary."""
    document_ids: Tensor
    """(B, S) int32: the document of each token, counted over the whole micro-batch."""
    position_ids: Tensor
    """(B, S) int64: rotary positions by the pattern's rule (`attention/patterns.py`)."""
    max_seqlen: int
    """Tokens in the longest document (of interleaved rows: the longest chunk). A plain integer, so that no
    kernel has to ask the device."""
    pattern: str
    """A key of `patterns.PATTERNS`."""
    anchor_placement: str
    """"per_document", "shared", or "none" for the patterns without an anchor."""

    @property
    def batch_size(self) -> int:
        return self.document_ids.shape[0]

    @property
    def row_length(self) -> int:
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
