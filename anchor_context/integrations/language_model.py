"""The language model of a Hugging Face model, also where it lies inside a model that sees or hears.

Mistral Small 3.1, Gemma 3 and others keep their language model's configuration in `text_config`, and its
weights beside those of a vision tower. Text trains the language model alone, so it alone is loaded: as the
plain causal model of its family, in which `train.py`, and what loads a saved model, find nothing unusual.

Costs: the whole model is read once on the CPU, and what is not the language model is dropped.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils import logging as transformers_logging

from anchor_context.files import warn


def language_model_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the causal language model in a model of this `config`, often `config` itself.

    Raises:
        ValueError: it has none that can be loaded by itself.
    """
    text = config.get_text_config()
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if text is config and (own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        return config
    if text is config:
        raise ValueError(
            f"{config.model_type} is no causal language model of transformers; choose one"
        )
    if (
        text is not getattr(config, "text_config", None)
        or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING
        or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    ):
        raise ValueError(
            f"{config.model_type} keeps its language model ({text.model_type}) inside, and transformers has "
            "no causal model of that kind to train by itself: choose a model of text alone"
        )
    return text


def check_has_weights(name: str) -> None:
    """Raise `ValueError` for a model's folder without weights, where transformers would do so much later."""
    kinds = ("*.safetensors", "*.bin", "adapter_config.json")
    if Path(name).is_dir() and not any(f for kind in kinds for f in Path(name).glob(kind)):
        raise ValueError(
            f"--model_name_or_path {name} holds no weights (model.safetensors, …): --from_scratch begins "
            "with random ones"
        )


def forget_attention(config: PretrainedConfig) -> None:
    """What a `config.json` names (`flash_attention_2`, a kernel of the hub) need not be installed.

    An engine's attention takes its place as soon as the model is there.
    """
    config._attn_implementation = None


def load_language_model(
    name: str, *, config: PretrainedConfig, trust_remote_code: bool, **settings
) -> PreTrainedModel:
    """Load the causal language model of the model `name`, a folder or a hub name.

    Args:
        config: what `language_model_config` found, perhaps changed since.
        settings: further arguments of `from_pretrained`, as `dtype`.

    Raises:
        ValueError: what lies inside is of another class than the configuration says, or it has other weights.
    """
    model, found = _load(name, config, trust_remote_code=trust_remote_code, **settings)
    _refuse_missing(model, found, name)
    if model.config.model_type != config.model_type:
        return _language_model_inside(model, name, config)
    _refuse_two_heads(model, name)
    return model


def check_files(name: str, *, config: PretrainedConfig, trust_remote_code: bool) -> None:
    """Raise `ValueError` where the files of the model `name` hold other weights than `config` speaks of.

    transformers drops what has no place in the model, as layers beyond `num_hidden_layers`, and under ZeRO-3
    without a word. What is no part of a module that the model has, as the head of a reward model or of
    several tokens at once, is dropped here, too, and told.

    Costs: names and sizes are read, the weights not.
    """
    check_has_weights(name)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # or it would tell the same as a table
    try:
        model, found = _load(
            name,
            copy.deepcopy(config),
            trust_remote_code=trust_remote_code,
            device_map="meta",
            ignore_mismatched_sizes=True,
        )
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"--model_name_or_path {name}: its weights cannot be read ({' '.join(str(error).split())}): the "
            "download broke off, or git left pointers to the files (git lfs pull)"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"--model_name_or_path {name} holds an adapter beside the model (adapter_config.json), which "
            "transformers puts into it: merge it into the weights, or move it away"
        )
    _refuse_missing(model, found, name)
    for weight, in_files, in_model in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"--model_name_or_path {name}: its files have {weight} of size {tuple(in_files)}, its "
            f"config.json speaks of {tuple(in_model)}: one of them belongs to another model"
        )
    others = sorted(found["unexpected_keys"])
    parts = _of_its_modules(others, model, config)
    if parts:
        more = f" and {len(parts) - 3:,} more" if len(parts) > 3 else ""
        raise ValueError(
            f"--model_name_or_path {name} holds {', '.join(parts[:3])}{more}, and its config.json speaks of "
            "no such weights: they would be left out. Mend the config.json, or take them out of the files"
        )
    if others and os.environ.get("LOCAL_RANK", "0") == "0":
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        warn(
            f"{name}: {others[0]}{more} of its weights are no part of the language model: left out"
        )


def _of_its_modules(keys: list[str], model: PreTrainedModel, config: PretrainedConfig) -> list[str]:
    """The weights that belong to a module of the language model, or to one more in a list of them.

    Not so layers that predict tokens beyond the next, which files number like the others.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    own = {head, *decoder.modules()} - {decoder}
    modules = dict(model.base_model.named_modules()) | dict(model.named_modules())
    first = config.num_hidden_layers
    beyond = range(first, first + (getattr(config, "num_nextn_predict_layers", None) or 0))

    def is_part(key: str) -> bool:
        while key and key not in modules:
            key = key.rpartition(".")[0]
        return bool(key) and modules[key] in own

    return [k for k in keys if is_part(k) and not any(f".{layer}." in k for layer in beyond)]


def _load(
    name: str, config: PretrainedConfig, *, trust_remote_code: bool, **settings
) -> tuple[PreTrainedModel, dict]:
    """The causal model, or the one that holds the language model of this `config`; what was found of it."""
    whole_config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    settings |= {"output_loading_info": True}
    forget_attention(config)
    if whole_config.model_type == config.model_type:
        return AutoModelForCausalLM.from_pretrained(
            name, config=config, trust_remote_code=trust_remote_code, **settings
        )
    forget_attention(whole_config)
    whole_config.text_config = config
    return AutoModelForImageTextToText.from_pretrained(
        name, config=whole_config, trust_remote_code=trust_remote_code, **settings
    )


def _refuse_missing(model: PreTrainedModel, found: dict, name: str) -> None:
    """Raise `ValueError` for weights that the files of the model `name` do not hold.

    transformers makes random ones in their place, and trains.
    """
    parameters = {own for own, _ in model.named_parameters()}
    missing = sorted(parameters.intersection(found["missing_keys"]))
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise ValueError(
            f"--model_name_or_path {name} lacks {', '.join(missing[:3])}{more} of the weights that its "
            "config.json speaks of: the files are not whole, or of another model"
        )


def _refuse_two_heads(model: PreTrainedModel, name: str) -> None:
    """Raise `ValueError` where the files hold a head, and config.json says that the embedding is the head.

    transformers 5 takes the head then, 4.57 the embedding, which would also read the trained model so.
    """
    tied = model.config.tie_word_embeddings and model._tied_weights_keys
    if tied and not model.all_tied_weights_keys:
        raise ValueError(
            f"--model_name_or_path {name} has tie_word_embeddings: true in its config.json, but its files "
            "hold a head other than the embedding: set it to false there, or take the head out of the files"
        )


def weightless_model(
    name: str, *, config: PretrainedConfig, trust_remote_code: bool, **settings
) -> PreTrainedModel:
    """What `load_language_model` would load, on the meta device: its modules and sizes alone.

    Takes and raises the same; `config` stays as it is.
    """
    whole_config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    config = copy.deepcopy(config)
    forget_attention(config)
    with torch.device("meta"):
        if whole_config.model_type == config.model_type:
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, **settings
            )
        forget_attention(whole_config)
        whole_config.text_config = config
        whole = AutoModelForImageTextToText.from_config(
            whole_config, trust_remote_code=trust_remote_code, **settings
        )
    return _language_model_inside(whole, name, config)


def _language_model_inside(
    whole: PreTrainedModel, name: str, config: PretrainedConfig
) -> PreTrainedModel:
    """The plain causal model of the language model in `whole`, the model `name`, with its own weights."""
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    # The layers keep their own configuration object, which must be the model's: it names the attention.
    decoder.config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](decoder.config)
    if type(decoder) is not type(model.base_model):
        raise ValueError(
            f"the language model inside {name} is a {type(decoder).__name__}, where a "
            f"{type(model).__name__} has a {type(model.base_model).__name__}: choose a model of text alone"
        )
    setattr(model, model.base_model_prefix, decoder)
    model.set_output_embeddings(head)
    return model
