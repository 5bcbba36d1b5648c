"""What the modified library files share: one of transformers' attention functions, made document-aware.

`ANCHOR_CONTEXT_PATTERN` is the switch, read once when the library is imported:

    off (or unset)               the library's own function, untouched
    intra_doc, intra_doc_reset   a token sees its own document
    anchor                       its own document, and the first token of its row
    …                            any other pattern of `attention/patterns.py` that knows documents

Documents come from the call: `cu_seq_lens_q`, or packed `position_ids` (`integrations/boundaries.py`).
A call that carries neither, a cross-attention, a decoding step and a mask of the caller's own go to
the library's function. The model has rotated queries and keys before: positions are the caller's, so
the two intra-document patterns differ only in what the caller passes. Rows that have an anchor at the
start of every document already (positions 0, i, i + 1, …) want intra_doc, which then *is*
AnchorAttention.
Costs: boundaries and mask are read once per forward (in inference mode at every layer).
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from anchor_context.attention.patterns import PATTERNS
from anchor_context.engine import attend_on_first_use
from anchor_context.integrations.boundaries import document_starts, layout_of_starts
from anchor_context.integrations.calls import attend_call, is_causal_call, window_of_call

VARIABLE = "ANCHOR_CONTEXT_PATTERN"
CHOICES = (  # what causal attention over the whole row is, the library computes itself
    *sorted(name for name, p in PATTERNS.items() if p.unit == "document" or p.sees is not None),
    "off",
)


def chosen_pattern(environment: Mapping[str, str]) -> str:
    """The pattern that the environment asks for; "off" if it says nothing.

    Raises:
        ValueError: a value that is not one of `CHOICES`.
    """
    pattern = environment.get(VARIABLE) or "off"
    if pattern not in CHOICES:
        raise ValueError(f"{VARIABLE}={pattern} is unknown; choose from {', '.join(CHOICES)}")
    return pattern


def document_aware(library_function: Callable, *, engine: str) -> Callable:
    """The library's attention function, or one of the same signature that attends by document.

    Args:
        engine: "flash" or "flex"; a shared anchor, or a rule that boundaries cannot say, always takes flex.
    """
    pattern = chosen_pattern(os.environ)
    if pattern == "off":
        return library_function
    found = PATTERNS[pattern]
    attend = attend_on_first_use("flex" if found.anchored or found.sees is not None else engine)
    documents = _Documents(pattern)
    optional = list(inspect.signature(library_function).parameters)[5:]

    @torch.compiler.disable  # it reads what the call brings: nothing for a graph
    @functools.wraps(library_function)
    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        settings = dict(zip(optional, args, strict=False)) | kwargs
        layout = documents.of_call(module, query, key, attention_mask, settings)
        if layout is None:
            return library_function(module, query, key, value, attention_mask, **settings)
        remedy = f"set {VARIABLE}=off (it is {pattern}) for this model"
        out = attend_call(attend, module, query, key, value, layout, settings, remedy=remedy)
        return out, None

    return attention


class _Documents:
    """The layouts of the calls, remembered per forward: every layer passes on the same tensors."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self._layouts = _Remembered()
        self._verdicts = _Remembered()

    def of_call(self, module, query: Tensor, key: Tensor, mask, settings: dict[str, Any]):
        """The layout of a packed causal self-attention call, or None for every other call."""
        if query.shape[2] != key.shape[2] or query.shape[2] == 1:
            return None
        if not is_causal_call(module, settings):
            return None
        boundaries, positions = settings.get("cu_seq_lens_q"), settings.get("position_ids")
        source = positions if boundaries is None else boundaries
        if source is None:
            return None
        layout = self._layouts.of(
            source,
            (query.shape[0], query.shape[2]),
            lambda: self._layout(query, boundaries, positions),
        )
        if layout is None or mask is None:
            return layout
        # What the library makes of packed positions; boundaries alone leave it a causal mask. Any other
        # mask, of padding or of the caller's own, says more than the layout and stays in force.
        window = window_of_call(module, settings)
        masks = [layout.document_ids] + [torch.zeros_like(layout.document_ids)] * (
            boundaries is not None
        )
        the_librarys = self._verdicts.of(
            mask, (layout, window), lambda: any(_is_mask_of(mask, ids, window) for ids in masks)
        )
        return layout if the_librarys else None

    def _layout(self, query: Tensor, boundaries: Tensor | None, positions: Tensor | None):
        batch_size, _, row_length, _ = query.shape
        starts = document_starts(
            batch_size=batch_size,
            row_length=row_length,
            cu_seqlens=boundaries,
            position_ids=positions,
        )
        if starts is None or len(starts) == batch_size:  # one document per row: nothing to do
            return None
        return layout_of_starts(
            starts,
            like=query[:, 0, :, 0],
            pattern=self.pattern,
            anchor_placement=PATTERNS[self.pattern].placement("shared"),
        )


class _Remembered:
    """What was read from an argument of a call, until it is another object or was written to."""

    def __init__(self):
        self._known = WeakIdKeyDictionary()

    def of(self, source, state, read: Callable[[], Any]):
        """What `read()` says of `source`, asked again only if `source` or `state` has changed."""
        if isinstance(source, Tensor):
            if source.is_inference():  # these do not count what is written to them
                return read()
            state = (state, source._version)
        known = self._known.get(source)
        if known is None or known[0] != state:
            known = self._known[source] = (state, read())
        return known[1]


def _is_mask_of(mask, document_ids: Tensor, window: int | None) -> bool:
    """Whether `mask` shows every token its own document up to itself, within the window, and nothing else.

    Of FlexAttention's BlockMask, a function of places, only the diagonal and its neighbours are asked: each
    token sees itself, none sees the next, and a document's first token does not see the one before it.
    """
    row_length = document_ids.shape[1]
    index = torch.arange(row_length, device=document_ids.device)
    if not isinstance(mask, Tensor):
        batch = torch.arange(len(document_ids), device=index.device)[:, None]
        head, later, earlier = torch.zeros_like(batch), index[1:], index[:-1]
        starts = document_ids[:, 1:] != document_ids[:, :-1]
        return bool(
            mask.mask_mod(batch, head, index, index).all()
            and not mask.mask_mod(batch, head, earlier, later).any()
            and not (mask.mask_mod(batch, head, later, earlier) & starts).any()
        )
    if mask.ndim != 4 or mask.shape[-2:] != (row_length, row_length):
        return False  # (B, S): flash attention's padding
    distance = index[:, None] - index
    own = (document_ids[:, :, None] == document_ids[:, None, :]) & (distance >= 0)
    if window is not None:
        own &= distance < window
    visible = mask if mask.dtype == torch.bool else mask == 0
    return bool((visible == own[:, None]).all())
