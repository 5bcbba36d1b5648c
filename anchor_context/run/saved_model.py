"""A model to use: the folder that it came from, with other weights and the settings that the run changed.

transformers 5 writes configurations and tokenizers in a form of its own, which version 4.57 and what is built
on it (serving engines) read wrongly without a word: a RoPE base of 500,000 becomes 10,000, scaling vanishes,
tokenizers do not load. So nothing is written anew that the run did not change.

    config.json             the source's own; changed settings in every form that a reader may look for
    tokenizer, chat template, generation settings, Python code      the source's files, byte for byte
    model*.safetensors      the weights, under the source's names, tied ones once

Guarantees: transformers 4.57 and 5 read the same model. Nothing in it tells of this machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from anchor_context.rope.scaling import FULL, rope_settings

COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates/*"),
    *("generation_config.json", "*.py"),
)
"""The files of a model's folder that training does not change. A tokenizer's class may name more."""

OLDER_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
"""model_type -> settings that transformers 5 renamed: its name -> the name before. Found by comparing the
configurations of all causal language models that 4.57 and 5.24 have."""

LOCAL_BASE = ("gemma3_text", "gemma3n_text")
"""The families whose layers with a window have a RoPE base of their own in 4.57, `rope_local_base_freq`."""
KINDS_IN_OLDER_FORM = (*LOCAL_BASE, "olmo3")
"""Those of the families whose kinds of layers differ in RoPE that 4.57 knows. In the others' configurations
the older form would only overrule `rope_parameters`."""
OLDER_FORM = ("rope_theta", "rope_scaling", "partial_rotary_factor")


@dataclass(frozen=True)
class Source:
    """What the folder of a model holds besides weights, read once: it may be gone when a model is saved."""

    config: dict
    """config.json."""
    files: dict[str, bytes]
    """Path in the folder -> contents of the files that are `COPIED`."""


def read_source(
    name: str, *, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Source:
    """Of the model `name`, a folder or a hub name, whose `config` and `tokenizer` are loaded.

    Raises:
        OSError: a file cannot be read.
    """
    patterns = {*COPIED, *tokenizer.vocab_files_names.values()}
    folder = Path(name)
    if not folder.is_dir():
        revision = getattr(config, "_commit_hash", None)
        wanted = ["config.json", *sorted(patterns)]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return Source(
        config=json.loads((folder / "config.json").read_text()),
        files={str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)},
    )


def write_model(
    folder: Path, model: PreTrainedModel, weights: dict[str, Tensor], source: Source
) -> None:
    """Write the trained `model` into the empty, or not yet made, `folder`.

    Args:
        weights: all of them, by the model's own names; tied ones may be there twice.
        source: of the model that was trained.
    """
    # The name of a copy -> the original's.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    once = {key: weight for key, weight in weights.items() if tied.get(key) not in weights}
    model.save_pretrained(folder, state_dict=once)
    written = json.loads((folder / "config.json").read_text())
    for path in folder.glob("*.py"):  # the model's code, which comes with the source's files
        path.unlink()
    (folder / "generation_config.json").unlink(missing_ok=True)

    config = json.dumps(saved_config(written, model.config, source.config), indent=2)
    (folder / "config.json").write_text(config + "\n")
    for name, content in source.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def saved_config(written: dict, config: PretrainedConfig, source: dict) -> dict:
    """The config.json of a trained model, in the forms of transformers 4 and 5 alike.

    Args:
        written: what transformers wrote for `config`, the trained model's.
        source: config.json of the model that was trained.
    """
    # A language model out of another model's `text_config` has no config.json of its own.
    base = source if source.get("model_type") == written["model_type"] else written
    maximum = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    rope = rope_in_every_form(config)
    if set(rope) == {"rope_parameters"}:
        base = {name: value for name, value in base.items() if name not in OLDER_FORM}
    saved = base | {
        "architectures": written["architectures"],
        "dtype": written["dtype"],
        "torch_dtype": written["dtype"],  # before 4.56
        **({maximum: written[maximum]} if maximum in written else {}),
        **rope,
    }
    for name, before in OLDER_NAMES.get(config.model_type, {}).items():
        if name in saved:
            saved[before] = saved[name]
    saved.pop("_name_or_path", None)
    return saved


def rope_in_every_form(config: PretrainedConfig) -> dict:
    """The settings of `config.rope_parameters`, and the same in the `OLDER_FORM` if the family has one."""
    settings = rope_settings(config)
    if not settings:
        return {}
    if None not in settings and config.model_type not in KINDS_IN_OLDER_FORM:
        return {"rope_parameters": config.rope_parameters}
    # Where kinds of layers differ, the older form is that of the layers that see everything.
    rope = dict(settings.get(None) or settings[FULL])
    forms = {"rope_parameters": config.rope_parameters}
    local_base = settings.get("sliding_attention", rope)["rope_theta"]
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            forms[name] = rope.pop(name)
    if config.model_type in LOCAL_BASE:
        forms["rope_local_base_freq"] = local_base
    elif local_base != forms["rope_theta"]:
        forms["rope_theta"] = (
            None  # one number for two: 4.57 shall stop, not take the one for the other
        )
    forms["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if rope["rope_type"] == "longrope":  # 4.57 reads the own length beside the maximum only
        forms["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        if config.model_type == "phi3":  # and of this family it refuses any other field
            rope["type"] = rope.pop("rope_type")
            del rope["original_max_position_embeddings"]
    return forms
