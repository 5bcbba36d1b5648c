"""What a model's configuration may bring: loaded whatever attention it names, or refused before training."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

import train
from anchor_context.attention.patterns import make_layout
from anchor_context.demo import tiny_llama, train_tokenizer
from anchor_context.engine import make_engine
from anchor_context.integrations import rehearsal
from anchor_context.integrations.language_model import load_language_model
from anchor_context.integrations.models import set_attention
from anchor_context.integrations.rehearsal import rehearse
from anchor_context.loss import CausalLMWithLoss, tiled_loss
from anchor_context.run import saved_model
from anchor_context.run.saved_model import Source, read_source


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    tokenizer = train_tokenizer(["a few words of text"] * 9, vocab_size=270)
    tokenizer.save_pretrained(folder)
    tiny_llama(tokenizer, hidden=32, layers=2).save_pretrained(folder)
    return folder


@pytest.fixture
def model(plain, tmp_path):
    """model(file, **entries): the folder of a model with these entries in that file of its."""

    def make(file: str = "config.json", **entries) -> Path:
        folder = shutil.copytree(plain, tmp_path / "model")
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | entries))
        return folder

    return make


def config_and_source(folder: Path) -> tuple[PretrainedConfig, Source]:
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return config, read_source(str(folder), config=config, tokenizer=tokenizer)


def start(folder: Path, monkeypatch) -> None:
    """`train.py` as far as it comes without other ranks: that is to say, to its checks."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "Accelerator", lambda **_: pytest.fail("the checks are over"))
    name, output = str(folder), str(folder / "run")
    train.main(train.Flags(model_name_or_path=name, dataset="data.jsonl", output_dir=output))


@pytest.mark.parametrize(
    ("file", "entries", "says"),
    [
        ("config.json", {"output_attentions": True}, "output_attentions: true, .* set it to false"),
        (
            "config.json",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"quantised \(gptq\).*name the model that they were made from",
        ),
        ("config.json", {"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
        (
            "config.json",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            r"quantised \(bitsandbytes\)",
        ),
        (
            "config.json",
            {"quantization_config": {"bits": 4}},
            "quantised .a method it does not name",
        ),
        ("config.json", {"pad_token_id": 99_999}, "cannot be built: .*within num_embeddings"),
        ("config.json", {"hidden_size": 33}, "cannot be loaded: .*hidden size .33."),
        ("config.json", {"eos_token_id": "</s>"}, "cannot be loaded: .*eos_token_id"),
        ("generation_config.json", {"early_stopping": 7}, "cannot be built: .*early_stopping"),
        ("generation_config.json", {"max_new_tokens": 0}, "cannot be built: .*max_new_tokens"),
    ],
)
def test_what_would_fail_after_hours_is_refused_in_one_line(
    file, entries, says, model, monkeypatch
):
    with pytest.raises(ValueError, match=says) as refused:
        start(model(file, **entries), monkeypatch)
    assert "\n" not in str(refused.value)


def test_what_only_saving_refuses_is_refused_before_training(model, tmp_path):
    """Whatever it is: here an entry that its own `save_pretrained` does not take."""
    folder = model()
    config, source = config_and_source(folder)
    rehearse(str(folder), config, source, trust_remote_code=False)
    config.temperature = 0.5
    with pytest.raises(ValueError, match="could not be saved after training: .*temperature"):
        rehearse(str(folder), config, source, trust_remote_code=False)
    assert config.temperature == 0.5, "it rehearses with a copy"


def test_a_saved_model_that_would_be_read_with_another_rope_is_refused(model, monkeypatch):
    folder = model()

    def other(config: PretrainedConfig) -> dict:
        return {"rope_parameters": config.rope_parameters | {"rope_theta": 77.0}}

    monkeypatch.setattr(saved_model, "rope_in_every_form", other)
    with pytest.raises(
        ValueError, match="would be read with the RoPE settings .*77.0.*trains with"
    ):
        rehearse(str(folder), *config_and_source(folder), trust_remote_code=False)


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_3"},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "kernels-community/flash-attn3"},
        {"return_dict": False},
        {"use_cache": False},
    ],
)
def test_a_model_trains_whatever_attention_its_config_names(entries, plain, model, tmp_path):
    folder = model(**entries)
    config, source = config_and_source(folder)
    rehearse(str(folder), config, source, trust_remote_code=False)
    losses = []
    for name in (plain, folder):
        config = AutoConfig.from_pretrained(name)
        loaded = load_language_model(
            str(name), config=config, trust_remote_code=False, dtype=torch.float32
        )
        engine = make_engine("flash", device=torch.device("cpu"), dtype=torch.float32)
        set_attention(loaded, engine.attend)
        ids = torch.arange(3, 19)[None]
        layout = make_layout(
            np.array([0, 7]),
            batch_size=1,
            row_length=16,
            pattern="intra_doc",
            anchor_placement="none",
        )
        loss, _ = CausalLMWithLoss(loaded, tiled_loss)(
            input_ids=ids, position_ids=layout.position_ids, labels=ids, layout=layout
        )
        loss.backward()
        losses.append(loss.item())
        loaded.save_pretrained(tmp_path / "saved")
    assert losses[0] == losses[1]
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert not [key for key in saved if "attn_implementation" in key]


def test_a_full_disk_under_temporary_files_is_named(model, monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rehearsal, "write_model", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = model()
    with pytest.raises(OSError, match="No space left on device; .* give another TMPDIR: ") as found:
        rehearse(str(folder), *config_and_source(folder), trust_remote_code=False)
    assert Path(found.value.filename).parent == tmp_path
