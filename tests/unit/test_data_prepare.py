"""Packing: nothing lost, nothing doubled, boundaries and targets right, preparation safe."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_samples import (
    BOS,
    BYTES,
    EOS,
    byte_tokenizer,
    file_bytes,
    prepare,
    write_texts,
    write_token_rows,
)
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anchor_context.attention.patterns import find_anchor_id
from anchor_context.data import prepare as preparation
from anchor_context.data import sources, store
from anchor_context.data.documents import DocumentReader
from anchor_context.data.rows import NO_TOKEN, open_rows
from anchor_context.layout import IGNORE_INDEX

PLACEMENTS = ("per_document", "shared", "none")


def check_account(prepared) -> dict:
    report = prepared.report
    laid = report["document_tokens"] + report["anchors_added"] + report["pad_tokens"]
    assert laid == report["rows"] * report["row_length"]
    assert prepared._arrays["tokens"].shape == (report["rows"], report["row_length"] + 1)
    assert prepared.target_counts.sum() == report["targets"]
    assert prepared.pad_counts.sum() == report["pad_tokens"]
    return report


def unpack(prepared, *, documents: list[list[int]], placement: str) -> list[int]:
    """Check every token, target and boundary of rows whose document tokens all differ.

    Returns the document tokens in the order of the rows.
    """
    owner = {token: d for d, document in enumerate(documents) for token in document if token != BOS}
    successor, laid = {}, []
    for i in range(len(prepared)):
        row, length = prepared.row(i), prepared.row_length
        labels, ends = row.labels(), [*row.starts[1:], length]
        assert (labels != IGNORE_INDEX).sum() == prepared.target_counts[i]
        for piece, (start, end) in enumerate(zip(row.starts, ends, strict=True)):
            padding = row.pad_count and piece == len(row.starts) - 1
            if padding:
                assert start == length - row.pad_count and (labels[start:] == IGNORE_INDEX).all()
                continue
            tokens = row.tokens[start:end].tolist()
            anchor_alone = placement == "shared" and start == 0
            if anchor_alone or placement == "per_document":
                first_chunk = row.documents[piece] not in row.documents[:piece]
                if first_chunk:
                    assert tokens[0] == BOS
                    tokens = tokens[1:]
            body = [token for token in tokens if token != BOS or placement == "none"]
            assert body == tokens, "an anchor inside a piece"
            assert len({owner[token] for token in body if token != BOS}) <= 1
            laid += body
        for token, label in zip(row.tokens[:-1].tolist(), labels.tolist(), strict=True):
            if label != IGNORE_INDEX:
                assert label not in successor.values(), "a target twice"
                if token == BOS:
                    assert label == next(t for t in documents[owner[label]] if t != BOS)
                    successor[f"anchor {label}"] = label
                else:
                    assert token not in successor
                    successor[token] = label
    # Following the targets from each first token gives back each document.
    for document in documents:
        body = [token for token in document if token != BOS]
        if placement == "per_document" or (placement == "none" and document[0] == BOS):
            assert successor.pop(f"anchor {body[0]}") == body[0]
        for token, following in pairwise(body):
            assert successor.pop(token) == following
    assert not successor, "a target across a boundary"
    return laid


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    shapes=st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=1, max_size=30),
    row_length=st.integers(2, 150),
    placement=st.sampled_from(PLACEMENTS),
    strategy=st.sampled_from(("concat", "best_fit")),
    interleave=st.booleans(),
)
def test_the_targets_give_back_every_document_exactly_once(
    shapes, row_length, placement, strategy, interleave
):
    documents, token = [], 10
    for length, with_bos in shapes:
        documents.append([BOS] * with_bos + list(range(token, token + length)))
        token += length
    with tempfile.TemporaryDirectory() as folder:
        rows = [part for part in (documents[:7], documents[7:]) if part]
        data = write_token_rows(Path(folder) / "d.jsonl", rows)
        prepared = prepare(
            data,
            Path(folder),
            data_format="tokenized",
            seq_length=row_length,
            anchor_placement=placement,
            packing=strategy,
            interleave_chunks=interleave,
        )
        report = check_account(prepared)
        laid = unpack(prepared, documents=documents, placement=placement)
        expected = [t for d in documents for t in d if t != BOS or placement == "none"]
        if strategy == "concat" and not interleave:
            assert laid == expected
        assert sorted(laid) == sorted(expected)
        dropped = sum(bos for _, bos in shapes) if placement == "shared" else 0
        assert report["anchors_merged"] == dropped
        assert report["document_tokens"] + dropped == sum(map(len, documents))
        if strategy == "best_fit":
            for i in range(len(prepared)):
                goes_on_with = prepared.row(i).tokens[-1]
                if goes_on_with != NO_TOKEN:  # cut: the document is longer than a row
                    cut = next(document for document in documents if goes_on_with in document)
                    size = len(cut) + (cut[0] != BOS) * (placement != "none")
                    assert size > row_length


def test_a_row_longer_than_the_row_length_keeps_every_token(tmp_path):
    row = [[BOS, *range(10, 8010)], [BOS, *range(8010, 25609)]]  # 25,601 tokens
    data = write_token_rows(tmp_path / "long.jsonl", [row])
    prepared = prepare(data, tmp_path, data_format="tokenized", seq_length=6553)
    report = check_account(prepared)
    assert report["document_tokens"] == 25601 and report["documents"] == 2
    assert report["targets"] == 25599  # all but the two anchors


def test_a_continued_piece_gains_an_anchor_and_loses_nothing(tmp_path):
    data = write_token_rows(tmp_path / "d.jsonl", [[[20, 21, 22, 23, 24, 25, 26]]])
    prepared = prepare(data, tmp_path, data_format="tokenized", seq_length=6)
    first, second = prepared.row(0), prepared.row(1)
    assert first.tokens.tolist() == [BOS, 20, 21, 22, 23, 24, 25]
    assert first.labels().tolist() == [20, 21, 22, 23, 24, 25]
    assert second.tokens[:3].tolist() == [BOS, 25, 26] and second.pad_count == 3
    assert second.labels().tolist() == [IGNORE_INDEX, 26] + [IGNORE_INDEX] * 4


def test_an_anchor_alone_at_a_rows_end_predicts_the_first_token(tmp_path):
    data = write_token_rows(tmp_path / "d.jsonl", [[[20, 21], [30, 31, 32]]])
    prepared = prepare(data, tmp_path, data_format="tokenized", seq_length=4)
    check_account(prepared)
    first, second = prepared.row(0), prepared.row(1)
    assert first.tokens.tolist() == [BOS, 20, 21, BOS, 30]
    assert first.starts.tolist() == [0, 3]
    assert first.labels().tolist() == [20, 21, IGNORE_INDEX, 30]
    assert second.labels().tolist() == [IGNORE_INDEX, 31, 32, IGNORE_INDEX]


def test_short_segments_stay(tmp_path):
    data = write_token_rows(tmp_path / "d.jsonl", [[[20], [30, 31], [40, 41, 42]]])
    for placement in PLACEMENTS:
        prepared = prepare(
            data, tmp_path, data_format="tokenized", seq_length=16, anchor_placement=placement
        )
        assert check_account(prepared)["document_tokens"] == 6


def test_eos_ends_every_text_once(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", ["ab", "cd</s>"])
    row = prepare(data, tmp_path, seq_length=16, parse_special_tokens=True).row(0)
    assert (row.tokens[:8] == EOS).nonzero()[0].tolist() == [3, 7]
    assert row.labels()[2] == EOS and row.labels()[3] == IGNORE_INDEX


@pytest.mark.parametrize("placement", ["per_document", "shared"])
def test_a_tokenizer_without_bos_anchors_with_eos_also_inside_the_row(tmp_path, placement):
    tokenizer = byte_tokenizer(bos=False)
    assert find_anchor_id(tokenizer) == tokenizer.eos_token_id == 0
    data = write_texts(tmp_path / "d.jsonl", ["ab", "c</s>d", "</s>e"])
    how = {"seq_length": 20, "anchor_placement": placement, "parse_special_tokens": True}
    prepared = prepare(data, tmp_path, tokenizer=tokenizer, **how)
    check_account(prepared)
    a, b, c, d, e = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcde")
    row, none = prepared.row(0), IGNORE_INDEX
    if placement == "per_document":
        assert row.tokens[:12].tolist() == [0, a, b, 0, 0, c, 0, d, 0, 0, e, 0]
        assert row.starts.tolist() == [0, 4, 9, 12]  # the end of "ab", not each EOS
        assert row.labels()[:12].tolist() == [a, b, 0, none, c, 0, d, 0, none, e, 0, none]
    else:
        assert row.tokens[:10].tolist() == [0, a, b, 0, c, 0, d, 0, e, 0]
        assert row.starts.tolist() == [0, 1, 4, 8, 10]
        assert prepared.report["anchors_merged"] == 1


def test_a_tokenizer_with_neither_bos_nor_eos_is_refused(tmp_path):
    tokenizer = byte_tokenizer(bos=False)
    tokenizer.eos_token = None
    data = write_texts(tmp_path / "d.jsonl", ["ab"])
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        prepare(data, tmp_path, tokenizer=tokenizer)


def test_padding_lies_inside_the_models_vocabulary(tmp_path):
    tokenizer = byte_tokenizer(words=("[PAD]",))
    tokenizer.pad_token = "[PAD]"
    pad = tokenizer.pad_token_id
    data = write_texts(tmp_path / "d.jsonl", ["ab"])
    for vocab_size, expected in ((pad, BOS), (pad + 1, pad)):
        prepared = prepare(data, tmp_path, tokenizer=tokenizer, vocab_size=vocab_size)
        assert prepared.pad_id == expected and prepared.pad_counts.tolist() == [60]
        assert (prepared.row(0).tokens[4:-1] == expected).all()


@pytest.mark.parametrize("token", ["bos_token", "eos_token"])
def test_an_anchor_or_eos_outside_the_vocabulary_is_no_fault_of_the_data(tmp_path, token):
    tokenizer = byte_tokenizer(words=("<new>",))
    setattr(tokenizer, token, "<new>")
    new = tokenizer.convert_tokens_to_ids("<new>")
    data = write_texts(tmp_path / "d.jsonl", ["ab"])
    options = {"tokenizer": tokenizer, "skip_bad_documents": True}
    with pytest.raises(ValueError, match=f"<new> has the id {new}, outside .* vocabulary of {new}"):
        prepare(data, tmp_path, vocab_size=new, **options)
    assert prepare(data, tmp_path, vocab_size=new + 1, **options).report["documents"] == 1


def test_a_domain_tag_is_seen_but_no_target(tmp_path):
    texts = [b'{"text": "hello", "set": "web"}', b'{"text": "xy", "set": "a book"}']
    data = write_texts(tmp_path / "d.jsonl", texts)
    prepared = prepare(data, tmp_path, source_column="set", domain_tag=True, seq_length=40)
    check_account(prepared)
    row = prepared.row(0)
    assert BYTES.decode(row.tokens[1:10]) == "webhello</s>"
    tag, text = BYTES("web")["input_ids"], BYTES("hello")["input_ids"]
    assert row.labels()[:10].tolist() == [IGNORE_INDEX] * len(tag) + [*text, EOS] + [IGNORE_INDEX]
    assert prepared.report["tag_tokens"] == len("web") + len("a book")


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=10),
    row_length=st.integers(2, 40),
    placement=st.sampled_from(PLACEMENTS),
)
def test_tags_are_cut_without_becoming_targets(lengths, row_length, placement):
    texts = ["abcdefghijklmnopqrstuvwxyz"[i] * n for i, n in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        data = write_texts(Path(folder) / "d.jsonl", texts, set="TAG")
        prepared = prepare(
            data,
            Path(folder),
            source_column="set",
            domain_tag=True,
            seq_length=row_length,
            anchor_placement=placement,
        )
        check_account(prepared)
        targets = [t for i in range(len(prepared)) for t in prepared.row(i).labels() if t >= 0]
        expected = [t for text in texts for t in [*BYTES(text)["input_ids"], EOS]]
        assert sorted(targets) == sorted(expected)  # every token of the texts, none of the tags


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_chunks_of_a_tagged_or_continued_document_lose_no_target(tmp_path, placement):
    texts = ["abcdefghijklmnopqrstuvwxyz"[i] * 150 for i in range(20)]  # cut by every row's end
    data = write_texts(tmp_path / "d.jsonl", texts, set="a long tag")
    options = {"source_column": "set", "domain_tag": True, "interleave_chunks": True}
    prepared = prepare(data, tmp_path, seq_length=260, anchor_placement=placement, **options)
    chunks = sum(
        len(np.unique(prepared.row(i).documents)) < len(prepared.row(i).documents)
        for i in range(len(prepared))
    )
    assert chunks > 5
    targets = [t for i in range(len(prepared)) for t in prepared.row(i).labels() if t >= 0]
    assert sorted(targets) == sorted(t for text in texts for t in [*BYTES(text)["input_ids"], EOS])


def test_best_fit_cuts_no_document_that_fits_and_reports_the_padding(tmp_path):
    texts = ["x" * n for n in (50, 40, 30, 20, 200, 10)]
    data = write_texts(tmp_path / "d.jsonl", texts)
    report = check_account(prepare(data, tmp_path, packing="best_fit"))
    assert report["documents_cut"] == 1  # the one of 200
    assert check_account(prepare(data, tmp_path))["documents_cut"] > 1


@pytest.mark.parametrize("strategy", ["concat", "best_fit"])
def test_documents_of_many_shards_in_a_row_keep_no_file_open(tmp_path, monkeypatch, strategy):
    monkeypatch.setattr(sources, "PORTION_BYTES", 100)  # a shard per document
    data = write_texts(tmp_path / "d.jsonl", ["abcd" * 20] * 60)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = sorted(set(range(1000)) - {int(name) for name in os.listdir("/dev/fd")})
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[30], limits[1]))
    try:
        report = prepare(data, tmp_path, packing=strategy, seq_length=6000).report
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (report["documents"], report["rows"]) == (60, 1)


def test_documents_of_nothing_but_an_anchor(tmp_path):
    data = write_token_rows(tmp_path / "d.jsonl", [[[BOS], [BOS], [BOS, 9, 8]]])
    options = {"data_format": "tokenized", "seq_length": 8}
    per_document = check_account(prepare(data, tmp_path, **options))
    assert (per_document["document_tokens"], per_document["targets"]) == (5, 2)
    shared = check_account(prepare(data, tmp_path, anchor_placement="shared", **options))
    assert (shared["document_tokens"], shared["anchors_merged"]) == (2, 3)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("data_format", "csv", "--data-format csv is unknown"),
        ("anchor_placement", "both", "--anchor_placement both is unknown"),
        ("packing", "first_fit", "--packing first_fit is unknown"),
        ("seq_length", 1, "--seq-length 1 leaves no room"),
        ("seed", -1, "--seed -1 must be from 0 to 4,294,967,295"),
        ("seed", 1 << 32, "--seed 4294967296 must be"),
        ("domain_tag", True, "--domain_tag needs --source_column"),
        ("mixture", "a=1", "--mixture needs --source_column"),
        ("upsample_long", "5x4096", "FACTOR@TOKENS"),
        ("upsample_long", "0.5@10", "FACTOR@TOKENS"),
    ],
)
def test_options_that_cannot_be(tmp_path, option, value, says):
    data = write_texts(tmp_path / "d.jsonl", ["ab"])
    with pytest.raises(ValueError, match=says):
        prepare(data, tmp_path, **{option: value})


# -- the cache -----------------------------------------------------------------------------------------


def test_waiting_for_another_preparation_is_told(tmp_path, monkeypatch):
    data, told = write_texts(tmp_path / "d.jsonl", ["abc"]), []
    rows = prepare(data, tmp_path, seq_length=8)
    shutil.rmtree(rows.directory)
    (name,) = tmp_path.glob("rows-*.lock")
    other = FileLock(name)
    other.acquire()
    monkeypatch.setattr(preparation, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(preparation, "warn", lambda text: told.append(text) or other.release())
    assert prepare(data, tmp_path, seq_length=8).report == rows.report
    assert told == [f"another process prepares these rows (it holds {name}): waiting for its end"]


def test_whatever_shapes_the_rows_is_in_the_fingerprint(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", ["hello there", "b" * 90, "a</s>b"])
    first = prepare(data, tmp_path)
    assert prepare(data, tmp_path).directory == first.directory
    splitting = byte_tokenizer()
    splitting.split_special_tokens = True
    changed = [
        {"seq_length": 32},
        {"anchor_placement": "shared"},
        {"tokenizer": byte_tokenizer(words=("hello",))},
        {"tokenizer": byte_tokenizer(bos=False)},
        {"tokenizer": splitting},
        {"vocab_size": 999},
        {"packing": "best_fit"},
        {"interleave_chunks": True},
        {"interleave_chunks": True, "seed": 1},
        {"skip_bad_documents": True},
    ]
    directories = {prepare(data, tmp_path, **change).directory for change in changed}
    assert len(directories | {first.directory}) == len(changed) + 1
    assert prepare(data, tmp_path, seed=1).directory == first.directory  # it draws nothing


def test_changed_data_are_noticed_even_at_the_same_size_and_time(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", ["hello"])
    before, first = os.stat(data), prepare(data, tmp_path)
    write_texts(data, ["jello"])
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(data).st_size == before.st_size
    second = prepare(data, tmp_path)
    assert BYTES.decode(second.row(0).tokens[1:6]) == "jello"
    assert second.directory != first.directory


def test_the_same_command_twice_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PORTION_BYTES", 500)
    data = write_texts(tmp_path / "d.jsonl", [f"text {i} " * (i % 40 + 1) for i in range(60)])
    runs = [prepare(data, tmp_path / name, interleave_chunks=True) for name in "ab"]
    assert file_bytes(runs[0]) == file_bytes(runs[1])


def test_the_number_of_processes_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PORTION_BYTES", 2000)
    data = write_texts(tmp_path / "d.jsonl", [f"text {i} " * (i % 40 + 1) for i in range(60)])
    one = prepare(data, tmp_path / "one", num_proc=1)
    two = prepare(data, tmp_path / "two", num_proc=2)
    assert file_bytes(one) == file_bytes(two)


@pytest.mark.parametrize("when", ["tokenising", "laying"])
def test_a_killed_preparation_goes_on_and_gives_the_same_rows(tmp_path, monkeypatch, when):
    monkeypatch.setattr(sources, "PORTION_BYTES", 500)
    data = write_texts(tmp_path / "d.jsonl", [f"text {i} " * (i % 40 + 1) for i in range(60)])
    undisturbed = prepare(data, tmp_path / "undisturbed")

    read, calls = DocumentReader.__call__, []

    def read_or_die(self, unit):
        calls.append(unit)
        if when == "tokenising" and len(calls) == 5:
            raise KeyboardInterrupt
        return read(self, unit)

    monkeypatch.setattr(DocumentReader, "__call__", read_or_die)
    with monkeypatch.context() as during:
        if when == "laying":
            documents = store.TokenStore.documents

            def documents_until_death(self, order):
                yield next(documents(self, order))
                raise KeyboardInterrupt

            during.setattr(store.TokenStore, "documents", documents_until_death)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("rows-*/manifest.json"))
    before = len(calls)
    resumed = prepare(data, tmp_path / "killed")
    units = len(list(sources.read_portions([str(data)], ["text"])))
    done = 4 if when == "tokenising" else units
    assert len(calls) - before == units - done  # only what was missing
    assert file_bytes(resumed) == file_bytes(undisturbed)
    assert [p.name for p in (tmp_path / "killed").glob(".*")] == []


@pytest.mark.parametrize("before", ["the work is put aside", "it is removed"])
def test_a_kill_after_the_rows_are_there_leaves_nothing_behind_for_good(
    tmp_path, monkeypatch, before
):
    data = write_texts(tmp_path / "d.jsonl", ["text"])
    other = write_texts(tmp_path / "e.jsonl", ["other text"])
    rename, remove = Path.rename, shutil.rmtree

    def rename_or_die(path, target):
        if before == "the work is put aside" and path.suffix == ".work":
            raise KeyboardInterrupt
        return rename(path, target)

    def remove_or_die(folder, **more):
        if not more:
            raise KeyboardInterrupt
        remove(folder, **more)

    def left() -> list[Path]:
        return list((tmp_path / "cache").glob(".rows-*"))

    for path in (data, other):
        with monkeypatch.context() as during:
            during.setattr(Path, "rename", rename_or_die)
            during.setattr(preparation.shutil, "rmtree", remove_or_die)
            with pytest.raises(KeyboardInterrupt):
                prepare(path, tmp_path / "cache")
    assert len(left()) == 2
    prepare(data, tmp_path / "cache")
    assert len(left()) == 1, "the other's"
    prepare(other, tmp_path / "cache")
    assert not left()


@pytest.fixture
def read_only(monkeypatch):
    """A file system on which nothing can be locked, made or removed, also for root."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", "somewhere")

    for owner, name in (
        (preparation.FileLock, "acquire"),
        (Path, "rename"),
        (preparation.shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, refuse)


def test_whole_rows_are_opened_without_a_lock(tmp_path, request):
    """Another user's, on a read-only disk; with the leftovers of a kill, too."""
    cache, data = tmp_path / "c", write_texts(tmp_path / "d.jsonl", ["text"])
    theirs = prepare(data, cache)
    (lock,) = cache.glob("*.lock")
    work = cache / f".{lock.stem}.work"
    work.mkdir()
    (work / "laying").write_text(theirs.directory.name)
    before = sorted(cache.rglob("*"))

    request.getfixturevalue("read_only")
    ours = prepare(data, cache)
    assert ours.directory == theirs.directory and sorted(cache.rglob("*")) == before
    other = write_texts(tmp_path / "e.jsonl", ["other"])
    says = r"--cache_dir \S+ holds no rows of these data .* written \(Read-only file system\): name"
    with pytest.raises(ValueError, match=says):
        prepare(other, cache)


def test_whole_rows_do_not_wait_for_work_on_others(tmp_path):
    """Of the same data, say with other flags: the lock is theirs."""
    data = write_texts(tmp_path / "d.jsonl", ["text"])
    theirs = prepare(data, tmp_path / "c")
    (lock,) = (tmp_path / "c").glob("*.lock")
    with FileLock(lock):
        assert prepare(data, tmp_path / "c").directory == theirs.directory


@pytest.mark.parametrize("what", ["grows", "ends in half a line", "is gone"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch, what):
    data = write_texts(tmp_path / "d.jsonl", ["one", "two"])
    read = sources.read_portions

    def read_while_it_changes(*arguments):
        if what == "is gone":
            yield from read(*arguments)
            data.unlink()
        else:
            with data.open("a") as file:
                file.write('{"text": "three"}\n' if what == "grows" else '{"te')
            yield from read(*arguments)

    monkeypatch.setattr(preparation, "read_portions", read_while_it_changes)
    now = "is gone now" if what == "is gone" else r"has \d+ bytes now"
    says = rf"--dataset \S+d.jsonl changed while it was read: it had 32 bytes, and {now}"
    with pytest.raises(ValueError, match=says):
        prepare(data, tmp_path / "c")
    assert not list((tmp_path / "c").glob("rows-*/manifest.json"))


def test_rows_without_a_target_are_nothing_to_train_on(tmp_path):
    """Documents of one token: nothing follows it within its document."""
    options = {"data_format": "tokenized", "anchor_placement": "none"}
    for name, row in (("none", [[5], [6], [7]]), ("one", [[5], [6, 7]])):
        prepared = prepare(
            write_token_rows(tmp_path / name, [row]).rename(tmp_path / f"{name}.jsonl"),
            tmp_path,
            **options,
        )
        if name == "one":
            preparation.check_targets(prepared)
        else:
            with pytest.raises(ValueError, match="no token of the rows .* has a target"):
                preparation.check_targets(prepared)


@pytest.fixture
def units_read(monkeypatch):
    """Units of 500 bytes; the list grows by each that is tokenised."""
    monkeypatch.setattr(sources, "PORTION_BYTES", 500)
    read, units = DocumentReader.__call__, []

    def recorded(self, unit):
        documents = read(self, unit)
        units.append(unit)
        return documents

    monkeypatch.setattr(DocumentReader, "__call__", recorded)
    return units


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_after_a_repair_only_what_changed_is_tokenised_again(tmp_path, units_read, kind):
    texts = [f"text {i} " * (i % 40 + 1) for i in range(60)]

    def write(texts: list[str]) -> Path:
        if kind == "jsonl":
            return write_texts(tmp_path / "d.jsonl", texts)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet")
        return tmp_path / "d.parquet"

    data, cache = write([*texts[:50], "", *texts[50:]]), tmp_path / "c"
    with pytest.raises(ValueError, match=r"(line|row) 51: `text` is empty"):
        prepare(data, cache)
    done = len(units_read)
    assert done > 5
    units_read.clear()
    texts[3] = texts[3].swapcase()  # as long as before
    repaired = prepare(write([*texts[:50], "x", *texts[50:]]), cache)
    assert list(cache.glob(".*")) == []
    again = len(units_read)
    units_read.clear()
    undisturbed = prepare(data, tmp_path / "undisturbed")
    assert file_bytes(repaired) == file_bytes(undisturbed)
    assert again == len(units_read) - done + 1  # the one of text 3


def test_after_an_error_other_flags_find_what_is_tokenised(tmp_path, units_read):
    texts = [f"text {i} " * (i % 40 + 1) for i in range(60)]
    data, cache = write_texts(tmp_path / "d.jsonl", [*texts, ""], set="web"), tmp_path / "c"
    options = {"source_column": "set"}
    with pytest.raises(ValueError, match="line 61"):
        prepare(data, cache, mixture="wbe=1", **options)
    done = len(units_read)
    options["skip_bad_documents"] = True
    with pytest.raises(ValueError, match="--mixture names"):
        prepare(data, cache, mixture="wbe=1", **options)
    assert len(units_read) == done + 1
    with pytest.raises(ValueError, match="line 61"):  # what was skipped is not taken for clean
        prepare(data, cache, mixture="web=1", source_column="set")
    prepared = prepare(data, cache, mixture="web=1", **options)
    assert len(units_read) == done + 1 and list(cache.glob(".*")) == []
    undisturbed = prepare(data, tmp_path / "undisturbed", mixture="web=1", **options)
    assert file_bytes(prepared) == file_bytes(undisturbed)


def prepare_and_tell(data, cache, queue):
    queue.put(str(prepare(data, cache).directory))


def test_processes_that_prepare_at_once_share_one_set(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", ["hello " * 50] * 20)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=prepare_and_tell, args=(data, tmp_path / "c", queue))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    assert len({queue.get(timeout=60) for _ in processes}) == 1
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list((tmp_path / "c").glob("rows-*/manifest.json"))) == 1


def test_a_prepared_set_is_a_dataset(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", ["hello there", "b" * 90])
    made = prepare(data, tmp_path / "made")
    data.unlink()
    opened = prepare(made.directory, tmp_path / "other")
    assert file_bytes(opened) == file_bytes(made) and not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match=r"--seq-length is 32 here and 64 there"):
        prepare(made.directory, tmp_path, seq_length=32)
    with pytest.raises(ValueError, match="the tokenizer is"):
        prepare(made.directory, tmp_path, tokenizer=byte_tokenizer(words=("hello",)))


@pytest.mark.parametrize(
    ("flag", "option", "value"),
    [
        ("--data-format", "data_format", "tokenized"),
        ("--text_column", "text_column", "body"),
        ("--source_column", "source_column", "other"),
        ("--packing", "packing", "best_fit"),
        ("--upsample_long", "upsample_long", "5@10"),
        ("--mixture", "mixture", "web=1"),
        ("--interleave_chunks", "interleave_chunks", True),
        ("--domain_tag", "domain_tag", True),
    ],
)
def test_a_prepared_set_is_not_taken_for_what_it_is_not(tmp_path, flag, option, value):
    data = write_texts(
        tmp_path / "d.jsonl", ["hello there", "b" * 90], set="web", body="a", other="b"
    )
    plain = prepare(data, tmp_path, source_column="set")
    needs = {"source_column": "set", "seed": 7, "skip_bad_documents": True}
    assert prepare(plain.directory, tmp_path, **needs).directory == plain.directory
    with pytest.raises(
        ValueError, match=f"{flag} is {value} here and .* there; leave the flag out"
    ):
        prepare(plain.directory, tmp_path, **needs | {option: value})
    if option != "data_format":
        made = prepare(data, tmp_path, **needs | {option: value})
        for options in ({}, needs | {option: value}):
            assert prepare(made.directory, tmp_path, **options).directory == made.directory


def test_an_unfinished_set_is_not_trusted(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", ["hello there"])
    made = prepare(data, tmp_path)
    whole = file_bytes(made)
    (made.directory / "manifest.json").unlink()
    (made.directory / "tokens.npy").write_bytes(b"half")
    with pytest.raises(ValueError, match="holds no prepared rows"):
        open_rows(made.directory)
    assert file_bytes(prepare(data, tmp_path)) == whole


def test_a_set_of_another_format_is_refused(tmp_path):
    made = prepare(write_texts(tmp_path / "d.jsonl", ["hello there"]), tmp_path)
    manifest = json.loads((made.directory / "manifest.json").read_text())
    manifest["fingerprint"]["format_version"] = 1
    (made.directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"prepared in format 1, .*prepare it again"):
        prepare(made.directory, tmp_path)


def test_the_manifest_says_what_was_made(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", ["hello there", "b" * 90])
    prepared = prepare(data, tmp_path)
    manifest = json.loads((prepared.directory / "manifest.json").read_text())
    assert manifest["report"] == prepared.report
    assert prepared.report["documents"] == 2
    assert manifest["fingerprint"]["options"]["row_length"] == 64
    assert np.load(prepared.directory / "document_lengths.npy").tolist() == [12, 91]


# -- special tokens written in texts --------------------------------------------------------------------

HTML = ["<s>old</s> and <del>new</del></s>", "plain"]


def read_back(prepared) -> list[int]:
    return prepared.row(0).tokens[: prepared.report["document_tokens"]].tolist()


def test_special_tokens_written_in_a_text_are_text_and_counted(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", HTML)
    row = {"anchor_placement": "none", "seq_length": 64}
    prepared = prepare(data, tmp_path, **row)
    written = [BYTES.convert_tokens_to_ids(character) for character in HTML[0].replace(" ", "Ġ")]
    assert read_back(prepared)[: len(written) + 1] == [*written, EOS]
    assert BYTES.decode(read_back(prepared)) == "<s>old</s> and <del>new</del></s></s>plain</s>"
    assert prepared.report["special_tokens_as_text"] == 3
    assert prepared.report["special_tokens_parsed"] == 0
    assert not BYTES.split_special_tokens  # the tokenizer is left as it was

    parsed = prepare(data, tmp_path, **row, parse_special_tokens=True)
    ids = read_back(parsed)
    assert (
        ids[0] == BOS and ids[4] == EOS and ids.count(EOS) == 3
    )  # the text's own end is the document's
    assert parsed.report["special_tokens_parsed"] == 3
    assert parsed.directory != prepared.directory
    assert prepare(data, tmp_path, **row).directory == prepared.directory
    again = prepare(data, tmp_path, **row, parse_special_tokens=True)
    assert again.directory == parsed.directory


def test_a_long_text_with_special_tokens_is_text_in_every_window(tmp_path, monkeypatch):
    monkeypatch.setattr("anchor_context.data.documents.WINDOW", 64)
    monkeypatch.setattr("anchor_context.data.documents.OVERLAP", 16)
    text = "".join(f"<s>{i}</s>" for i in range(40))
    data = write_texts(tmp_path / "d.jsonl", [text])
    prepared = prepare(data, tmp_path, anchor_placement="none", seq_length=512)
    assert BYTES.decode(read_back(prepared)) == f"{text}</s>"
    assert prepared.report["special_tokens_as_text"] == 80


def test_rows_of_texts_without_special_tokens_are_one_set_however_they_are_read(tmp_path):
    """Also the set that an earlier version made, which parsed them, is found."""
    data = write_texts(tmp_path / "d.jsonl", ["plain", "text"])
    first = prepare(data, tmp_path)
    assert prepare(data, tmp_path, parse_special_tokens=True).directory == first.directory
    assert "parse_special_tokens" not in first.fingerprint["options"]


def test_a_set_of_before_special_tokens_were_counted_opens_and_says_so(tmp_path, capsys):
    data = write_texts(tmp_path / "d.jsonl", HTML)
    parsed = prepare(data, tmp_path, parse_special_tokens=True)
    manifest = parsed.directory / "manifest.json"
    kept = json.loads(manifest.read_text())
    for name in ("special_tokens_as_text", "special_tokens_parsed"):
        del kept["report"][name]
    manifest.write_text(json.dumps(kept))
    capsys.readouterr()
    for dataset in (data, parsed.directory):
        assert prepare(dataset, tmp_path).directory == parsed.directory
        assert "taken for" not in (said := capsys.readouterr().err) and "earlier version" in said
        assert prepare(dataset, tmp_path, parse_special_tokens=True).directory == parsed.directory
        assert not capsys.readouterr().err


def test_a_set_of_text_is_refused_where_special_tokens_are_to_be_parsed(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", HTML)
    made = prepare(data, tmp_path)
    assert prepare(made.directory, tmp_path).directory == made.directory
    with pytest.raises(ValueError, match="--parse_special_tokens is True here and False there"):
        prepare(made.directory, tmp_path, parse_special_tokens=True)
