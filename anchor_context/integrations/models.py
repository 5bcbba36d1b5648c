"""Hands the engine's `attend` to a Hugging Face model. No decoder forward is copied or replaced.

transformers calls attention through `AttentionInterface`, and passes extra keyword arguments of the
model's forward on to it: `model(input_ids, position_ids=…, layout=…)` is all that a caller adds.
Because the layout travels with the call, the pattern is the same in `train()` and `eval()`, with and
without gradient checkpointing; a call without one is an error, never plain causal attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from anchor_context.integrations.calls import attend_call, is_causal_call
from anchor_context.layout import DocumentLayout
from anchor_context.run.work import head_dim, kv_heads, layer_configs

# A name per model, because transformers looks attention functions up by name. Not "flash…": such a
# name sends transformers to look for a kernel on its hub.
_names = (f"anchor_context_{number}" for number in itertools.count())


def set_attention(model: PreTrainedModel, attend: Callable[..., Tensor]) -> None:
    """Make every attention layer of `model` call `attend(q, k, v, layout, *, scale, sliding_window, softcap,
    sinks)`.

    Afterwards the model's forward needs `layout=DocumentLayout` and `position_ids`, and returns what
    it returned before. Saved models carry no trace of it. Under `torch.compile` the model's other parts are
    compiled, and attention runs as it does without.

    Raises:
        ValueError: the model scores attention in a way that the engines do not compute.
    """
    check_layers(model.config)
    if not model._supports_attention_backend:
        raise ValueError(
            f"{model.config.model_type}: transformers computes this family's attention itself and "
            "takes no other; choose a model of the README's table"
        )

    @torch.compiler.disable  # an engine has compiled what gains by it; what it asks is not for a graph
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layout: DocumentLayout | None = None,
        **settings,
    ) -> tuple[Tensor, None]:
        if layout is None:
            raise ValueError(
                f"no layout reached {type(module).__name__} (not given, or not handed on by this "
                "family's layers); call the model with layout=DocumentLayout(…), or load the saved "
                "model with AutoModelForCausalLM for plain causal attention"
            )
        if attention_mask is not None:
            raise ValueError(
                f"{type(module).__name__} was given an attention_mask (by the caller, or by this family's "
                "own forward); the engines know who sees whom from the layout alone and would drop it"
            )
        if not is_causal_call(module, settings):
            raise ValueError(
                f"{type(module).__name__} lets tokens see later ones (an encoder, by is_decoder=false or "
                "use_bidirectional_attention=true in its config.json), and the engines compute causal "
                "attention; choose a decoder"
            )
        remedy = "set it to 0 or null in the model's config.json"
        out = attend_call(attend, module, query, key, value, layout, settings, remedy=remedy)
        return out, None

    # No entry in `AttentionMaskInterface`: for a name without one transformers makes no mask. With one it
    # would look for packed rows in `position_ids`, and wait for the device at every forward to do so.
    name = next(_names)
    AttentionInterface.register(name, attention)
    model.set_attn_implementation(name)


def attention_heads(config) -> dict[str, int]:
    """Of a transformers configuration: its `heads`, the `kv_heads` that they share, and their `head_dim`.

    Where layers differ, the largest of them: what a kernel must be able to compute.
    """
    layers = layer_configs(config.get_text_config())
    return {
        "heads": max(layer.num_attention_heads for layer in layers),
        "kv_heads": max(map(kv_heads, layers)),
        "head_dim": max(map(head_dim, layers)),
    }


def check_layers(config) -> None:
    """Raise `ValueError` for layers that no engine computes."""
    text = config.get_text_config()
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise ValueError(
            f"{config.model_type}: layers of the kind {', '.join(sorted(others))} mix tokens in a way "
            "that the engines do not compute by document"
        )
