"""Each option of the data stands once; sets and checkpoints from before that are found and resumed."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest
from data_samples import file_bytes, prepare, write_texts

from anchor_context.data import fingerprint as fingerprints
from anchor_context.data.__main__ import PrepareFlags
from anchor_context.data.fingerprint import attempt_name, fingerprint, origin, set_name
from anchor_context.data.options import DataOptions
from anchor_context.data.prepare import prepare_rows

ROOM = Path(fingerprints.__file__).parent
DATA = [{"path": "/data/a.jsonl", "size": 5, "mtime_ns": 1, "content": "c"}]

# Names in the cache as the code gave them when the options were called `row_length` and `strategy`.
BEFORE = [
    (
        {"seq_length": 64, "seed": 3},
        {"vocab_size": 300, "anchor_placement": "per_document"},
        ("rows-64-39d514b0ef9235d9", "rows-64-b32a957d65b375a7"),
    ),
    (
        {
            "seq_length": 65536,
            "data_format": "tokenized",
            "skip_bad_documents": True,
            "packing": "best_fit",
            "source_column": "set",
            "text_column": "body",
        },
        {"vocab_size": 128256, "anchor_placement": "shared"},
        ("rows-65536-ddb929d734a9585b", "rows-65536-05e275831f265628"),
    ),
    (
        {
            "seq_length": 4096,
            "source_column": "set",
            "upsample_long": "5@4096",
            "mixture": "a=1,b=3",
            "interleave_chunks": True,
            "domain_tag": True,
            "seed": 7,
        },
        {"vocab_size": 300, "anchor_placement": "none"},
        ("rows-4096-c4bffb60a5fd1cc6", "rows-4096-aa86110696f59c29"),
    ),
]
ORIGIN = {
    "--model_name_or_path (its vocabulary)": 300,
    "--seq-length": 4096,
    "--anchor_placement": "none",
    "--data-format": "raw_json",
    "--text_column": "text",
    "--source_column": "set",
    "--packing": "concat",
    "--upsample_long": "5@4096",
    "--mixture": "a=1,b=3",
    "--interleave_chunks": True,
    "--domain_tag": True,
    "--seed (of the preparation)": 7,
    "--dataset (its content)": "8415ccf148a0",
    "--model_name_or_path (its tokenizer)": "0123456789ab",
    "the format of prepared rows": 2,
}
"""Of the last one, as checkpoints of then have it."""


@pytest.fixture
def made(monkeypatch):
    """options and the rest -> the fingerprint, of a tokenizer with a made-up hash."""
    monkeypatch.setattr(fingerprints, "tokenizer_hash", lambda tokenizer: "0123456789abcdef")
    return lambda options, model: fingerprint(
        DataOptions(**options), data=DATA, tokenizer=None, **model
    )


@pytest.mark.parametrize(("options", "model", "names"), BEFORE)
def test_sets_of_before_have_their_names(made, options, model, names):
    of_now = made(options, model)
    assert (set_name(of_now), attempt_name(of_now)) == names


def test_checkpoints_of_before_say_the_same_of_their_rows(made):
    options, model, _ = BEFORE[-1]
    of_now = origin(made(options, model))
    assert list(of_now.items()) == list(ORIGIN.items())


def test_every_option_is_named_as_its_flag_and_acts():
    """`options.NAME` is read where rows are prepared: an option that nothing reads shapes nothing."""
    reads = {
        node.attr
        for node in ast.walk(ast.parse((ROOM / "prepare.py").read_text()))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "options"
    }
    names = {option.name for option in fields(DataOptions)}
    assert names - reads == set()
    assert names < {option.name for option in fields(PrepareFlags)}
    assert all(option.metadata["help"] for option in fields(DataOptions))


def test_the_cache_may_lie_in_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = write_texts(tmp_path / "d.jsonl", ["hello there"])
    prepared = prepare(data, "~/cache")
    assert prepared.directory.parent == tmp_path / "cache"
    assert file_bytes(prepared) == file_bytes(prepare(data, tmp_path / "cache"))


def test_an_unknown_placement_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--anchor_placement both is unknown; choose from"):
        prepare_rows(
            "d.jsonl",
            DataOptions(),
            tokenizer=None,
            vocab_size=1,
            anchor_placement="both",
            cache_dir=tmp_path,
        )
