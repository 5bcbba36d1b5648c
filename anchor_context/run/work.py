"""The floating-point work of a training step, from a model's sizes, its tokens and its attended pairs.

    6 per token and parameter that it is multiplied by, 4 where that is not trained
    12 per pair and unit of the attention's width

(PaLM, arXiv 2204.02311, appendix B; a multiply-add is 2, and a backward makes twice its forward.) What is
computed again does not count. `attention/patterns.py` counts the pairs, the mean over the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class ModelWork:
    """What one token, and one attended pair, cost: the factors of the model's floating-point work."""

    matmul_parameters: int
    """Parameters that multiply a token: no embedding (but a tied head), and of the experts those chosen."""
    attention_width: int
    """layers × heads × head dimension; where queries and values differ in theirs, the mean of both."""
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
        sizes = (getattr(config, name, None) for name in ("qk_head_dim", "head_dim"))
        of_queries = next(filter(None, sizes), config.hidden_size // config.num_attention_heads)
        of_values = getattr(config, "v_head_dim", None) or of_queries
        width = config.num_attention_heads * (of_queries + of_values) // 2
        return cls(
            matmul_parameters=sum(multiplied.values()),
            attention_width=config.num_hidden_layers * width,
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


def whole_size(parameter: Tensor) -> int:
    """A parameter's elements, also where ZeRO-3 left a part of them here."""
    return getattr(parameter, "ds_numel", parameter.numel())
