"""Documents cut at a growing length: every target kept, each piece behind its anchor, the account exact."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from data_samples import BOS, prepare, write_token_rows

from anchor_context.data.context_schedule import ContextSchedule, parse_context_schedule
from anchor_context.data.loader import Dealing, make_loader, one_step
from anchor_context.data.micro_batches import Units, cut_units
from anchor_context.layout import IGNORE_INDEX

ROW = 256
CASES = [
    ("anchor", "per_document", False),
    ("anchor", "shared", False),
    ("intra_doc", "none", False),
    ("intra_doc_reset", "none", False),
    ("anchor", "per_document", True),
    ("intra_doc_reset", "none", True),
]
"""(pattern, anchor placement, interleaved)."""


def test_the_context_grows_linearly_to_whole_documents():
    """As SkyLadder's: from 32 by a token in 8 steps."""
    schedule = parse_context_schedule("32:800", row_length=132)
    assert [schedule.length(t) for t in (0, 7, 8, 400, 799, 800, 9000)] == [
        *(32, 32, 33, 82, 131),
        *(None, None),
    ]


@pytest.mark.parametrize("text", ["32", "32:", "1:10", "132:10", "32:0", "-4:10", "32:10:2", "a:b"])
def test_what_is_no_growth_is_refused(text):
    with pytest.raises(ValueError, match=f"--context_schedule {text} must be START:STEPS"):
        parse_context_schedule(text, row_length=132)


def units_of(tokens: list[int], kind: str) -> Units:
    n, zero = np.array(tokens), np.zeros(len(tokens), np.int64)
    return Units(kind, zero, np.arange(len(n)), n, (None,), zero, zero)


@pytest.mark.parametrize(
    ("kind", "tokens", "start", "new"),
    [
        ("anchored_document", [4, 4, 3, 3], [0, 4, 7, 0], [0, 1, 1, 0]),
        ("document", [4, 4, 1, 3], [0, 4, 8, 0], [0, 0, 0, 0]),
        ("document_without_anchor", [3, 3, 3, 3], [0, 3, 6, 0], [0, 0, 0, 0]),
    ],
)
def test_a_piece_and_the_anchor_it_sees_are_the_context(kind, tokens, start, new):
    cut = cut_units(units_of([9, 3], kind), context=4)
    assert cut.document.tolist() == [0, 0, 0, 1]
    assert (cut.tokens.tolist(), cut.start.tolist()) == (tokens, start)
    assert cut.new_anchors.tolist() == new
    seen = 1 if kind == "document_without_anchor" else 0
    assert cut.pairs.tolist() == [n * (n + 1) // 2 + seen * n for n in tokens]


@pytest.fixture(scope="module")
def prepared_rows(tmp_path_factory):
    """Rows of 256 tokens: documents of one token to 130, some cut by rows' ends; padding."""
    folder = tmp_path_factory.mktemp("context")
    lengths = np.random.default_rng(0).integers(1, 130, 36)
    documents = [[10 + (7 * d + i) % 190 for i in range(n)] for d, n in enumerate(lengths)]
    data = write_token_rows(folder / "d.jsonl", [documents, [[17], [18]]])

    def make(placement: str, interleaved: bool):
        return prepare(
            data,
            folder,
            data_format="tokenized",
            seq_length=ROW,
            anchor_placement=placement,
            interleave_chunks=interleaved,
        )

    return make


def steps_of(prepared, *, pattern, ranks=1, tokens=64, first_step=0, steps=1, context=None):
    """The micro-batches of `steps` steps of four rows, of all data ranks: a list for each step."""
    found = [[] for _ in range(steps)]
    for rank in range(ranks):
        loader = make_loader(
            prepared,
            pattern=pattern,
            seed=0,
            batch_size=1,
            accumulation=4 // ranks,
            data_rank=rank,
            data_degree=ranks,
            first_row=4 * first_step,
            total_rows=None,
            first_step=first_step,
            context=context,
            dealing=Dealing(micro_batch_tokens=tokens),
        ).dataset
        batches = iter(loader)
        for step in found:
            step += one_step(batches)
    return found


def documents_of(batches) -> list[tuple]:
    """Each document's ids, labels and positions. Left out is what holds the anchor's token alone: padding (of
    the same token), and shared anchors."""
    found = []
    for batch in batches:
        boundaries = batch["layout"].cu_seqlens.tolist()
        fields = [batch[k][0].tolist() for k in ("input_ids", "labels", "position_ids")]
        for start, end in pairwise(boundaries):
            if set(fields[0][start:end]) != {BOS}:
                found.append(tuple(tuple(field[start:end]) for field in fields))
    return found


def cut(document: tuple, *, context: int, pattern: str, placement: str) -> list[tuple]:
    """The pieces of one document, token by token."""
    tokens, pieces = list(zip(*document, strict=True)), []
    while tokens:
        anchors = [(BOS, IGNORE_INDEX, 0)] * (placement == "per_document" and bool(pieces))
        room = context - len(anchors) - (placement == "shared")
        piece, tokens = anchors + tokens[:room], tokens[room:]
        if pattern == "intra_doc_reset":
            piece = [(i, label, position - piece[0][2]) for i, label, position in piece]
        pieces.append(tuple(zip(*piece, strict=True)))
    return pieces


@pytest.mark.parametrize(("pattern", "placement", "interleaved"), CASES)
def test_documents_are_cut_and_nothing_else_changes(prepared_rows, pattern, placement, interleaved):
    prepared, schedule = prepared_rows(placement, interleaved), ContextSchedule(20, 4, ROW)
    whole = steps_of(prepared, pattern=pattern, steps=3)
    for ranks, tokens in [(1, 64), (1, 1000), (2, 30), (4, 300)]:
        options = {"pattern": pattern, "ranks": ranks, "tokens": tokens}
        steps = steps_of(prepared, **options, steps=3, context=schedule)
        for k, (step, uncut) in enumerate(zip(steps, whole, strict=True)):
            context = 20 + (ROW - 20) * k // 4
            before, got = documents_of(uncut), documents_of(step)
            how = {"context": context, "pattern": pattern, "placement": placement}
            expected = [piece for document in before for piece in cut(document, **how)]
            assert Counter(got) == Counter(expected)
            assert len(got) > len(before) or k == 2, "the case is vacuous"

            # The account.
            account = step[0]
            assert account["context_length"] == context and uncut[0]["context_length"] is None
            labels = sum(label != IGNORE_INDEX for _, labels, _ in got for label in labels)
            assert labels == account["step_targets"] == uncut[0]["step_targets"]
            shared = placement == "shared"
            assert account["step_tokens"] == sum(len(ids) for ids, *_ in got) + 4 * shared
            pairs = [
                sum(len(d) * (len(d) + 1) // 2 + shared * len(d) for d, *_ in documents)
                for documents in (before, got)
            ]
            assert uncut[0]["step_pairs"] - account["step_pairs"] == pairs[0] - pairs[1]


def test_full_attention_is_cut_in_the_row(prepared_rows):
    """As SkyLadder does: the windows lie in the row, whatever its documents."""
    prepared, schedule = prepared_rows("none", False), ContextSchedule(20, 4, ROW)
    ((*uncut,),) = steps_of(prepared, pattern="full")
    for ranks in (1, 2):
        (step,) = steps_of(prepared, pattern="full", ranks=ranks, context=schedule)
        pieces = Counter()
        for batch in step:
            boundaries = batch["layout"].unit_boundaries.tolist()
            assert set(boundaries) <= set(batch["layout"].cu_seqlens.tolist())
            for start, end in pairwise(boundaries):
                ids = batch["input_ids"][0, start:end].tolist()
                labels = batch["labels"][0, start:end].tolist()
                pieces[tuple(ids), tuple(labels)] += set(ids) != {BOS}
        expected = Counter()
        for batch in uncut:
            ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
            real = len(ids)
            while ids[real - 1] == BOS:
                real -= 1
            for start in range(0, real, 20):
                piece = slice(start, min(start + 20, real))
                expected[tuple(ids[piece]), tuple(labels[piece])] += 1
        assert +pieces == expected
        assert step[0]["step_tokens"] == uncut[0]["step_tokens"]


@pytest.mark.parametrize("placement", ["per_document", "shared"])
def test_the_totals_of_steps_to_come_are_of_their_pieces(prepared_rows, placement):
    """Of those cut and not cut, where rows come again, and behind a step that is done."""
    prepared, schedule = prepared_rows(placement, False), ContextSchedule(20, 4, ROW)
    steps = steps_of(prepared, pattern="anchor", first_step=1, steps=6, context=schedule)
    assert len(prepared) < 4 * 6, "the case is vacuous"
    loader = make_loader(
        prepared,
        pattern="anchor",
        seed=0,
        batch_size=4,
        accumulation=1,
        data_rank=0,
        data_degree=1,
        first_row=4,
        first_step=1,
        context=schedule,
        dealing=Dealing(micro_batch_tokens=64),
    )
    tokens, pairs = (sum(s[0][key] for s in steps) for key in ("step_tokens", "step_pairs"))
    assert loader.dataset.totals(6) == (tokens, pairs)


def test_a_resumed_run_stands_where_it_would_have(prepared_rows):
    prepared, schedule = prepared_rows("per_document", False), ContextSchedule(20, 4, ROW)
    through = steps_of(prepared, pattern="anchor", steps=6, context=schedule)
    resumed = steps_of(prepared, pattern="anchor", first_step=2, steps=4, context=schedule)
    plain = steps_of(prepared, pattern="anchor", first_step=4, steps=2)
    assert [step[0]["context_length"] for step in resumed] == [138, 197, None, None]
    for ours, theirs in ((resumed, through[2:]), (plain, through[4:])):
        for step, other in zip(ours, theirs, strict=True):
            for batch, again in zip(step, other, strict=True):
                for key in ("input_ids", "labels", "position_ids"):
                    assert torch.equal(batch[key], again[key])
                assert torch.equal(batch["layout"].cu_seqlens, again["layout"].cu_seqlens)
