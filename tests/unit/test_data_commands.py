"""`python -m anchor_context.data prepare` and `inspect`, as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from data_samples import BYTES, prepare, write_texts
from transformers import LlamaConfig

from anchor_context.data.__main__ import main
from anchor_context.data.inspection import Inspection, describe_row
from anchor_context.data.rows import open_rows


@pytest.fixture
def model(tmp_path):
    """A model's folder as `prepare` needs it: a configuration and a tokenizer."""
    BYTES.save_pretrained(tmp_path / "model")
    LlamaConfig(vocab_size=300).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_prepare_then_inspect(tmp_path, model, capsys):
    lines = [f'{{"text": "{"ab" * n}", "set": "s{n % 2}"}}'.encode() for n in range(1, 40)]
    data = write_texts(tmp_path / "d.jsonl", lines)
    arguments = ["--dataset", str(data), "--model-name-or-path", model, "--seq-length", "128"]
    arguments += [
        "--source_column",
        "set",
        "--cache_dir",
        str(tmp_path / "c"),
        "--mixture",
        "s0=1,s1=3",
    ]
    main(["prepare", *arguments])
    made = capsys.readouterr().out
    assert "documents_read       39\n" in made
    sources = r"s1 +[\d,]+ +7\d\.\d% +5\d\.\d%\ns0 +[\d,]+ +2\d\.\d% +4\d\.\d%\n"
    assert re.search(sources, made)
    path = made.split("prepared rows: ")[1].strip()
    main(["inspect", "--rows", "1", path])  # a flag may come first
    shown = capsys.readouterr().out
    assert re.search(sources, shown)
    report = open_rows(path).report
    for words in (
        f"{report['rows']} rows of 128 tokens",
        f"cut by a row's end: {report['documents_cut']}",
        "document length (tokens)",
        "intra_doc_reset",
        "estimated speed-up of anchor over full",
        "[      0,       4)  document 0          3 targets  <s>ab</s>",
    ):
        assert words in shown
    assert (Path(path) / "inspect.png").read_bytes().startswith(b"\x89PNG")


def test_prepare_makes_the_set_that_training_looks_for(tmp_path, model):
    data = write_texts(tmp_path / "d.jsonl", ["hello"])
    arguments = ["--dataset", str(data), "--model_name_or_path", model, "--seq_length", "64"]
    cache = tmp_path / "c"
    main(["prepare", *arguments, "--cache_dir", str(cache)])
    (made,) = cache.glob("rows-*/")
    assert prepare(data, cache, vocab_size=300).directory == made


def test_a_users_mistake_is_named(tmp_path, model, capsys):
    data = write_texts(tmp_path / "d.jsonl", [b"{"])
    arguments = ["--dataset", str(data), "--model_name_or_path", model]
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: broken JSON: .* at column 2;"):
        main(["prepare", *arguments, "--cache_dir", str(tmp_path / "c")])
    with pytest.raises(ValueError, match="holds no prepared rows"):
        main(["inspect", str(tmp_path)])
    with pytest.raises(ValueError, match="required: path"):
        main(["inspect"])


def test_the_help_of_inspect_names_its_flags(capsys):
    with pytest.raises(SystemExit) as end:
        main(["inspect", "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(word in shown for word in ("--rows", "--png", "path"))


@pytest.mark.parametrize("sources", [["web"], ["web", "code"]])
def test_the_plot_of_an_inspection_tells_sources_apart_if_there_are_several(
    tmp_path, sources, monkeypatch
):
    texts = [json.dumps({"text": "ab" * n, "set": sources[n % len(sources)]}) for n in range(1, 40)]
    data = write_texts(tmp_path / "d.jsonl", [text.encode() for text in texts])
    prepared = prepare(data, tmp_path, source_column="set")
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    Inspection.of(prepared).plot(tmp_path / "plot.png")
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == ["document lengths", "patterns"] + ["sources"] * (len(sources) > 1)
    if len(sources) > 1:
        shares = {
            label.get_text(): bar.get_width()
            for label, bar in zip(
                drawn[0].axes[2].get_yticklabels(), drawn[0].axes[2].patches, strict=True
            )
        }
        tokens = prepared.report["sources"]
        assert shares == {n: pytest.approx(100 * tokens[n] / sum(tokens.values())) for n in sources}


def test_the_figures_of_an_inspection(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", ["x" * 30, "y" * 30, "z" * 60])
    prepared = prepare(data, tmp_path)  # rows of 64: 32 + 32, then 62 and 2 of padding
    inspection = Inspection.of(prepared)
    assert inspection.lengths.tolist() == [31, 31, 61] and inspection.cut_share == 0
    full = 2 * 64 * 65 / 2
    anchor = 2 * 32 * 33 / 2 + 62 * 63 / 2 + 2 * 3 / 2
    assert inspection.mask_share["full"] == 1
    assert inspection.mask_share["anchor"] == pytest.approx(anchor / full)
    assert inspection.attention_speedup == pytest.approx(full / anchor)
    assert 1 < inspection.step_speedup < 1.01  # rows so short are hardly any attention
    edges, documents, tokens = inspection.histogram()
    assert edges.tolist() == [16, 32, 64]
    assert documents.tolist() == [2, 1] and tokens.tolist() == [62, 61]


def test_a_row_is_shown_with_its_boundaries(tmp_path):
    data = write_texts(tmp_path / "d.jsonl", ["hello", "w" * 20])
    prepared = prepare(data, tmp_path, seq_length=16)
    first, second = (describe_row(prepared.row(i), BYTES).splitlines() for i in (0, 1))
    assert "[      0,       7)  document 0          6 targets  <s>hello</s>" in first[0]
    assert "[      7,      16)  document 1          9 targets" in first[1]
    assert first[2] == "  goes on in another row with 'w'"
    assert "padding" in second[-1]
    assert np.sum(["targets" in line for line in second]) == 2
