"""The floating-point work of a training step, from a model's sizes, its tokens and its attended pairs.

    6 per token and parameter that it is multiplied by, 4 where that is not trained
    12 per pair and unit of the attention's width

(PaLM, arXiv 2204.02311, appendix B; a multiply-add is 2, and a backward makes twice its forward.) What is
computed again does not count. `attention/patterns.py` counts the pairs, the mean over the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelWork:
    """What one token, and one attended pair, cost: the factors of the model's floating-point work."""

    matmul_parameters: int
    """Parameters that multiply a token: no embedding (but a tied head), and of the experts those chosen."""
    attention_width: int
    """heads × head dimension of all layers; where queries and values differ in theirs, the mean of both."""
    frozen_parameters: int = 0
    """Of `matmul_parameters`, those that are not trained, beside adapters: they get no gradient."""

    @classmethod
    def of(cls, model: nn.Module) -> ModelWork:
        """Of a transformers model, also where ZeRO-3 left a part of each parameter here."""
        config, head = model.config.get_text_config(), model.get_output_embeddings().weight
        chosen = getattr(config, "num_experts_per_tok", None)
        multiplied = {p: whole_size(p) for p in model.parameters()}
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and module.weight is not head:
                multiplied[module.weight] = 0
            elif chosen and name.endswith(".experts"):  # a layer's, in tensors of all or one by one
                experts = getattr(module, "num_experts", None) or len(module)
                for p in module.parameters():
                    multiplied[p] = whole_size(p) * chosen // experts
        width = 0
        for layer in layer_configs(config):
            of_queries = head_dim(layer)
            of_values = getattr(layer, "v_head_dim", None) or of_queries
            width += layer.num_attention_heads * (of_queries + of_values) // 2
        return cls(
            matmul_parameters=sum(multiplied.values()),
            attention_width=width,
            frozen_parameters=sum(n for p, n in multiplied.items() if not p.requires_grad),
        )

    @property
    def pair_price(self) -> float:
        """The work of a pair that all layers attend to; that of one token without attention is 1."""
        return self.flops(tokens=0, pairs=1) / self.flops(tokens=1, pairs=0)

    def flops(self, *, tokens: int, pairs: float) -> float:
        """Forward and backward work.

        Args:
            pairs: the mean over the layers.
        """
        per_token = 6 * self.matmul_parameters - 2 * self.frozen_parameters
        return per_token * tokens + 12 * self.attention_width * pairs


def layer_configs(config: PretrainedConfig) -> Sequence[PretrainedConfig]:
    """The configuration of each layer of a language model: `config` itself, unless layers differ in what it
    says, as Gemma 4's in the size and number of their heads. There transformers refuses to read that of
    `config`.

    Args:
        config: of the language model, not of a model that it is a part of.
    """
    return getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers


def head_dim(layer: PretrainedConfig) -> int:
    """Of a layer's queries and keys; the layer is one of `layer_configs`."""
    sizes = (getattr(layer, name, None) for name in ("qk_head_dim", "head_dim"))
    return next(filter(None, sizes), layer.hidden_size // layer.num_attention_heads)


def kv_heads(layer: PretrainedConfig) -> int:
    """Key/value heads; the layer is one of `layer_configs`."""
    return getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads


def whole_size(parameter: Tensor) -> int:
    """A parameter's elements, also where ZeRO-3 left a part of them here."""
    return getattr(parameter, "ds_numel", parameter.numel())
