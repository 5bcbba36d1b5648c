"""What transformers would refuse of a model later, found before anything heavy: a rehearsal without weights.

A model's `config.json` and `generation_config.json` may hold what is refused when the weights are loaded,
after the data were prepared, or when the trained model is saved, after all steps. `rehearse` builds the model
without weights, hands it an attention, asks it for its logits, saves it into a temporary folder, and reads
there whether the saved model would be the trained one.

Costs: less than a second, no memory for weights.
"""

from __future__ import annotations

import copy
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from anchor_context.files import disk_errors
from anchor_context.integrations.adapters import Lora, add_adapters
from anchor_context.integrations.language_model import forget_attention
from anchor_context.integrations.models import set_attention
from anchor_context.loss import check_logits, check_weights
from anchor_context.rope.scaling import rope_settings
from anchor_context.run.saved_model import Source, write_model

RANDOM_ROUTERS = ("phimoe",)
"""Families whose routers draw experts at random in training, whatever their configuration says."""


def random_settings(config: PretrainedConfig) -> dict[str, float]:
    """What a causal model of this `config` draws at random in training: dropouts and jitters that are not 0.

    Found by their names; those of classifiers are left out.
    """
    return {
        name: value
        for name, value in vars(config).items()
        if ("drop" in name or "jitter" in name)
        and not name.startswith(("classifier", "summary"))
        and type(value) in (int, float)
        and value > 0
    }


def check_trainable(config: PretrainedConfig) -> None:
    """Raise `ValueError` for weights that cannot be trained, outputs that the engines do not compute, or a
    forward that draws random numbers.

    Every layout of ranks would draw others, and a tiled MLP others in its backward than in its forward.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method", "a method it does not name")
        raise ValueError(
            f"the model's weights are quantised ({method}), and train.py trains all weights in their full "
            "precision: name the model that they were made from"
        )
    if config.output_attentions:
        raise ValueError(
            "the model's config.json has output_attentions: true, but the engines never hold the attention "
            "weights: set it to false"
        )
    if drawn := random_settings(config):
        raise ValueError(
            f"the model's {', '.join(f'{name}={value}' for name, value in drawn.items())} would draw random "
            "numbers in training, other ones on every layout of ranks: set them to 0 in its config.json"
        )
    if config.model_type in RANDOM_ROUTERS:
        raise ValueError(
            f"{config.model_type}: its routers draw experts at random in training, other ones on every "
            "layout of ranks, and no setting switches that off; choose another model"
        )


def rehearse(
    name: str,
    config: PretrainedConfig,
    source: Source,
    *,
    trust_remote_code: bool,
    lora: Lora | None = None,
) -> type[PreTrainedModel]:
    """Build, adapt if asked to, and save, the model that `config` describes, without weights.

    Args:
        name: the model's folder or hub name.
        source: what that folder holds besides weights.

    Returns:
        The model's class.

    Raises:
        ValueError: transformers, `add_adapters`, `set_attention` or the loss refuses one of the steps.
        OSError: there is no room for temporary files; it names their folder.
    """
    config = copy.deepcopy(config)
    forget_attention(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        with suppress(OSError):  # without such a file the model has made one of its config
            model.generation_config = GenerationConfig.from_pretrained(name)
    except (ValueError, ImportError, AssertionError, StrictDataclassError) as error:
        raise ValueError(f"{name} cannot be built: {_one_line(error)}") from error
    if lora is not None:
        add_adapters(model, lora, seed=0)
    set_attention(model, lambda q, *_, **__: q)
    check_weights(model)
    check_logits(model)
    try:
        with tempfile.TemporaryDirectory() as folder, disk_errors(Path(folder), "TMPDIR"):
            write_model(Path(folder), model, {}, source)
            read = type(config).from_pretrained(folder)
    except (ValueError, ImportError, AssertionError, StrictDataclassError) as error:
        raise ValueError(
            f"{name} could not be saved after training: {_one_line(error)}; mend its configuration"
        ) from error
    found, trained = _stated(rope_settings(read)), _stated(rope_settings(config))
    if found != trained:
        raise ValueError(
            f"{name}, saved after training, would be read with the RoPE settings {found}, and it trains with "
            f"{trained}: write these into its config.json as rope_parameters, and no other form of them"
        )
    return type(model)


def _stated(settings: dict[str | None, dict]) -> dict[str | None, dict]:
    """`rope_settings` without what is null."""
    return {
        kind: {name: value for name, value in rope.items() if value is not None}
        for kind, rope in settings.items()
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
