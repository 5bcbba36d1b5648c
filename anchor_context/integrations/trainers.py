"""AnchorAttention in somebody else's training script: patch the model, and feed it packed rows.

    model = patch_model(AutoModelForCausalLM.from_pretrained(name), engine="flash", pattern="anchor")
    collator = AnchorDataCollator(tokenizer, engine="flash", pattern="anchor")

Then train as always, with the Hugging Face Trainer, TRL's SFTTrainer or a loop (`examples/`).

Guarantees: a call that does not say where documents are is an error, never plain causal attention. A
batch of the collator carries its `DocumentLayout`; without one, boundaries are read from
`cu_seq_lens_q` or packed `position_ids` (`boundaries.py`), and the rotary positions follow the pattern.
The loss is transformers' own, over the targets that the collator states in `shift_labels`.
Costs: nothing per layer; per call without a layout, one copy of the boundaries to the host.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchor_context.attention.patterns import anchor_ids, find_anchor_id, make_layout
from anchor_context.engine import (
    attend_on_first_use,
    check_combination,
    choose_anchor_placement,
)
from anchor_context.integrations.boundaries import document_starts, layout_of_starts
from anchor_context.integrations.calls import softcap_of
from anchor_context.integrations.models import set_attention
from anchor_context.layout import IGNORE_INDEX, DocumentLayout
from anchor_context.loss import settle_router_loss
from anchor_context.rope.length import depends_on_calls

logger = logging.getLogger(__name__)


def patch_model(
    model: PreTrainedModel,
    *,
    engine: str = "flash",
    pattern: str = "anchor",
    kernel: str | None = None,
    leave_out_router_loss: bool = False,
) -> PreTrainedModel:
    """Make `model` attend by document, in place; returns it. Patched again, only the last counts.

    The model's forward then accepts three forms, in this order: `layout=DocumentLayout` (what
    `AnchorDataCollator` makes); `cu_seq_lens_q` (transformers' and TRL's padding-free collators);
    `position_ids` that restart at 0 with every document. For the last two the positions that the
    model uses are the pattern's, and with the pattern "anchor" the anchor is the row's first
    token for the flex engine, every document's first token for the flash engine.

    Args:
        engine: "flash", "flex" or "reference".
        pattern: a key of `attention.patterns.PATTERNS`; a batch packed for another one is an error.
        kernel: a flash kernel's name, or None for the fastest where the model runs.
        leave_out_router_loss: train a mixture of experts without the balancing loss that its configuration
            asks for (`output_router_logits`), as `loss.settle_router_loss` says.

    Raises:
        ValueError: an unknown name, a model whose attention the engines do not compute, or one that adds
            a loss of its own.
    """
    check_combination(
        engine,
        kernel=kernel,
        pattern=pattern,
        anchor_placement=choose_anchor_placement(pattern, engine),
        softcap=softcap_of(model.config.get_text_config()),
    )
    settle_router_loss(
        model.config, leave_out=leave_out_router_loss, remedy="leave_out_router_loss=True"
    )
    if depends_on_calls(model.config.get_text_config()):
        logger.warning(
            "this model's RoPE takes its frequencies from the positions of each call, so the same document "
            "is rotated differently beside a longer one. To fix them by your rows' length, load it with a "
            "config given to anchor_context.rope.length.fix_frequencies(config, row_length=…) before"
        )
    set_attention(model, attend_on_first_use(engine, kernel=kernel))

    @torch.compiler.disable  # it reads the batch, not what a graph computes
    def complete_call(_module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:  # (B, S, hidden): only its shape and device count here
            tokens = kwargs["inputs_embeds"][..., 0]
        # `generate` makes one before its first call, and hands it on by the one or the other name.
        if any(kwargs.get(name) is not None for name in ("cache", "past_key_values")):
            raise ValueError(
                "a patched model trains and scores whole rows, and this call brings a cache of keys and "
                "values, as generate() does: to generate, save the model and load it with "
                "AutoModelForCausalLM"
            )
        if kwargs.get("output_router_logits") and kwargs.get("labels") is not None:
            raise ValueError(
                "output_router_logits=True adds a loss that depends on how rows are grouped into calls: "
                "call the patched model without it, or without labels"
            )
        layout = kwargs.get("layout")
        if layout is None:
            anchors = set(anchor_ids(model.config.get_text_config()))
            layout = _layout_of_call(
                tokens, kwargs, engine=engine, pattern=pattern, anchors=anchors
            )
        elif layout.pattern != pattern:
            raise ValueError(
                f"the batch was packed for the pattern {layout.pattern!r}, the model patched for "
                f"{pattern!r}; give AnchorDataCollator and patch_model the same"
            )
        if layout.document_ids.shape != tokens.shape:
            raise ValueError(
                f"the layout is of {tuple(layout.document_ids.shape)} tokens, the call of "
                f"{tuple(tokens.shape)}: a batch goes to one model whole (on several GPUs start with "
                "accelerate launch or torchrun; torch's DataParallel splits batches)"
            )
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all():
            raise ValueError(
                "the attention_mask shuts out tokens, and this model attends by document alone: make "
                "batches without padding (AnchorDataCollator does)"
            )
        layout = layout.to(tokens.device)
        return args, kwargs | {"layout": layout, "position_ids": layout.position_ids}

    if hook := getattr(model, "_anchor_context_hook", None):  # of an earlier patch_model
        hook.remove()
    model._anchor_context_hook = model.register_forward_pre_hook(complete_call, with_kwargs=True)
    return model


def _layout_of_call(
    tokens: Tensor, kwargs: dict[str, Any], *, engine: str, pattern: str, anchors: set[int]
) -> DocumentLayout:
    """The layout of a call that has none, from its boundaries or packed positions.

    Args:
        anchors: the tokens that may serve as one; none where the configuration names none.
    """
    starts = document_starts(
        batch_size=tokens.shape[0],
        row_length=tokens.shape[1],
        cu_seqlens=kwargs.get("cu_seq_lens_q"),
        position_ids=kwargs.get("position_ids"),
    )
    if starts is None:
        raise ValueError(
            "this model attends by document, and the call does not say where documents are: use "
            "AnchorDataCollator (it adds `layout`), or pass cu_seq_lens_q, or position_ids that "
            "restart at 0 with every document"
        )
    placement = choose_anchor_placement(pattern, engine)
    if placement == "per_document" and not tokens.is_floating_point():  # embeddings name no token
        boundaries = kwargs.get("cu_seq_lens_q")  # what lies behind the last one is padding
        end = tokens.numel() if boundaries is None else int(boundaries[-1])
        places = torch.from_numpy(starts[starts < end]).to(tokens.device)
        firsts = tokens.flatten()[places].unique().tolist()
        if len(firsts) > 1 or (anchors and anchors.isdisjoint(firsts)):
            raise ValueError(
                f"with the {engine} engine every document must start with the anchor token (the model's "
                f"BOS or EOS, {sorted(anchors)}), but these rows' documents start with the tokens "
                f"{firsts[:8]}: use AnchorDataCollator (it places the anchors), or engine='flex', which "
                "shares the row's first token"
            )
    return layout_of_starts(starts, like=tokens, pattern=pattern, anchor_placement=placement)


class AnchorDataCollator:
    """Documents, or rows of documents, -> the inputs of a patched model.

    A feature with `seq_lengths` (TRL's packing writes it; the Trainer drops it unless
    `remove_unused_columns=False`) is one row of documents of these lengths; rows are padded to the
    longest. Features without it are documents, or several whose `position_ids` restart at 0, and all of
    them together make one row: no padding, nothing cut. Anchors are placed as the engine computes them
    best, one at the start of every document (an anchor that is already there is not doubled) or one per
    row:

        tokens         ^  a  b  ^  c  d  e       (two documents, per-document anchors)
        labels        -100 a  b -100 c  d  e      transformers' form: the token itself, if a target
        shift_labels   a  b -100 c  d  e -100     the target of each position: its document's next token
        position_ids   0  1  2  0  4  5  6

    Returns `input_ids, labels, shift_labels, position_ids`, each (B, S) int64, and `layout`.

    It does not cut rows into micro-batches, as `data/micro_batches.py` does: a Trainer fixes the number of
    forwards of a step (`gradient_accumulation_steps`) before it sees the documents, and calls its collator
    once for each of them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        engine: str = "flash",
        pattern: str = "anchor",
    ):
        """`engine` and `pattern` as given to `patch_model`.

        Raises:
            ValueError: an unknown name, or a tokenizer with neither BOS nor EOS for the anchor.
        """
        self.pattern = pattern
        self.anchor_placement = choose_anchor_placement(pattern, engine)
        check_combination(engine, pattern=pattern, anchor_placement=self.anchor_placement)
        self.anchor = None if self.anchor_placement == "none" else find_anchor_id(tokenizer)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Raises `ValueError` for padded features, a mask of the loss without labels, `seq_lengths` that do
        not add up, `position_ids` that do not count each document's tokens, and empty rows."""
        if any("seq_lengths" in feature for feature in features):
            rows = [_documents(feature) for feature in features]
        else:
            rows = [[document for feature in features for document in _documents(feature)]]
        if not rows or not all(rows):
            raise ValueError(
                f"{rows.count([])} of the {len(rows)} rows of this batch ({len(features)} features) "
                "have no tokens: drop empty documents first, for instance with "
                "dataset.filter(lambda example: len(example['input_ids']) > 0)"
            )
        rows = [self._with_anchors(row) for row in rows]

        row_length = max(sum(len(ids) for ids, _ in row) for row in rows)
        input_ids = np.zeros((len(rows), row_length), dtype=np.int64)  # padding: any token will do
        labels = np.full((len(rows), row_length), IGNORE_INDEX, dtype=np.int64)
        starts = []
        for number, row in enumerate(rows):
            boundaries = np.cumsum([0] + [len(ids) for ids, _ in row])
            input_ids[number, : boundaries[-1]] = np.concatenate([ids for ids, _ in row])
            labels[number, : boundaries[-1]] = np.concatenate([targets for _, targets in row])
            # If the documents do not fill the row, the last start is the padding's.
            starts.append(boundaries[boundaries < row_length] + number * row_length)
        shift_labels = np.full_like(labels, IGNORE_INDEX)
        shift_labels[:, :-1] = labels[:, 1:]

        layout = make_layout(
            np.concatenate(starts),
            batch_size=len(rows),
            row_length=row_length,
            pattern=self.pattern,
            anchor_placement=self.anchor_placement,
        )
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "shift_labels": torch.from_numpy(shift_labels),
            "position_ids": layout.position_ids,
            "layout": layout,
        }

    def _with_anchors(self, row: list[Document]) -> list[Document]:
        """The row's documents with anchors placed, and first tokens that nothing predicts untargeted."""
        per_document = self.anchor_placement == "per_document"
        placed = (
            [] if self.anchor_placement != "shared" else [_document([self.anchor], [IGNORE_INDEX])]
        )
        for ids, labels in row:
            if self.anchor_placement == "shared" and ids[0] == self.anchor:
                ids, labels = ids[1:], labels[1:]  # the row's anchor stands for it
            if per_document and ids[0] != self.anchor:
                ids, labels = np.append(self.anchor, ids), np.append(IGNORE_INDEX, labels)
            if len(ids):
                placed.append((ids, np.append(IGNORE_INDEX, labels[1:])))
        return placed


Document = tuple[np.ndarray, np.ndarray]
"""Token ids and labels (a token that is a target has itself as label), both (length,) int64."""


def _document(ids: Sequence[int], labels: Sequence[int] | None = None) -> Document:
    ids = np.asarray(ids, dtype=np.int64)
    return ids, ids.copy() if labels is None else np.asarray(labels, dtype=np.int64)


LOSS_MASKS = ("completion_mask", "assistant_masks", "loss_mask")
"""In which others say which tokens are targets, until they have labels."""


def _documents(feature: Mapping[str, Any]) -> list[Document]:
    """The documents of one feature: `input_ids`, perhaps `labels`, and `seq_lengths` or `position_ids`."""
    ids, labels = _document(feature["input_ids"], feature.get("labels"))
    if not np.all(feature.get("attention_mask", 1)):
        raise ValueError(
            "AnchorDataCollator takes documents without padding: tokenize with padding=False"
        )
    for mask in LOSS_MASKS:
        if "labels" not in feature and not np.all(feature.get(mask, 1)):
            raise ValueError(
                f"{mask} leaves tokens out of the loss, and AnchorDataCollator reads `labels` alone: give it "
                f"labels, the token ids with {IGNORE_INDEX} where the mask is 0"
            )
    lengths = np.asarray(feature.get("seq_lengths", [len(ids)]), dtype=np.int64)
    if "seq_lengths" not in feature and "position_ids" in feature:
        positions = np.asarray(feature["position_ids"], dtype=np.int64)
        lengths = np.diff(np.flatnonzero(positions == 0), append=len(ids))
        if not np.array_equal(positions, np.concatenate([[], *map(np.arange, lengths)])):
            raise ValueError("position_ids do not count the tokens of each document from 0")
    if lengths.sum() != len(ids) or len(labels) != len(ids):
        raise ValueError(
            f"a row of {len(ids)} tokens has {len(labels)} labels and seq_lengths "
            f"{lengths.tolist()} that add up to {lengths.sum()}; all three must agree"
        )
    cuts = np.cumsum(lengths)[:-1]
    pieces = zip(np.split(ids, cuts), np.split(labels, cuts), strict=True)
    return [(i, t) for i, t in pieces if len(i)]
