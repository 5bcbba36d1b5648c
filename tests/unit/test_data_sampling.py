"""Sampling: long documents within their source, sources by weight, nothing else changed."""

from __future__ import annotations

import numpy as np
import pytest
from data_samples import file_bytes, prepare, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_context.data.sampling import Upsampling, copies, laying_order, parse_mixture


def a_set(documents: int = 20_000, seed: int = 0):
    """Log-normal lengths of three sources, one of them with hardly any long documents."""
    rng = np.random.default_rng(seed)
    source_ids = rng.choice(3, documents, p=[0.6, 0.3, 0.1])
    median = np.array([300, 1300, 3000])[source_ids]
    lengths = np.maximum(1, median * rng.lognormal(0, 1, documents)).astype(np.int64)
    return lengths, source_ids, ["web", "code", "books"]


def shares(lengths, source_ids, times):
    tokens = np.bincount(source_ids, weights=lengths * times)
    return tokens / tokens.sum()


def test_long_documents_come_factor_times_as_often_and_no_source_grows():
    lengths, source_ids, names = a_set()
    times = copies(lengths, source_ids, names, upsampling=Upsampling(5, 4096), mixture=None, seed=0)
    before, after = (shares(lengths, source_ids, t) for t in (np.ones_like(lengths), times))
    assert np.abs(after / before - 1).max() < 0.01
    assert abs((lengths * times).sum() / lengths.sum() - 1) < 0.01
    for source in range(3):
        long = (lengths > 4096) & (source_ids == source)
        short = (lengths <= 4096) & (source_ids == source)
        rate_long = (lengths * times)[long].sum() / lengths[long].sum()
        rate_short = (lengths * times)[short].sum() / lengths[short].sum()
        assert rate_long / rate_short == pytest.approx(5, rel=0.02)
    assert times.min() == 0 and times.max() >= 2  # room was made


@settings(max_examples=50)
@given(
    factor=st.floats(1, 20),
    tokens=st.integers(1, 20_000),
    weights=st.none() | st.lists(st.integers(1, 9), min_size=3, max_size=3),
)
def test_shares_are_exact_to_within_a_document(factor, tokens, weights):
    lengths, source_ids, names = a_set(2000)
    mixture = weights and {n: w / sum(weights) for n, w in zip(names, weights, strict=True)}
    times = copies(
        lengths,
        source_ids,
        names,
        upsampling=Upsampling(factor, tokens),
        mixture=mixture,
        seed=3,
    )
    wanted = shares(lengths, source_ids, np.ones_like(lengths))
    if mixture:
        wanted = np.array([mixture[name] for name in names])
    laid = np.bincount(source_ids, weights=lengths * times, minlength=3)
    for source in range(3):
        longest = lengths[source_ids == source].max()
        assert abs(laid[source] - wanted[source] * lengths.sum()) <= 2 * longest


def test_copies_of_a_document_lie_rounds_apart():
    assert laying_order(np.array([1, 3, 0, 2])).tolist() == [0, 1, 3, 1, 3, 1]
    assert laying_order(np.array([0, 0])).tolist() == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a=1,b", "'b' is not source=weight"),
        ("a=1,a=2", "again"),
        ("a=0", "weight 0"),
        ("a=x", "'a=x'"),
    ],
)
def test_a_mixture_that_cannot_be_read(text, says):
    with pytest.raises(ValueError, match=says):
        parse_mixture(text)


def test_a_mixture_names_exactly_the_sources_of_the_data(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", [b'{"text": "aa", "set": "web"}'])
    with pytest.raises(ValueError, match=r"names \['code'\], the data have the sources \['web'\]"):
        prepare(data, tmp_path, source_column="set", mixture="code=1")


def test_prepared_rows_report_the_sampling_and_the_seed_decides(tmp_path):
    rng = np.random.default_rng(0)
    lines = [
        f'{{"text": "{"x" * int(n)}", "set": "{"ab"[i % 2]}"}}'.encode()
        for i, n in enumerate(rng.lognormal(4, 1, 300))
    ]
    data = write_texts(tmp_path / "d.jsonl", lines)
    options = {"source_column": "set", "upsample_long": "5@100", "mixture": "a=3,b=1"}
    report = (first := prepare(data, tmp_path / "a", **options)).report
    tokens = report["sources"]
    assert tokens["a"] / (tokens["a"] + tokens["b"]) == pytest.approx(0.75, abs=0.01)
    read = {name: share["before"] for name, share in report["source_shares"].items()}
    lengths = np.array([len(line) - len('{"text": "", "set": "a"}') + 1 for line in lines])
    assert read == {
        "a": lengths[::2].sum() / lengths.sum(),
        "b": lengths[1::2].sum() / lengths.sum(),
    }
    assert report["source_shares"]["a"]["after"] == tokens["a"] / (tokens["a"] + tokens["b"])
    assert report["documents_read"] == 300 and 0 < report["documents_left_out"] < 300
    assert report["document_tokens"] == sum(tokens.values())
    assert file_bytes(prepare(data, tmp_path / "b", **options)) == file_bytes(first)
    other = prepare(data, tmp_path / "a", seed=1, **options)
    assert file_bytes(other)["tokens.npy"] != file_bytes(first)["tokens.npy"]


def test_a_share_that_a_huge_document_moves_is_told_once(tmp_path, capfd):
    def texts(source: str, *, length: int, count: int) -> list[bytes]:
        return [f'{{"text": "{"x" * length}", "set": "{source}"}}'.encode()] * count

    options = {"source_column": "set", "upsample_long": "5@100"}
    web = texts("web", length=50, count=400) + texts("web", length=200, count=400)
    prepare(write_texts(tmp_path / "fine.jsonl", web), tmp_path, **options)
    assert "sampling moved" not in capfd.readouterr().err
    # The huge one should come 1.3 times, to make room for which most of the short ones go.
    books = texts("books", length=4000, count=1) + texts("books", length=90, count=20)
    prepared = prepare(write_texts(tmp_path / "moved.jsonl", web + books), tmp_path, **options)
    share = prepared.report["source_shares"]["books"]
    assert share["after"] < 0.9 * share["before"]
    warning = f"books has {share['after']:.1%} of the tokens instead of {share['before']:.1%}"
    assert capfd.readouterr().err.count(warning) == 1
