"""Documents held out for validation: none of their tokens is ever trained on, and they stay the same."""

from __future__ import annotations

import json
from itertools import count

import pytest
from data_samples import BOS, BYTES, EOS, file_bytes, prepare, write_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from anchor_context.data.__main__ import main
from anchor_context.data.held_out import HELD_OUT
from anchor_context.data.rows import open_rows
from anchor_context.data.stream import check_same_stream, stream_origin


def write(path, documents: list[tuple[list[int], str]]):
    """A tokenized file of (tokens, source)."""
    lines = [
        json.dumps({"input_ids": tokens, "source": [{"end": len(tokens), "set": source}]}) + "\n"
        for tokens, source in documents
    ]
    path.write_text("".join(lines))
    return path


def held_out(prepared) -> list[list[int]]:
    lines = (prepared.directory / HELD_OUT).read_text().splitlines()
    return [json.loads(line)["input_ids"] for line in lines]


def laid(prepared) -> set[int]:
    """Every token of the rows, the targets behind their ends included."""
    return {token for i in range(len(prepared)) for token in prepared.row(i).tokens.tolist()}


@given(
    lengths=st.lists(st.integers(1, 90), min_size=4, max_size=25),
    repeated=st.lists(st.integers(0, 24), max_size=6),
    number=st.integers(1, 3),
    seed=st.integers(0, 5),
    placement=st.sampled_from(["per_document", "shared", "none"]),
    how=st.sampled_from(
        [
            {},
            {"packing": "best_fit"},
            {"upsample_long": "3@20"},
            {"mixture": "a=3,b=1", "domain_tag": True},
            {"interleave_chunks": True},
        ]
    ),
)
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
def test_no_token_of_a_held_out_document_is_ever_a_target(
    lengths, repeated, number, seed, placement, how, tmp_path_factory
):
    """Whatever is packed and sampled, and where documents repeat: every token of them differs."""
    folder, tokens = tmp_path_factory.mktemp("data"), count(1000)
    documents = [[next(tokens) for _ in range(n)] for n in lengths]
    documents = [*documents, *(documents[i % len(documents)] for i in repeated)]
    # A source that repeats once more at the end, so that none is ever held out whole.
    named = [(document, "ab"[i % 2]) for i, document in enumerate(documents)]
    named += [([next(tokens) for _ in range(5)], name) for name in "ab" for _ in range(number)]
    options = {"data_format": "tokenized", "source_column": "set", "anchor_placement": placement}
    prepared = prepare(
        write(folder / "data.jsonl", named),
        folder,
        eval_documents=number,
        seed=seed,
        **options | how,
    )
    held = held_out(prepared)
    assert len(held) == number == prepared.report["held_out_documents"]
    assert all(document in [tokens for tokens, _ in named] for document in held)
    inside = {token for document in held for token in document}
    assert not inside & laid(prepared)
    # Without sampling everything else is there.
    if not how.keys() & {"upsample_long", "mixture"}:
        others = {token for document, _ in named for token in document} - inside
        assert others <= laid(prepared)
        copies = sum(document in held for document, _ in named) - number
        assert prepared.report["held_out_copies"] == copies


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    return write_texts(path, [f"text {i} " * (i % 7 + 1) for i in range(40)], set="a.b")


def test_the_same_ones_whatever_else_shapes_the_rows(texts, tmp_path):
    """So that runs of different patterns and lengths are validated on the same documents."""
    first = prepare(texts, tmp_path / "1", eval_documents=5)
    other = prepare(
        texts, tmp_path / "2", eval_documents=5, seq_length=128, anchor_placement="none"
    )
    assert held_out(first) == held_out(other)
    again = prepare(texts, tmp_path / "3", eval_documents=5)
    assert file_bytes(first)[HELD_OUT] == file_bytes(again)[HELD_OUT]
    assert held_out(first) != held_out(prepare(texts, tmp_path / "1", eval_documents=5, seed=1))
    assert all(document[-1] == EOS and BOS not in document for document in held_out(first))


def test_the_account_tells_of_them(texts, tmp_path, capsys):
    all_of_them = prepare(texts, tmp_path).report
    report = prepare(texts, tmp_path, eval_documents=5).report
    assert report["documents"] == 35 and report["documents_read"] == 40
    assert report["documents_left_out"] == report["held_out_copies"] == 0
    tokens = report["document_tokens"] + report["held_out_tokens"]
    assert tokens == all_of_them["document_tokens"]
    assert not any("held_out" in key for key in all_of_them)


def test_a_resumed_run_keeps_them_or_is_told(texts, tmp_path):
    run = prepare(texts, tmp_path, eval_documents=5)
    checkpoint = json.loads(json.dumps(stream_origin(run, seed=0)))
    again = prepare(texts, tmp_path, eval_documents=5)
    assert again.directory == run.directory
    check_same_stream(stream_origin(again, seed=0), checkpoint)
    for other in ({"eval_documents": 4}, {}):
        with pytest.raises(ValueError, match=r"--eval_documents is \w+ here and was 5"):
            check_same_stream(stream_origin(prepare(texts, tmp_path, **other), seed=0), checkpoint)
    assert stream_origin(prepare(texts, tmp_path), seed=0).keys() == checkpoint.keys() - {
        "--eval_documents"
    }


def test_a_set_that_was_prepared_with_them(texts, tmp_path, capsys):
    BYTES.save_pretrained(tmp_path / "model")
    LlamaConfig(vocab_size=258).save_pretrained(tmp_path / "model")
    main(
        [
            *("prepare", "--dataset", str(texts), "--model_name_or_path", str(tmp_path / "model")),
            *("--seq-length", "64", "--cache_dir", str(tmp_path / "rows")),
            *("--eval_documents", "3"),
        ]
    )
    printed = capsys.readouterr().out
    assert "held_out_documents   3" in printed
    folder = printed.split("prepared rows: ")[1].split("\n")[0]
    assert len(held_out(open_rows(folder))) == 3
    assert prepare(folder, tmp_path, eval_documents=3, vocab_size=258).directory.name in folder
    with pytest.raises(ValueError, match=r"--eval_documents is 2 here and 3 there"):
        prepare(folder, tmp_path, eval_documents=2, vocab_size=258)


def test_as_data_they_are_documents_like_any_other(texts, tmp_path):
    """With the names of their sources, dots and all."""
    run = prepare(texts, tmp_path, eval_documents=5, source_column="set")
    path = run.directory / HELD_OUT
    rows = prepare(path, tmp_path, data_format="tokenized", source_column="set")
    assert rows.report["documents"] == 5
    assert rows.report["sources"].keys() == {"a.b"}
    assert rows.report["document_tokens"] == run.report["held_out_tokens"]


def test_a_source_that_would_be_left_without_documents_is_named(tmp_path):
    path = write(tmp_path / "data.jsonl", [([5, 6], "a"), ([7, 8], "a"), ([9, 10], "b")])
    options = {"data_format": "tokenized", "source_column": "set"}
    for number in (2, 3, 50):
        with pytest.raises(ValueError, match=rf"--eval_documents {number}: .*'\w' would be left"):
            prepare(path, tmp_path, eval_documents=number, **options, seed=1)


@pytest.mark.parametrize("number", [0, -1])
def test_none_is_said_by_leaving_it_out(number, texts, tmp_path):
    with pytest.raises(ValueError, match="--eval_documents"):
        prepare(texts, tmp_path, eval_documents=number)
