"""Interleaved chunks: the same tokens and targets, each document's own order, seen through document ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_samples import BOS, prepare, write_token_rows

from anchor_context.attention import flex, reference
from anchor_context.attention.patterns import attended_boundaries, attended_pairs, make_layout
from anchor_context.data.loader import collate


@pytest.fixture(params=["per_document", "shared", "none"])
def prepared(request, tmp_path):
    """Rows of documents of 10 to 200 tokens; document d holds the tokens 1000 d, 1000 d + 1, ..."""
    lengths = np.random.default_rng(0).integers(10, 200, 30)
    documents = [[1000 * (d + 1) + i for i in range(n)] for d, n in enumerate(lengths)]
    data = write_token_rows(tmp_path / "d.jsonl", [documents])
    return prepare(
        data,
        tmp_path,
        data_format="tokenized",
        seq_length=512,
        anchor_placement=request.param,
        interleave_chunks=True,
    )


def pattern_of(prepared) -> str:
    return "intra_doc" if prepared.anchor_placement == "none" else "anchor"


def test_chunks_are_cut_from_their_own_document_in_its_order(prepared):
    split = 0
    for i in range(len(prepared)):
        row = prepared.row(i)
        ends = [*row.starts[1:], 512]
        seen: dict[int, list[int]] = {}
        chunks: dict[int, int] = {}
        for piece, (start, end) in enumerate(zip(row.starts, ends, strict=True)):
            if end == 512 and row.pad_count:
                continue
            tokens = [t for t in row.tokens[start:end].tolist() if t != BOS]
            assert len({t // 1000 for t in tokens}) <= 1  # never another document's tokens
            if tokens:
                seen.setdefault(tokens[0] // 1000, []).extend(tokens)
            document = int(row.documents[piece])
            chunks[document] = chunks.get(document, 0) + 1
        for tokens in seen.values():
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        lengths = row.document_lengths()
        for document, count in chunks.items():
            whole = not 64 <= lengths[document] <= 2048
            first, last = document == 0, document == len(lengths) - 1
            if whole:
                assert count == 1
            elif not (last and row.tokens[-1] != -1) and not (first or last):
                assert count in (2, 3)
                split += 1
    assert split > 10


def test_a_documents_chunks_lie_apart(prepared):
    apart = sum(
        np.any(np.diff(np.flatnonzero(row.documents == d)) > 1)
        for row in map(prepared.row, range(len(prepared)))
        for d in np.unique(row.documents)
    )
    assert apart > 10


def test_chunks_of_one_document_see_each_other_through_flex_and_reference(prepared):
    batch = collate(prepared, [0, 1], pattern=pattern_of(prepared))
    layout, tokens = batch["layout"], batch["input_ids"]
    assert layout.interleaved and layout.to("cpu").interleaved
    visible = flex.dense_mask(layout)[:, 0]

    pads = [prepared.row(i).pad_count for i in (0, 1)]
    for b in range(2):
        real = tokens[b, : 512 - pads[b]]
        is_anchor = real == BOS
        document = torch.where(is_anchor, -1, real // 1000)
        if prepared.anchor_placement == "per_document":  # an anchor belongs to what follows it
            following = real.roll(-1) // 1000
            document = torch.where(is_anchor, following, document)
        same = document[:, None] == document[None, :]
        if prepared.anchor_placement == "shared":
            same[:, 0] = True
        expected = same & torch.ones_like(same).tril()
        got = visible[b, : len(real), : len(real)]
        # An anchor at the row's end has no token after it to tell its document from.
        assert torch.equal(got[:-1, :-1], expected[:-1, :-1])

    q, k, v = (torch.randn(2, 2, 512, 16, dtype=torch.float64) for _ in range(3))
    attend = flex.make_attend()
    torch.testing.assert_close(
        attend(q, k, v, layout, scale=0.25), reference.attend(q, k, v, layout, scale=0.25)
    )


@pytest.mark.parametrize("window", [None, 40])
def test_flex_names_every_block_that_a_chunk_sees(prepared, window):
    layout = collate(prepared, [0, 1], pattern=pattern_of(prepared))["layout"]
    dense = flex.dense_mask(layout, sliding_window=window)[:, 0]
    blocks = flex.block_mask(layout, sliding_window=window).to_dense()[:, 0].bool()
    needed = dense.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).any(4).any(2)
    assert torch.equal(needed & blocks, needed)


def test_only_the_documents_first_token_is_at_position_0(prepared):
    batch = collate(prepared, [0, 1], pattern=pattern_of(prepared))
    index = torch.arange(512).expand(2, -1)
    moved = batch["position_ids"] != index
    if prepared.anchor_placement == "per_document":
        assert (batch["input_ids"][moved] == BOS).all() and moved.sum() > 5
    else:
        assert not moved.any()


def test_flash_refuses_chunks(prepared):
    layout = collate(prepared, [0], pattern=pattern_of(prepared))["layout"]
    with pytest.raises(ValueError, match="--attn_engine flex"):
        attended_boundaries(layout)


def test_a_window_is_of_the_documents_own_tokens(prepared):
    """As in a micro-batch of units, which puts the chunks of a document together."""
    layout = collate(prepared, [0], pattern=pattern_of(prepared))["layout"]
    order = np.argsort(layout.document_ids[0], stable=True)
    together = make_layout(
        np.concatenate(([0], np.cumsum(prepared.row(0).document_lengths())[:-1])),
        batch_size=1,
        row_length=512,
        pattern=pattern_of(prepared),
        anchor_placement=prepared.anchor_placement,
    )
    apart, expected = (flex.dense_mask(x, sliding_window=40)[0, 0] for x in (layout, together))
    assert torch.equal(apart[order][:, order], expected)


@pytest.mark.parametrize("window", [None, 40])
def test_the_work_counts_documents_not_chunks(prepared, window):
    row = prepared.row(0)
    layout = collate(prepared, [0], pattern=pattern_of(prepared))["layout"]
    pairs = attended_pairs(
        row.document_lengths(),
        pattern=pattern_of(prepared),
        anchor_placement=prepared.anchor_placement,
        windows=(window,),
    )
    assert pairs == flex.dense_mask(layout, sliding_window=window).sum().item()
