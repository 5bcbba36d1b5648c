"""A language model inside a model that sees: loaded by itself, or refused in one line."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    T5Config,
)

from anchor_context import patch_model
from anchor_context.demo import train_tokenizer
from anchor_context.integrations.boundaries import layout_of_starts
from anchor_context.integrations.language_model import (
    check_files,
    language_model_config,
    load_language_model,
    weightless_model,
)
from anchor_context.memory.estimate import ModelSizes
from anchor_context.rope.scaling import apply_rope_settings
from anchor_context.run.saved_model import read_source, write_model

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "head_dim": 16,
}
WHOLES = {  # model_type -> (further settings, the class of its language model)
    "mistral3": ({"spatial_merge_size": 1, "image_token_index": 5}, "MistralForCausalLM"),
    "gemma3": ({"mm_tokens_per_image": 4, "image_token_index": 5}, "Gemma3ForCausalLM"),
    "llava": ({"image_token_index": 5}, "LlamaForCausalLM"),
    "internvl": ({"image_token_id": 5}, "Qwen2ForCausalLM"),
}


def save_whole(model_type: str, folder: Path) -> torch.nn.Module:
    """A tiny model that sees, and its tokenizer."""
    kind, more = CONFIG_MAPPING[model_type], WHOLES[model_type][0]
    default = kind()
    config = kind(
        text_config={"model_type": default.text_config.model_type, **TEXT},
        vision_config={"model_type": default.vision_config.model_type, **VISION},
        **more,
    )
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(folder)
    train_tokenizer(["a text to learn from"] * 9, vocab_size=300).save_pretrained(folder)
    return whole


@pytest.mark.parametrize("model_type", WHOLES)
def test_it_is_loaded_trained_and_saved_by_itself(model_type, tmp_path):
    whole = save_whole(model_type, tmp_path / "whole")
    name = str(tmp_path / "whole")
    whole_config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    source = read_source(name, config=whole_config, tokenizer=tokenizer)
    config = language_model_config(whole_config)
    load = {"config": config, "dtype": torch.float32, "trust_remote_code": False}
    model = load_language_model(name, **load).eval()
    assert type(model).__name__ == WHOLES[model_type][1]
    tokens = torch.arange(8, 30)[None]
    with torch.no_grad():
        expected = whole(tokens).logits
        assert model(tokens).logits.equal(expected)
    assert not [name for name, weight in model.named_parameters() if weight.is_meta]
    weightless = weightless_model(name, **load)
    assert {weight.device.type for weight in weightless.parameters()} == {"meta"}
    assert (type(weightless), weightless.dtype) == (type(model), model.dtype)
    assert ModelSizes.of(weightless) == ModelSizes.of(model)  # a tied head counted once, as Gemma's

    # Settings changed before it is built are its own, and the attention of its layers can be replaced.
    apply_rope_settings(config, row_length=256)
    model = load_language_model(name, **load)
    assert model.config.max_position_embeddings == 256
    patch_model(model, pattern="full", engine="reference")
    layout = layout_of_starts(
        torch.tensor([0]).numpy(), like=tokens, pattern="full", anchor_placement="none"
    )
    logits = model(tokens, layout=layout).logits
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())

    write_model(tmp_path / "saved", model, dict(model.state_dict()), source)
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["model_type"] == config.model_type and "vision_config" not in saved
    assert saved["rope_theta"] and saved["torch_dtype"] == "float32"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert again(tokens).logits.equal(expected)


def test_a_model_of_text_alone_is_itself():
    config = LlamaConfig()
    assert language_model_config(config) is config


def test_weights_that_are_not_there_are_not_made_up(tmp_path):
    config = LlamaConfig(**TEXT)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config.num_hidden_layers = 3  # or a shard was not downloaded
    load = {"config": config, "dtype": torch.float32, "trust_remote_code": False}
    layer = r"lacks model\.layers\.2\.input_layernorm\.weight, model\.layers\.2\.mlp\.down_proj\.weight, "
    with pytest.raises(ValueError, match=layer + r".* and 6 more of the weights"):
        load_language_model(str(tmp_path), **load)


FILES = {  # what the files are of, what config.json says otherwise -> what is said of it; None: nothing
    "layers": (
        LlamaConfig,
        {},
        {"num_hidden_layers": 1},
        r"model\.layers\.1\..* and 6 more, .*left out",
    ),
    "lacks": (LlamaConfig, {}, {"num_hidden_layers": 3}, r"lacks model\.layers\.2\."),
    "biases": (LlamaConfig, {"attention_bias": True}, {"attention_bias": False}, r"k_proj\.bias"),
    "norms": (Qwen3Config, {}, {"model_type": "llama"}, r"k_norm\.weight"),
    "sizes": (LlamaConfig, {}, {"vocab_size": 200}, r"size \(300, 32\), .* \(200, 32\)"),
    "experts": (MixtralConfig, {"num_local_experts": 2}, {"num_hidden_layers": 1}, r"layers\.1\."),
    "whole": (LlamaConfig, {}, {}, None),
    "whole experts": (MixtralConfig, {"num_local_experts": 2}, {}, None),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}, {}, None),
    "beyond the next": (  # as DeepSeek-V3 numbers them
        LlamaConfig,
        {},
        {"num_hidden_layers": 1, "num_nextn_predict_layers": 1},
        None,
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_and_config_speak_of_the_same_weights(case, tmp_path):
    kind, made, said, problem = FILES[case]
    AutoModelForCausalLM.from_config(kind(**TEXT | made)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    config = AutoConfig.from_pretrained(tmp_path)
    refused = nullcontext() if problem is None else pytest.raises(ValueError, match=problem)
    with refused:
        check_files(str(tmp_path), config=config, trust_remote_code=False)


def test_a_head_that_the_language_model_lacks_is_left_out_and_told(tmp_path, capsys):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT))
    weights = model.state_dict() | {
        "v_head.weight": torch.ones(1, 32),
        "v_head.bias": torch.ones(1),
    }
    model.save_pretrained(tmp_path, state_dict=weights)
    check_files(str(tmp_path), config=model.config, trust_remote_code=False)
    assert "v_head.bias and 1 more of its weights" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["cut", "pointer", "gone"])
def test_weights_that_cannot_be_read_are_one_line(what, tmp_path):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    file = max(tmp_path.glob("*.safetensors"))
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    else:
        file.unlink()
    with pytest.raises(ValueError, match="weights cannot be read .*git lfs pull") as refused:
        check_files(str(tmp_path), config=model.config, trust_remote_code=False)
    assert "\n" not in str(refused.value)


def test_an_adapter_beside_the_model_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT))
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter beside the model"):
        check_files(str(tmp_path), config=config, trust_remote_code=False)


@pytest.mark.parametrize("model_type", WHOLES)
def test_the_files_of_a_model_that_sees_are_checked_too(model_type, tmp_path):
    save_whole(model_type, tmp_path)
    config = language_model_config(AutoConfig.from_pretrained(tmp_path))
    check_files(str(tmp_path), config=config, trust_remote_code=False)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with pytest.raises(ValueError, match=r"layers\.1\..* would be left out"):
        check_files(str(tmp_path), config=config, trust_remote_code=False)


def test_a_head_beside_the_embedding_that_is_said_to_be_one_is_refused(tmp_path):
    AutoModelForCausalLM.from_config(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    config = LlamaConfig(**TEXT, tie_word_embeddings=True)
    load = {"dtype": torch.float32, "trust_remote_code": False}
    with pytest.raises(ValueError, match="tie_word_embeddings: true .* set it to false"):
        load_language_model(str(tmp_path), config=config, **load)
    config.tie_word_embeddings = False
    assert load_language_model(str(tmp_path), config=config, **load).lm_head is not None
    AutoModelForCausalLM.from_config(LlamaConfig(**TEXT, tie_word_embeddings=True)).save_pretrained(
        tmp_path
    )
    config.tie_word_embeddings = True
    model = load_language_model(str(tmp_path), config=config, **load)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (T5Config(), "t5 is no causal language model"),
        (CONFIG_MAPPING["qwen2_vl"](), "qwen2_vl keeps its language model .*inside.* text alone"),
        (CONFIG_MAPPING["blip"](), "blip keeps its language model .*inside.* text alone"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_cannot_be_trained_by_itself_is_one_line(config, says):
    with pytest.raises(ValueError, match=says) as refused:
        language_model_config(config)
    assert "\n" not in str(refused.value)
