"""Sources: every format gives the same rows; whatever is wrong is named by file and line, or skipped."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from data_samples import BYTES, byte_tokenizer, file_bytes, prepare, write_texts, write_token_rows
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from anchor_context.data import documents, sources
from anchor_context.data.documents import ENDS, DocumentReader, encode_long
from anchor_context.data.sources import find_inputs

ROOT = Path(__file__).parents[2]

RECORDS = [{"text": f"document {i} " * (i + 1), "set": "ab"[i % 2]} for i in range(20)]


def written(folder, kind: str) -> str:
    """The records in one of the formats."""
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
    path = folder / f"data.{kind}"
    if kind in ("jsonl", "json"):
        path.write_bytes(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines[:100]) + gzip.compress(lines[100:]))
    elif kind == "jsonl.zst":
        path.write_bytes(zstandard.compress(lines))
    elif kind == "array.json":
        path.write_text(json.dumps(RECORDS, indent=1))
    elif kind == "parquet":
        table = pyarrow.Table.from_pylist([record | {"other": 1} for record in RECORDS])
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif kind == "saved":
        datasets.Dataset.from_list(RECORDS).save_to_disk(path)
    else:
        datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS)).save_to_disk(path)
    return str(path)


KINDS = ("json", "jsonl.gz", "jsonl.zst", "array.json", "parquet", "saved", "saved_dict")


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(tmp_path, kind):
    expected = prepare(written(tmp_path, "jsonl"), tmp_path, source_column="set")
    prepared = prepare(written(tmp_path, kind), tmp_path, source_column="set")
    assert prepared.report == expected.report
    for i in range(len(expected)):
        assert np.array_equal(prepared.row(i).tokens, expected.row(i).tokens)


def test_tokenized_rows_from_parquet(tmp_path):
    rows = [[[1, 5, 6], [1, 7]], [[1, 8, 9, 10]]]
    lines = write_token_rows(tmp_path / "d.jsonl", rows)
    table = pyarrow.Table.from_pylist([json.loads(line) for line in lines.read_text().splitlines()])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    options = {"data_format": "tokenized", "seq_length": 16}
    from_lines = prepare(lines, tmp_path, **options).row(0)
    from_table = prepare(tmp_path / "d.parquet", tmp_path, **options).row(0)
    assert np.array_equal(from_lines.tokens, from_table.tokens)
    assert from_table.starts.tolist() == [0, 3, 5, 9]


def test_many_files_and_globs_in_order(tmp_path):
    for name, text in (("b", "2"), ("a", "1"), ("c", "3")):
        write_texts(tmp_path / f"{name}.jsonl", [text])
    globbed = prepare(str(tmp_path / "*.jsonl"), tmp_path / "c", seq_length=16)
    assert BYTES.decode(globbed.row(0).tokens[:9], skip_special_tokens=True) == "123"
    assert file_bytes(prepare(tmp_path, tmp_path / "c", seq_length=16)) == file_bytes(globbed)
    with_commas = f"{tmp_path / 'c.jsonl'},{tmp_path / 'b*.jsonl'}"
    row = prepare(with_commas, tmp_path / "c", seq_length=16).row(0)
    assert BYTES.decode(row.tokens[:6], skip_special_tokens=True) == "32"
    many = [tmp_path / f"many-{number}.jsonl" for number in range(100)]
    for file in many:
        write_texts(file, ["1"])
    long = ",".join(map(str, many)).ljust(5000, ",")  # longer than a path may be
    assert prepare(long, tmp_path / "c", seq_length=16).report["documents"] == 100
    listed = prepare([tmp_path / "c.jsonl", tmp_path / "a.jsonl"], tmp_path / "c", seq_length=16)
    assert BYTES.decode(listed.row(0).tokens[:6], skip_special_tokens=True) == "31"


@pytest.mark.parametrize(
    "name", ["b.jsonl.xz", "D.JSONL", "e.txt", "f.csv", "sub/c.jsonl", "sub/deep/c.JSON.zst"]
)
def test_a_folder_never_leaves_out_data_in_silence(tmp_path, name):
    data = tmp_path / "data"
    (data / name).parent.mkdir(parents=True)
    write_texts(data / "a.jsonl", ["1"])
    (data / name).touch()
    told = f"data would leave out {name.split('/')[0]}.*a glob, such as '.*data/\\*\\.jsonl'"
    with pytest.raises(ValueError, match=told):
        prepare(data, tmp_path)
    assert prepare(data / "*.jsonl", tmp_path).report["documents"] == 1


def test_a_glob_never_leaves_out_data_in_silence(tmp_path):
    data = tmp_path / "data"
    (data / "scripts").mkdir(parents=True)
    (data / "scripts/clean.py").touch()
    write_texts(data / "a.jsonl", ["1"])
    assert prepare(data / "*", tmp_path).report["documents"] == 1
    (data / "part-2").mkdir()
    write_texts(data / "part-2/b.jsonl", ["2"])
    with pytest.raises(ValueError, match=r"leave out the folder .*part-2: .*'.*data/\*/\*\.jsonl'"):
        prepare(data / "*", tmp_path)
    for everything in (
        "*.jsonl,{}/part-2",
        "*.jsonl,{}/*/*.jsonl",
        "**/*.jsonl",
        "[!s]*/**,{}/*.jsonl",
    ):
        named = f"{data}/{everything.format(data)}"
        assert prepare(named, tmp_path).report["documents"] == 2
    (data / "c.jsonl").symlink_to("not-downloaded")
    with pytest.raises(ValueError, match="c.jsonl is a link to what is not there"):
        prepare(data / "*.jsonl", tmp_path)


def test_a_file_is_not_trained_on_twice_in_silence(tmp_path):
    (tmp_path / "sub/deep").mkdir(parents=True)
    file = tmp_path / "sub/deep/a.jsonl"
    file.write_text('{"text": "a"}\n')
    assert find_inputs(f"{tmp_path}/**/**/*.jsonl") == [str(file)]  # glob gives it three times
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    for names, also in (
        (f"{file},{file}", ""),
        (f"{tmp_path}/sub/deep,{file}", ""),
        (f"{tmp_path}/**/*.jsonl", f", also as {tmp_path}/link/deep/a.jsonl"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"names {file} twice{also}: its doc")):
            find_inputs(names)


def test_a_folder_may_hold_what_is_no_data(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_texts(data / "a.jsonl", ["1"])
    names = ("README.md", "readme.txt", "LICENSE", "_SUCCESS", "get.sh", ".x.jsonl", ".git/b.jsonl")
    for name in (*names, "scripts/clean.py"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    for row_length in (16, 32):  # the second time, prepared rows lie there too
        assert prepare(data, data / "cache", seq_length=row_length).report["documents"] == 1
        assert prepare(data, data, seq_length=row_length).report["documents"] == 1


def test_a_broken_line_is_named_by_its_column_and_an_array_by_line_and_column():
    assert sources.decode_json(b'{"text": "a" "b"}') == (
        "broken JSON: Expecting ',' delimiter at column 14"
    )
    assert sources.decode_json(b'{"text": "a\x00b"}') == (
        "broken JSON: Invalid control character at column 12"
    )
    assert sources.decode_json(b'[\n{"text": 1,}]').endswith(" at line 2, column 12")


def test_columns_by_name_also_inside_an_object(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"body": {"raw": "hello"}, "meta": {"set": "web"}}\n')
    prepared = prepare(data, tmp_path, text_column="body.raw", source_column="meta.set")
    assert prepared.report["sources"] == {"web": 6}


def test_tokenized_documents_name_their_source(tmp_path):
    row = {"input_ids": [5, 6, 7], "source": [{"end": 1, "set": "a"}, {"end": 3, "set": "b"}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    prepared = prepare(tmp_path / "d.jsonl", tmp_path, data_format="tokenized", source_column="set")
    assert prepared.report["sources"] == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent.jsonl", "absent.jsonl: no such file"),
        ("*.jsonl", "matches no file"),
        ("notes.txt", r'has none of the suffixes .jsonl.*; write its texts .* \{"text": "…"\}'),
        ("folder", "no file in it ends in"),
    ],
)
def test_a_dataset_that_is_not_there(tmp_path, name, says):
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=says):
        prepare(tmp_path / name, tmp_path / "c")


def test_an_unknown_hub_name_is_an_error_not_a_crash(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with pytest.raises(ValueError, match="some/name is neither a file nor a data set"):
        prepare("some/name", tmp_path)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_record_nested_too_deep_for_a_process_is_named(tmp_path, num_proc):
    nested = "[" * 900 + "]" * 900
    array = tmp_path / "d.json"
    array.write_text('[{"text": "hello"}, {"text": "jello", "more": %s}]' % nested)  # noqa: UP031
    with pytest.raises(ValueError, match="d.json, row 2: nested more than 200 levels deep"):
        prepare(array, tmp_path / "c", num_proc=num_proc)
    kept = prepare(array, tmp_path / "c", num_proc=num_proc, skip_bad_documents=True)
    assert (kept.report["documents"], kept.report["skipped_documents"]) == (1, 1)


def test_a_hub_data_set_is_read_at_the_commit_that_the_fingerprint_names(tmp_path, monkeypatch):
    texts = {"sha-1": "hello", "sha-2": "jello"}
    newest = "sha-1"

    def load_dataset(name, *, streaming, revision=None):
        assert name == "some/name" and streaming
        table = datasets.Dataset.from_dict({"text": [texts[revision or "sha-2"]]})
        return {"train": table.to_iterable_dataset()}

    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda *_: SimpleNamespace(sha=newest)
    )
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    first = prepare("some/name", tmp_path)
    assert BYTES.decode(first.row(0).tokens[1:6]) == "hello"  # the hub is at sha-2 by now
    assert first.manifest["fingerprint"]["data"] == [{"hub": "some/name", "commit": "sha-1"}]
    newest = "sha-2"
    second = prepare("some/name", tmp_path)
    assert BYTES.decode(second.row(0).tokens[1:6]) == "jello"
    assert second.directory != first.directory


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_an_empty_data_set(tmp_path, content):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="holds no document"):
        prepare(tmp_path / "d.jsonl", tmp_path)


# -- bad records ---------------------------------------------------------------------------------------

BAD_TEXTS = [
    (b'{"txet": "a"}', r"no `text`, only \['txet'\]"),
    (b'{"text": 5}', "`text` is a number, not a string"),
    (b'{"text": null}', "`text` is null"),
    (b'{"text": ["a"]}', "`text` is a list"),
    (b'{"text": ""}', "`text` is empty"),
    (b'{"text": "a"', "broken JSON"),
    (b'{"text": "a\x00b"}', "broken JSON"),
    (b"\x00\x00\x00", "broken JSON"),
    (b'{"text": "\xff"}', "broken JSON"),
    (b'{"text": "a\\ud800"}', "half a character"),
    (b'{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
    (b'["text"]', "a list, not an object"),
    (b"[" * 100_000, "broken JSON"),
]


@pytest.mark.parametrize(("line", "says"), BAD_TEXTS, ids=[says for _, says in BAD_TEXTS])
def test_a_bad_text_is_named_or_skipped(tmp_path, line, says):
    data = write_texts(tmp_path / "d.jsonl", ["good", "", line, "fine"])
    data.write_bytes(data.read_bytes().replace(b'{"text": ""}\n', b"\n", 1))  # a blank line counts
    with pytest.raises(ValueError, match=rf"d\.jsonl, line 3: .*{says}.*--skip_bad_documents"):
        prepare(data, tmp_path)
    prepared = prepare(data, tmp_path, skip_bad_documents=True)
    assert prepared.report["skipped_documents"] == 1 and prepared.report["documents"] == 2
    skipped = json.loads((prepared.directory / "skipped.jsonl").read_text())
    assert skipped["file"] == str(data) and skipped["line"] == 3
    assert BYTES.decode(prepared.row(0).tokens[:11], skip_special_tokens=True) == "goodfine"


BAD_ROWS = [
    (
        {"input_ids": [5, 999], "source": [{"end": 2}]},
        "token id 999 at index 1 is outside the model's",
    ),
    ({"input_ids": [5, -1], "source": [{"end": 2}]}, "token id -1 at index 1"),
    ({"input_ids": [5, 2**40], "source": [{"end": 2}]}, "outside every vocabulary"),
    ({"input_ids": [5, 2**70], "source": [{"end": 2}]}, "numbers beyond 64 bits"),
    ({"input_ids": [5, True], "source": [{"end": 2}]}, "'True' at index 1"),
    ({"input_ids": [5, 6.5], "source": [{"end": 2}]}, "'6.5' at index 1"),
    ({"input_ids": [[5], [6, 7]], "source": [{"end": 2}]}, "whole numbers"),
    ({"input_ids": "56", "source": [{"end": 2}]}, "`input_ids` is a string"),
    ({"input_ids": [], "source": [{"end": 2}]}, "`input_ids` is empty"),
    ({"ids": [5]}, "no `input_ids`"),
    ({"input_ids": [5, 6]}, "no `source`"),
    ({"input_ids": [5, 6], "source": []}, r"\"source\": \[\{\"end\": 2\}\]"),
    ({"input_ids": [5, 6], "source": [{"stop": 2}]}, "no whole number `end`"),
    ({"input_ids": [5, 6], "source": [{"end": 2}, {"end": 1}]}, "must increase: entry 1 ends at 1"),
    ({"input_ids": [5, 6], "source": [{"end": 0}, {"end": 2}]}, "must increase: entry 0"),
    ({"input_ids": [5, 6], "source": [{"end": 1}, {"end": 3}]}, "ends at 3, but the row has 2"),
    ({"input_ids": [5, 6, 7], "source": [{"end": 1}]}, "the last 2 belong to no document"),
]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS, ids=[says for _, says in BAD_ROWS])
def test_a_bad_token_row_is_named_or_skipped(tmp_path, row, says):
    good = write_token_rows(tmp_path / "d.jsonl", [[[5, 6]], [[7]]]).read_text().splitlines()
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join([good[0], json.dumps(row), good[1]]))
    options = {"data_format": "tokenized", "vocab_size": 100}
    with pytest.raises(ValueError, match=rf"d\.jsonl, line 2: .*{says}"):
        prepare(data, tmp_path, **options)
    report = prepare(data, tmp_path, skip_bad_documents=True, **options).report
    assert (report["skipped_documents"], report["documents"]) == (1, 2)


def test_a_model_with_a_smaller_vocabulary_than_the_tokenizer(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", ["ok", "~~"])
    with pytest.raises(ValueError, match=r"line 1: token id \d+ .* vocabulary of 50"):
        prepare(data, tmp_path, vocab_size=50)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_file_that_breaks_off_is_no_quiet_end(tmp_path, kind, share):
    records = [{"text": os.urandom(40).hex()} for _ in range(5000)]
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    packed = gzip.compress(lines) if kind == "jsonl.gz" else zstandard.compress(lines)
    data = tmp_path / f"d.{kind}"
    data.write_bytes(packed[: int(len(packed) * share)])
    with pytest.raises(ValueError, match=rf"d\.{kind}, line \d+: the file cannot be read beyond"):
        prepare(data, tmp_path)
    whole = write_texts(tmp_path / "whole.jsonl", ["at the end"])
    with pytest.raises(ValueError, match="pass --skip_bad_files to go on without the rest"):
        prepare([data, whole], tmp_path, skip_bad_documents=True)
    kept = prepare([data, whole], tmp_path, skip_bad_files=True)
    report = kept.report
    assert (report["skipped_documents"], report["skipped_files"]) == (0, 1)
    assert report["documents"] > 1
    (entry,) = map(json.loads, (kept.directory / "skipped.jsonl").read_text().splitlines())
    assert entry["file"] == str(data) and entry["rest_of_file"] is True


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, "other") for name in ("d.parquet", "d.jsonl.gz", "d.jsonl.zst", "d.json")),
        *((name, "empty") for name in ("d.parquet", "d.jsonl.gz", "d.json.zst")),
        ("d.jsonl", "gzip"),
        ("d.json", "zstd"),
    ],
)
def test_a_file_that_cannot_be_opened_is_no_bad_document(tmp_path, name, content):
    lines = b'{"text": "1"}\n' * 9
    contents = {"other": b"[ nothing of the kind", "empty": b""}
    contents |= {"gzip": gzip.compress(lines), "zstd": zstandard.compress(lines)}
    (tmp_path / name).write_bytes(contents[content])
    good = write_texts(tmp_path / "good.jsonl", ["good"])
    with pytest.raises(ValueError, match=f"{name}, .*--skip_bad_files"):
        prepare([tmp_path / name, good], tmp_path, skip_bad_documents=True)
    report = prepare([tmp_path / name, good], tmp_path, skip_bad_files=True).report
    assert (report["documents"], report["skipped_documents"], report["skipped_files"]) == (1, 0, 1)


def test_a_zstd_window_above_128_mib_is_read(tmp_path):
    settings = zstandard.ZstdCompressionParameters(window_log=28)
    frames = []
    for text in ("one", "two" * 100_000):  # `cat a.zst b.zst`, and more than a buffer
        packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
        line = json.dumps({"text": text}).encode() + b"\n"
        frames.append(packer.compress(line) + packer.flush())
        assert zstandard.get_frame_parameters(frames[-1]).window_size == 1 << 28
    (tmp_path / "d.jsonl.zst").write_bytes(b"".join(frames))
    prepared = prepare(tmp_path / "d.jsonl.zst", tmp_path, seq_length=1024)
    assert prepared.report["document_tokens"] == 3 + 300_000 + 2


@pytest.mark.parametrize("how", ["lines", "parquet", "save_to_disk"])
@pytest.mark.parametrize("column", ["source", "source, as `datasets` turns it", *ENDS[1:]])
def test_tokenised_rows_as_other_projects_write_them(tmp_path, how, column):
    rows = [[[1, 5, 6], [1, 7]], [[1, 8, 9, 10]]]
    options = {"data_format": "tokenized", "seq_length": 16}
    expected = prepare(write_token_rows(tmp_path / "d.jsonl", rows), tmp_path, **options).row(0)
    ends = {
        "source": lambda lengths: [{"end": sum(lengths[: i + 1])} for i in range(len(lengths))],
        "source, as `datasets` turns it": lambda lengths: {"end": np.cumsum(lengths).tolist()},
        "seq_lengths": lambda lengths: lengths,
        "position_ids": lambda lengths: [i for n in lengths for i in range(n)],
    }
    written = [
        {
            "input_ids": [token for document in row for token in document],
            "attention_mask": [1] * sum(map(len, row)),
            column.split(",")[0]: ends[column]([len(document) for document in row]),
        }
        for row in rows
    ]
    data = tmp_path / {"lines": "e.jsonl", "parquet": "e.parquet", "save_to_disk": "e"}[how]
    if how == "lines":
        data.write_text("".join(json.dumps(row) + "\n" for row in written))
    elif how == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(written), data)
    else:
        datasets.Dataset.from_list(written).save_to_disk(data)
    row = prepare(data, tmp_path, **options).row(0)
    assert np.array_equal(row.tokens, expected.tokens)
    assert np.array_equal(row.starts, expected.starts)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {},
            r"no `source`, .* only \['input_ids', 'labels'\].*`seq_lengths` \[3\]",
        ),
        ({"seq_lengths": [1, 1]}, "ends at 2, but the row has 3 tokens"),
        ({"seq_lengths": [1, 0, 2]}, "must increase"),
        ({"seq_lengths": []}, "`seq_lengths` is empty"),
        ({"position_ids": [0, 1, 1]}, "`position_ids` do not count"),
        ({"position_ids": [1, 2, 3]}, "`position_ids` do not count"),
        ({"position_ids": [1, 0, 1]}, "`position_ids` do not count"),
        ({"source": {"end": [1, 3], "set": ["web"]}}, "`source` has lists of different lengths"),
        ({"position_ids": [0, 1]}, "ends at 2, but the row has 3 tokens"),
    ],
)
@pytest.mark.parametrize("how", ["lines", "parquet"])
def test_tokenised_rows_that_do_not_say_their_documents_are_refused(tmp_path, how, more, says):
    """Not with advice that would make one document of several."""
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], **more}
    data = tmp_path / ("d.jsonl" if how == "lines" else "d.parquet")
    if how == "lines":
        data.write_text(json.dumps(row) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), data)
    with pytest.raises(ValueError, match=says):
        prepare(data, tmp_path, data_format="tokenized")


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({"labels": [-100, -100, 7]}, "`labels` leaves 2 of the row's 3 tokens out .* index 0"),
        ({"attention_mask": [1, 1, 0]}, "`attention_mask` leaves 1 .* index 2"),
        ({"assistant_masks": [True, False, True]}, "`assistant_masks` leaves 1 .* index 1"),
        ({"completion_mask": [1, 1]}, "`completion_mask` is not a list of 3"),
        ({"loss_mask": "111"}, "`loss_mask` is not a list of 3"),
        ({"labels": [5, 6, 7], "attention_mask": [1, 2, 2], "loss_mask": None}, None),
    ],
)
@pytest.mark.parametrize("how", ["lines", "parquet"])
def test_rows_whose_tokens_are_not_all_to_be_learnt_are_refused(tmp_path, how, masks, says):
    """Padding, and the prompts of instructions, would be learnt like the rest."""
    row = {"input_ids": [5, 6, 7], "seq_lengths": [1, 2], **masks}
    data = tmp_path / ("d.jsonl" if how == "lines" else "d.parquet")
    if how == "lines":
        data.write_text(json.dumps(row) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), data)
    with pytest.raises(ValueError, match=says) if says else nullcontext():
        assert prepare(data, tmp_path, data_format="tokenized").report["document_tokens"] == 3


def test_a_half_read_parquet_file_leaves_no_thread_to_abort_the_process(tmp_path):
    """In a process of its own, for Arrow keeps its threads."""
    texts = [f"text {i} " * 50 for i in range(20_000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet")
    script = """\
import sys
from contextlib import nullcontext
import psutil
from anchor_context.data.sources import read_portions
before = psutil.Process().num_threads()
unit = next(units := read_portions([sys.argv[1]], ["text"]))
assert 0 < len(unit[0].records) < 20_000
print(psutil.Process().num_threads() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "d.parquet")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_reader_is_closed_before_an_early_end_is_told(tmp_path, monkeypatch, error):
    """Not when the interpreter ends: the traceback keeps what it was doing alive until then."""
    closed = []

    def read(name, columns):
        try:
            yield {"text": "good"}
            yield {"text": 5}
        finally:
            closed.append(name)

    def fails(self, unit):
        raise error("early")

    monkeypatch.setattr(sources, "_parquet_rows", read)
    monkeypatch.setattr(sources, "PORTION_BYTES", 1)
    monkeypatch.setattr(DocumentReader, "__call__", fails)
    (tmp_path / "d.parquet").touch()
    with pytest.raises(error, match="early"):
        prepare(tmp_path / "d.parquet", tmp_path)
    assert closed == [str(tmp_path / "d.parquet")]


def test_a_parquet_column_that_occurs_twice_is_named(tmp_path):
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"]
    )
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(ValueError, match="the column 'text' occurs twice"):
        prepare(tmp_path / "d.parquet", tmp_path)


def test_a_broken_parquet_file_is_named(tmp_path):
    data = tmp_path / "d.parquet"
    data.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"d\.parquet, row 1: the file cannot be read"):
        prepare(data, tmp_path)


@pytest.mark.parametrize("inside", [False, True], ids=["a text", "a text inside an object"])
def test_a_parquet_text_that_is_not_utf8_is_named_or_skipped(tmp_path, inside):
    texts = pyarrow.array([b"good", b"\xff\xfe", b"fine"], pyarrow.binary()).view(pyarrow.string())
    if inside:
        texts = pyarrow.StructArray.from_arrays([texts], ["raw"])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet")
    options = {"text_column": "text.raw" if inside else "text"}
    with pytest.raises(ValueError, match=r"d\.parquet, row 2: .*utf-8.*--skip_bad_documents"):
        prepare(tmp_path / "d.parquet", tmp_path, **options)
    prepared = prepare(tmp_path / "d.parquet", tmp_path, skip_bad_documents=True, **options)
    assert prepared.report["skipped_documents"] == 1
    assert BYTES.decode(prepared.row(0).tokens[:11], skip_special_tokens=True) == "goodfine"


@pytest.mark.parametrize("data_format", ["raw_json", "tokenized"])
def test_half_a_character_in_a_source_is_named_or_skipped(tmp_path, data_format):
    data = tmp_path / "d.jsonl"
    for name in ("web", "\ud800x"):
        row = {"input_ids": [5, 6], "source": [{"end": 2, "set": name}]}
        record = {"text": "ab", "set": name} if data_format == "raw_json" else row
        with data.open("a") as file:
            file.write(json.dumps(record) + "\n")
    options = {"source_column": "set", "domain_tag": True, "data_format": data_format}
    with pytest.raises(ValueError, match=r"d\.jsonl, line 2: `set` has half a character"):
        prepare(data, tmp_path, **options)
    report = prepare(data, tmp_path, skip_bad_documents=True, **options).report
    assert report["skipped_documents"] == 1 and list(report["sources"]) == ["web"]


def test_sources_that_differ_by_a_nul_stay_apart(tmp_path):
    lines = [b'{"text": "ab", "set": "web"}', b'{"text": "abc", "set": "web\\u0000"}']
    data = write_texts(tmp_path / "d.jsonl", lines)
    assert prepare(data, tmp_path, source_column="set").report["sources"] == {"web": 3, "web\0": 4}


def test_columns_that_differ_between_files(tmp_path):
    write_texts(tmp_path / "a.jsonl", ["fine"])
    (tmp_path / "b.jsonl").write_text('{"content": "other"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: no `text`, only \['content'\]"):
        prepare(str(tmp_path / "*.jsonl"), tmp_path / "c")
    table = pyarrow.Table.from_pylist([{"content": "other"}])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet, row 1: no `text`, only \['content'\]"):
        prepare(tmp_path / "c.parquet", tmp_path / "c")


def test_a_bad_record_in_an_array_is_named(tmp_path):
    data = tmp_path / "d.json"
    data.write_text('[{"text": "a"}, {"text": "b", "text": "c"}, 7, {"text": 1}]')
    with pytest.raises(ValueError, match=r"d\.json, row 2: the key 'text' occurs twice"):
        prepare(data, tmp_path)
    report = prepare(data, tmp_path, skip_bad_documents=True).report
    assert (report["skipped_documents"], report["documents"]) == (3, 1)


def test_a_byte_order_mark_a_nul_and_windows_line_ends_are_text(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_bytes(b'\xef\xbb\xbf{"text": "a\\u0000"}\r\n{"text": "b"}\r\n')
    prepared = prepare(data, tmp_path, seq_length=8)
    assert prepared.report["document_tokens"] == 5


def test_a_tokenizers_own_truncation_and_padding_lose_nothing(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    data = write_texts(tmp_path / "d.jsonl", ["a long text", "b"])
    assert prepare(data, tmp_path, tokenizer=tokenizer).report["document_tokens"] == 14


def test_a_tokenizer_without_a_fast_backend(tmp_path):
    tokenizer = ByT5Tokenizer()  # plain Python; no BOS, EOS is 1, a byte b is b + 3
    data = write_texts(tmp_path / "d.jsonl", ["ab", "c"])
    first = prepare(data, tmp_path, tokenizer=tokenizer, seq_length=8)
    assert first.row(0).tokens[:7].tolist() == [1, 100, 101, 1, 1, 102, 1]
    assert prepare(data, tmp_path, tokenizer=ByT5Tokenizer(), seq_length=8).directory == (
        first.directory
    )
    with_more = ByT5Tokenizer(extra_ids=3)
    assert prepare(data, tmp_path, tokenizer=with_more, seq_length=8).directory != first.directory


# -- long texts ----------------------------------------------------------------------------------------


def trained_tokenizer(pre_tokenizer) -> PreTrainedTokenizerFast:
    """A BPE trained on this file; without a pre-tokenizer that splits, a text is one word."""
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["?", "</s>"], show_progress=False)
    tokenizer.train([__file__], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="?")


@pytest.mark.parametrize(
    "pre_tokenizer",
    [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Metaspace(split=False)],
    ids=["words", "one word"],
)
def test_a_long_text_through_windows_gives_the_same_tokens(pre_tokenizer):
    tokenizer = trained_tokenizer(pre_tokenizer)
    text = Path(__file__).read_text() * 2 + "\n\n  é𝔘\t" * 300
    expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    calls = []

    def recorded(text, **options):
        calls.append(len(text))
        return tokenizer(text, **options)

    recorded.is_fast, recorded.split_special_tokens = True, False
    assert encode_long(recorded, text, window=2000, overlap=400).tolist() == expected
    assert max(calls) == 2000  # it never fell back to the whole text


def test_windows_that_do_not_agree_fall_back_to_the_whole_text():
    tokenizer = Tokenizer(models.WordLevel({"111": 0, "?": 1, "</s>": 2}, unk_token="?"))
    split = pre_tokenizers.Split(
        Regex(r"\d{1,3}"), "isolated"
    )  # groups of three from the first digit
    tokenizer.pre_tokenizer = split
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="?")
    expected = fast("1" * 3000, add_special_tokens=False)["input_ids"]
    assert expected == [0] * 1000
    assert encode_long(fast, "1" * 3000, window=1000, overlap=100).tolist() == expected


def test_texts_longer_than_a_window_are_prepared_alike(tmp_path, monkeypatch):
    data = write_texts(tmp_path / "d.jsonl", ["short", "a much longer text " * 200, "short"])
    whole = prepare(data, tmp_path / "whole")
    monkeypatch.setattr(documents, "WINDOW", 500)
    monkeypatch.setattr(documents, "OVERLAP", 100)
    assert file_bytes(prepare(data, tmp_path / "windows")) == file_bytes(whole)


def test_units_depend_on_the_data_alone_and_span_small_files(tmp_path, monkeypatch):
    names = [str(write_texts(tmp_path / f"{i}.jsonl", ["x" * 100] * 3)) for i in range(10)]
    assert len(list(sources.read_portions(names, ["text"]))) == 1
    monkeypatch.setattr(sources, "PORTION_BYTES", 1000)
    units = list(sources.read_portions(names, ["text"]))
    assert 4 <= len(units) <= 8
    read = [(s.file, s.first + i) for unit in units for s in unit for i in range(len(s.records))]
    assert read == [(name, line) for name in names for line in (1, 2, 3)]
