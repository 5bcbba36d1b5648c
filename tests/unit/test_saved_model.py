"""The folder of a saved model: the source's, with other weights, in the forms that older libraries read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from anchor_context.demo import train_tokenizer
from anchor_context.rope.length import fix_frequencies
from anchor_context.rope.scaling import apply_rope_settings
from anchor_context.run import saved_model
from anchor_context.run.saved_model import read_source, saved_config, write_model

OWN, ROW = 64, 256  # the source's length, and the run's
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": OWN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
FIXED_LONGROPE = {"short_factor": LONGROPE["long_factor"], "long_factor": LONGROPE["long_factor"]}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def older_config(model_type: str, **settings) -> dict:
    """A config.json as transformers 4 wrote it."""
    name = {"qwen3_moe": "Qwen3Moe", "gpt_neox": "GPTNeoX"}.get(model_type, model_type.title())
    return {
        **SIZES,
        "architectures": [f"{name}ForCausalLM"],
        "model_type": model_type,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.6",
        "of_a_server": {"nobody": "knows"},
        "_name_or_path": "/home/somebody/models/x",
        **settings,
    }


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder with a tokenizer and its like; config.json is for each test to write."""
    folder = tmp_path / "machine" / "source"
    train_tokenizer(["a text to learn from"] * 9, vocab_size=300).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "of_a_server": 1}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))  # not as transformers would
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    (folder / "modeling_own.py").write_text("# code of the model's own\n")
    (folder / "tokenizer.vocabulary").mkdir()
    return folder


def train_and_save(source: Path, saved: Path, **flags) -> PreTrainedModel:
    """What train.py does to a model, its steps left out."""
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    found = read_source(str(source), config=config, tokenizer=tokenizer)
    apply_rope_settings(config, row_length=ROW, **flags)
    fix_frequencies(config, row_length=ROW)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    write_model(saved, model, weights, found)
    return model


def rope_scaling(rope_type: str, **settings) -> dict:
    return {"rope_type": rope_type, **settings}


TABLE = {  # a source's settings, the run's flags -> what config.json says in the older form
    "theta": (older_config("llama"), {}, {"rope_theta": 5e5, "rope_scaling": None}),
    "llama3": (
        older_config(
            "llama",
            rope_scaling=rope_scaling(
                "llama3", factor=8.0, original_max_position_embeddings=32, **LLAMA3
            ),
        ),
        {"rope_theta": 1e6},
        {
            "rope_theta": 1e6,
            "rope_scaling": rope_scaling(
                "llama3", factor=8.0, original_max_position_embeddings=32, **LLAMA3
            ),
        },
    ),
    "linear": (
        older_config("mistral"),
        {"rope_scaling_type": "linear", "rope_scaling_factor": 4},
        {"rope_theta": 5e5, "rope_scaling": rope_scaling("linear", factor=4.0)},
    ),
    "yarn": (
        older_config("qwen3", head_dim=8),
        {"rope_scaling_type": "yarn", "rope_scaling_factor": 4},
        {
            "rope_theta": 5e5,
            "rope_scaling": rope_scaling("yarn", factor=4.0, original_max_position_embeddings=OWN),
        },
    ),
    "dynamic": (
        older_config("llama", rope_theta=1e4),
        {"rope_scaling_type": "dynamic", "rope_scaling_factor": 2},
        {"rope_theta": 1e4 * (2 * ROW / OWN - 1) ** (8 / 6), "rope_scaling": None},
    ),
    "longrope of Phi-3": (
        older_config(
            "phi3",
            rope_scaling=LONGROPE,
            original_max_position_embeddings=OWN,
            max_position_embeddings=ROW,
        ),
        {},
        {
            "rope_theta": 5e5,
            "rope_scaling": LONGROPE | FIXED_LONGROPE,
            "original_max_position_embeddings": OWN,
        },
    ),
    "partly rotated": (
        older_config("phi", partial_rotary_factor=0.5),
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "partial_rotary_factor": 0.5},
    ),
    "GPT-NeoX's own names": (
        older_config("gpt_neox", rope_theta=1e4, rotary_emb_base=1e4, rotary_pct=0.5),
        {"rope_theta": 1e6, "rope_scaling_type": "linear", "rope_scaling_factor": 4},
        {
            "rotary_emb_base": 1e6,
            "rotary_pct": 0.5,
            "rope_scaling": rope_scaling("linear", factor=4.0),
        },
    ),
    "by kind of layer": (
        older_config("gemma3_text", rope_local_base_freq=2e4, head_dim=8),
        {},
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": None},
    ),
    "by kind of layer, the full ones by flags": (
        older_config("gemma3_text", rope_local_base_freq=2e4, head_dim=8),
        {"rope_theta": 1e6, "rope_scaling_type": "linear", "rope_scaling_factor": 4},
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 2e4,
            "rope_scaling": rope_scaling("linear", factor=4.0),
        },
    ),
}


def test_a_base_that_an_older_library_would_take_for_another_stops_it(source, tmp_path):
    """OLMo 3: transformers 4.57 has one base, and gives it to the layers with a window, too."""
    config = older_config(
        "olmo3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    )
    for number, (flags, theta) in enumerate([({}, 5e5), ({"rope_theta": 1e6}, None)]):
        (source / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
        train_and_save(source, tmp_path / str(number), **flags)
        written = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert written["rope_theta"] == theta and "rope_local_base_freq" not in written
        read = AutoConfig.from_pretrained(tmp_path / str(number))
        assert read.rope_parameters["sliding_attention"]["rope_theta"] == 5e5
        assert read.rope_parameters["full_attention"]["rope_theta"] == (theta or 1e6)


@pytest.mark.parametrize("flags", [{}, {"rope_theta": 7e5, "rope_scaling_type": "linear"}])
@pytest.mark.parametrize("family", ["gemma4_text", "laguna", "mellum", "mimo_v2_flash"])
def test_a_family_that_has_no_older_form_keeps_the_rope_of_each_kind_of_layer(
    family, flags, tmp_path
):
    """Beside an older form, transformers would not read `rope_parameters`."""
    config = AutoConfig.for_model(family)
    source = config.to_dict() | {"rope_theta": 1e4, "partial_rotary_factor": 0.25}
    factor = {"rope_scaling_factor": 4} if flags else {}
    apply_rope_settings(config, row_length=ROW, **flags, **factor)
    written = config.to_dict() | {"architectures": None, "dtype": "float32"}
    saved = json.loads(json.dumps(saved_config(written, config, source)))
    (tmp_path / "config.json").write_text(json.dumps(saved))
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters == config.rope_parameters
    bases = {kind["rope_theta"] for kind in read.rope_parameters.values()}
    assert len(bases) == 2, "the case is vacuous"


@pytest.mark.parametrize(("config", "flags", "older"), TABLE.values(), ids=TABLE)
@pytest.mark.parametrize("form", ["older", "newer"])
def test_every_form_of_the_rope_settings_says_the_same(
    source, tmp_path, config, flags, older, form
):
    (source / "config.json").write_text(json.dumps(config))
    if form == "newer":
        AutoConfig.from_pretrained(source).save_pretrained(source)
        assert "rope_parameters" in json.loads((source / "config.json").read_text())
    model = train_and_save(source, tmp_path / "saved", **flags)
    written = json.loads((tmp_path / "saved/config.json").read_text())
    assert {key: written[key] for key in older} == older
    assert written["max_position_embeddings"] == ROW
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    again = AutoConfig.from_pretrained(tmp_path / "saved")
    assert again.rope_parameters == model.config.rope_parameters == written["rope_parameters"]
    assert again.max_position_embeddings == ROW


def test_what_the_run_did_not_change_is_the_sources(source, tmp_path):
    config = older_config("qwen3_moe", num_experts=4, moe_intermediate_size=16, head_dim=8)
    (source / "config.json").write_text(json.dumps(config))
    train_and_save(source, tmp_path / "saved")
    written = json.loads((tmp_path / "saved/config.json").read_text())
    added = {"rope_parameters", "dtype"}
    assert written.keys() == config.keys() - {"_name_or_path"} | added
    changed = {key for key in config.keys() & written.keys() if config[key] != written[key]}
    assert changed == {"max_position_embeddings"}
    names = load_file(tmp_path / "saved/model.safetensors")
    assert (
        "model.layers.0.mlp.experts.3.down_proj.weight" in names
    )  # transformers 5 has them as one


def test_experts_have_their_older_name_beside_the_newer(source, tmp_path):
    config = AutoConfig.for_model(
        "qwen3_moe", num_experts=4, moe_intermediate_size=16, head_dim=8, **SIZES
    )
    config.save_pretrained(source)
    train_and_save(source, tmp_path / "saved")
    written = json.loads((tmp_path / "saved/config.json").read_text())
    assert written["num_experts"] == written["num_local_experts"] == 4
    assert AutoConfig.from_pretrained(tmp_path / "saved").num_experts == 4


def test_files_are_copied_as_they_are_and_tell_nothing_of_this_machine(source, tmp_path):
    (source / "config.json").write_text(json.dumps(older_config("llama")))
    (source / "notes.txt").touch()
    train_and_save(source, tmp_path / "saved")
    copied = (
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("additional_chat_templates/tools.jinja", "generation_config.json", "modeling_own.py"),
    )
    for name in copied:
        assert (tmp_path / "saved" / name).read_bytes() == (source / name).read_bytes(), name
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    names = {str(path.relative_to(tmp_path / "saved")) for path in files}
    assert names == {*copied, "config.json", "model.safetensors"}
    for path in files:
        content = path.read_bytes()
        assert b"machine" not in content and b"/home/somebody" not in content, path
    AutoTokenizer.from_pretrained(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_source_without_generation_settings_gets_none(source, tmp_path):
    (source / "config.json").write_text(json.dumps(older_config("llama")))
    (source / "generation_config.json").unlink()
    train_and_save(source, tmp_path / "saved")
    assert not (tmp_path / "saved/generation_config.json").exists()


def test_a_source_that_vanishes_during_the_run_does_no_harm(source, tmp_path):
    (source / "config.json").write_text(json.dumps(older_config("llama")))
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    found = read_source(str(source), config=config, tokenizer=tokenizer)
    source.rename(tmp_path / "elsewhere")
    model = AutoModelForCausalLM.from_config(config)
    write_model(tmp_path / "saved", model, model.state_dict(), found)
    AutoTokenizer.from_pretrained(tmp_path / "saved")


def test_of_a_hub_name_the_same_files_are_read(source, monkeypatch):
    (source / "config.json").write_text(json.dumps(older_config("llama")))
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    config._commit_hash = "0123"

    def download(name, *, revision, allow_patterns):
        assert (name, revision) == ("some/model", "0123")
        assert {"config.json", "tokenizer*"} <= set(allow_patterns)
        return str(source)

    monkeypatch.setattr(saved_model, "snapshot_download", download)
    of_hub = read_source("some/model", config=config, tokenizer=tokenizer)
    assert of_hub == read_source(str(source), config=config, tokenizer=tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_saved_once(source, tmp_path, tied):
    (source / "config.json").write_text(json.dumps(older_config("qwen2", tie_word_embeddings=tied)))
    model = train_and_save(
        source, tmp_path / "saved"
    )  # every weight a copy, as ZeRO-2 hands them over
    names = set(load_file(tmp_path / "saved/model.safetensors"))
    assert ("lm_head.weight" in names) != tied and "model.embed_tokens.weight" in names
    again, missing = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not missing["missing_keys"]
    assert again.lm_head.weight.equal(model.lm_head.weight)
