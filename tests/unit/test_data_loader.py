"""The loader: the same rows per step for every split and every resume, and the batch's own account."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import BOS, byte_tokenizer, prepare, write_texts

from anchor_context.attention.patterns import PATTERNS
from anchor_context.data.loader import collate, make_loader
from anchor_context.data.rows import PAD_PIECE
from anchor_context.data.stream import check_machines_agree, check_same_stream, stream_origin
from anchor_context.layout import IGNORE_INDEX

SPLITS = [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)]
"""(batch size, accumulation, data ranks) of a global batch of 4 rows."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    texts = ["abcdefghij"[i % 10] * (1 + 13 * i % 170) for i in range(40)]
    return prepare(write_texts(folder / "d.jsonl", texts), folder)


def batches(prepared, count=None, **options):
    defaults = {"pattern": "anchor", "seed": 0, "batch_size": 1, "accumulation": 1}
    defaults |= {"data_rank": 0, "data_degree": 1}
    return list(islice(make_loader(prepared, **(defaults | options)), count))


def test_the_totals_are_those_of_the_steps(prepared):
    """Also where rows come several times, and where the last step is filled up."""
    rows = len(prepared)
    for steps, first, end in ((3, 4, None), (2 * rows // 4 + 1, 0, 2 * rows)):
        how = {"batch_size": 4, "first_row": first, "total_rows": end}
        seen = batches(prepared, steps, **how)
        loader = make_loader(
            prepared, pattern="anchor", seed=0, accumulation=1, data_rank=0, data_degree=1, **how
        )
        tokens, pairs = (sum(b[key] for b in seen) for key in ("step_tokens", "step_pairs"))
        assert loader.dataset.totals(len(seen)) == (tokens, pairs)


@pytest.mark.parametrize(("batch_size", "accumulation", "ranks"), SPLITS)
def test_every_split_sees_the_same_rows_in_a_step(prepared, batch_size, accumulation, ranks):
    whole = batches(prepared, 5, batch_size=4)
    of_ranks = [
        batches(
            prepared,
            5 * accumulation,
            batch_size=batch_size,
            accumulation=accumulation,
            data_rank=rank,
            data_degree=ranks,
        )
        for rank in range(ranks)
    ]
    for step, expected in enumerate(whole):
        mine = [b for of in of_ranks for b in of[step * accumulation : (step + 1) * accumulation]]
        rows = [row for batch in mine for row in batch["row_ids"]]
        assert sorted(rows) == sorted(expected["row_ids"])
        for batch in mine:
            assert batch["step_rows"] == expected["row_ids"]
            for key in ("step_targets", "step_tokens", "step_pairs"):
                assert batch[key] == expected[key]
        targets = sum((batch["labels"] != IGNORE_INDEX).sum().item() for batch in mine)
        assert targets == expected["step_targets"]


def test_an_epoch_is_every_row_once_and_the_next_another_order(prepared):
    rows = len(prepared)
    seen = [batch["row_ids"][0] for batch in batches(prepared, 2 * rows)]
    assert sorted(seen[:rows]) == sorted(seen[rows:]) == list(range(rows))
    assert seen[:rows] != seen[rows:]
    again = [batch["row_ids"][0] for batch in batches(prepared, rows)]
    other = [batch["row_ids"][0] for batch in batches(prepared, rows, seed=1)]
    assert again == seen[:rows] != other


@pytest.mark.parametrize("steps_done", [1, 3, 7])
def test_a_resumed_stream_goes_on_where_it_was(prepared, steps_done):
    whole = batches(prepared, 2 * 12, batch_size=2, accumulation=2)
    rest = batches(
        prepared, 2 * (12 - steps_done), batch_size=2, accumulation=2, first_row=4 * steps_done
    )
    for expected, got in zip(whole[2 * steps_done :], rest, strict=True):
        assert got["row_ids"] == expected["row_ids"]
        assert torch.equal(got["labels"], expected["labels"])


STREAM = [(1, 1, 2), (2, 2, 1), (1, 2, 4), (4, 1, 1), (1, 1, 1)]
"""(batch size, accumulation, data ranks) of a run that other ranks resume, and others again."""


@pytest.mark.parametrize("first", range(len(STREAM)))
def test_an_epoch_resumed_by_other_ranks_trains_every_row_once(prepared, first):
    rows = len(prepared)
    assert rows > 2 * sum(np.prod(split) for split in STREAM), "not every split would get its turn"
    seen, place = [], 0
    runs = STREAM[first:] + STREAM[:first]
    for batch_size, accumulation, ranks in runs:
        steps = 2 if (batch_size, accumulation, ranks) != runs[-1] else None
        count = None if steps is None else steps * accumulation
        for rank in range(ranks):
            mine = batches(
                prepared,
                count,
                batch_size=batch_size,
                accumulation=accumulation,
                data_rank=rank,
                data_degree=ranks,
                first_row=place,
                total_rows=rows,
            )
            seen += [row for batch in mine for row in batch["row_ids"] if row >= 0]
        place += (steps or 0) * batch_size * accumulation * ranks
    assert sorted(seen) == list(range(rows))


def test_a_place_in_the_stream_is_the_same_rows_or_refused(tmp_path):
    texts = ["abcdefghij"[i % 10] * (1 + 13 * i % 170) for i in range(40)]
    data = write_texts(tmp_path / "d.jsonl", texts)
    there = stream_origin(prepare(data, tmp_path), seed=0)
    there = json.loads(json.dumps(there))  # as a checkpoint keeps it

    elsewhere = write_texts(tmp_path / "moved.jsonl", texts)
    os.utime(elsewhere, (0, 0))
    same = prepare(elsewhere, tmp_path / "cache", num_proc=2, skip_bad_documents=True)
    check_same_stream(stream_origin(same, seed=0), there)

    other = write_texts(tmp_path / "other.jsonl", ["k" + texts[0][1:], *texts[1:]])
    for flag, here in (
        ("--seed is 1 here and was 0", (data, {}, 1)),
        ("--seq-length is 32 here and was 64", (data, {"seq_length": 32}, 0)),
        ("--packing is best_fit here and was concat", (data, {"packing": "best_fit"}, 0)),
        (r"--dataset \(its content\) is", (other, {}, 0)),
        ("its tokenizer", (data, {"tokenizer": byte_tokenizer(words=("aa",))}, 0)),
    ):
        dataset, options, seed = here
        origin = stream_origin(prepare(dataset, tmp_path, **options), seed=seed)
        with pytest.raises(ValueError, match=flag) as caught:
            check_same_stream(origin, there)
        assert str(caught.value).count(" here and was ") == 1
        assert "resume with what it was saved with" in str(caught.value)


def test_the_last_step_is_filled_up_with_blank_rows(prepared):
    rows = len(prepared)
    steps = batches(prepared, batch_size=4, total_rows=rows)
    real = [row for batch in steps for row in batch["row_ids"] if row >= 0]
    assert sorted(real) == list(range(rows))
    assert rows % 4, "nothing to fill up: the case says nothing"
    last = steps[-1]
    assert last["row_ids"].count(-1) == -rows % 4
    assert last["input_ids"].shape == (4, 64)
    assert (last["labels"][-1] == IGNORE_INDEX).all()
    assert sum(batch["step_targets"] for batch in steps) == prepared.report["targets"]
    padding = prepared.report["pad_tokens"]
    assert sum(batch["step_tokens"] for batch in steps) == rows * 64 - padding
    assert batches(prepared, batch_size=4, total_rows=rows, first_row=len(steps) * 4) == []


def test_a_batch_against_a_plain_loop(prepared):
    ids = [0, 3, 1]
    batch = collate(prepared, ids, pattern="anchor")
    layout = batch["layout"]
    assert [batch[key].dtype for key in ("input_ids", "labels", "position_ids")] == [
        torch.int64
    ] * 3
    boundaries = []
    for b, i in enumerate(ids):
        row = prepared.row(i)
        starts = row.starts.tolist()
        boundaries += [64 * b + start for start in starts]
        piece = -1
        for t in range(64):
            piece += t in starts
            position = 0 if t in starts else t
            assert batch["position_ids"][b, t] == layout.position_ids[b, t] == position
            assert batch["input_ids"][b, t] == row.tokens[t]
            ends = t + 1 in starts or (t == 63 and row.tokens[64] < 0)
            pad = t >= 64 - row.pad_count
            again = t - starts[piece] < row.untargeted[piece]
            label = IGNORE_INDEX if ends or pad or again else row.tokens[t + 1]
            assert batch["labels"][b, t] == label
    assert layout.cu_seqlens.tolist() == [*boundaries, 3 * 64]
    assert (batch["input_ids"].flatten()[layout.cu_seqlens[:-1].long()] == BOS).sum() > 5


@pytest.mark.parametrize("placement", ["per_document", "none"])
def test_padding_is_no_long_document(tmp_path, placement):
    """It costs little attention, and a sliding window as long as the documents hides nothing."""
    data = write_texts(tmp_path / "d.jsonl", ["a" * 150, "b" * 199, "c" * 170])
    rows = prepare(data, tmp_path, anchor_placement=placement, seq_length=1000)
    longest = 200 + (placement == "per_document")
    assert rows.longest_document == longest and rows.row(0).pad_count > 2 * PAD_PIECE
    pattern = "anchor" if placement == "per_document" else "intra_doc"
    batch = next(iter(batches(rows, batch_size=3, pattern=pattern, total_rows=1)))
    layout = batch["layout"]
    assert layout.max_seqlen == longest
    lengths = np.diff(layout.cu_seqlens)
    assert lengths.sum() == 3000 and (lengths[3:] <= PAD_PIECE).all()
    real = lengths[: (lengths.cumsum() <= 1000).sum()].astype(int)
    assert batch["step_pairs"] == (real * (real + 1) // 2).sum()


def test_the_longest_document_is_found_among_rows_with_and_without_padding(prepared):
    expected = 0
    for i in range(len(prepared)):
        row = prepared.row(i)
        lengths = np.diff(row.starts, append=64)
        expected = max(expected, *(lengths[:-1] if row.pad_count else lengths))
    assert prepared.longest_document == expected


@pytest.mark.parametrize(
    "pattern", [name for name, pattern in PATTERNS.items() if not pattern.anchored]
)
def test_the_other_patterns_take_rows_without_anchors(tmp_path, pattern):
    data = write_texts(tmp_path / "d.jsonl", ["abc", "defgh"])
    plain = prepare(data, tmp_path, anchor_placement="none", seq_length=12)
    batch = collate(plain, [0, -1], pattern=pattern)
    assert batch["layout"].pattern == pattern
    with pytest.raises(ValueError, match="does not go with the pattern 'anchor'"):
        collate(plain, [0], pattern="anchor")


def test_prepared_rows_travel_as_their_path(prepared):
    assert prepared.row(0) is not None  # mapped
    message = pickle.dumps(prepared)
    assert len(message) < 1000
    copy = pickle.loads(message)
    assert np.array_equal(copy.row(2).tokens, prepared.row(2).tokens)


def test_the_transform_runs_on_every_batch(prepared):
    (batch,) = batches(prepared, 1, transform=keep_the_first_half)
    assert batch["input_ids"].shape == (1, 32) and batch["layout"].row_length == 64


def keep_the_first_half(batch: dict) -> dict:
    return batch | {"input_ids": batch["input_ids"][:, :32]}


LEAVES_WITH_A_LOADER = """
import os, signal, sys, time
from anchor_context.data.loader import make_loader
from anchor_context.data.rows import open_rows

loader = make_loader(open_rows(sys.argv[1]), pattern="anchor", seed=0, batch_size=1, accumulation=1,
                     data_rank=0, data_degree=1)
batches = iter(loader)  # alive to the very end, as after an error
next(batches)
[worker] = [w.pid for w in batches._workers]
if os.fork() == 0:  # somebody else, as a scheduler
    os.kill(worker, signal.SIGTERM)
    os._exit(0)
os.wait()
time.sleep(0.5)
for _ in range(20):
    next(batches)
print("twenty more", flush=True)
"""


def test_a_worker_outlives_a_schedulers_signal_but_not_its_rank(prepared):
    finished = subprocess.run(
        [sys.executable, "-c", LEAVES_WITH_A_LOADER, str(prepared.directory)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.stdout == "twenty more\n", finished.stderr[-2000:]
    assert finished.returncode == 0


def test_machines_that_prepared_different_rows_are_named():
    stream = {"--seed": 0, "--dataset (its content)": "abc"}
    check_machines_agree([stream, dict(stream)])
    says = r"different rows: --dataset \(its content\) is abc on rank 0 and def on rank 2"
    with pytest.raises(ValueError, match=says):
        check_machines_agree([stream, stream, stream | {"--dataset (its content)": "def"}])
