"""LoRA adapters by peft: small matrices train beside linear layers, whose own weights stay as they are.

    y = W x + b + alpha / rank · B A x      A (rank, in) begins at random, B (out, rank) at zero

(Hu et al., arXiv 2106.09685.) LongLoRA (Chen et al., arXiv 2309.12307) trains the embeddings and norms as
well: they are few weights, and without them adapters fall behind full training at long context.

Guarantees: the model stays of its class, so attention, loss, memory plan and ZeRO treat it as any other. A
begins the same for a seed, whatever the ranks and the ZeRO stage. A model is saved merged, `W + alpha / rank
· B A` computed in float32 and rounded once, with every other weight bit for bit as it trained or was loaded;
the adapter lies in `adapter/` of its folder, for `PeftModel.from_pretrained`. (Beside the merged weights
transformers would load it on top of them once more.)
Costs: a forward of the adapter beside each adapted layer; gradients and optimiser states for the adapter
alone. What is in no linear layer, as the experts of a mixture, which transformers keeps in one tensor, is
not adapted; nor are linear layers that peft takes for such experts, by their names (`adaptable_layers`).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchor_context.run.origin import NO_ADAPTER
from anchor_context.run.saved_model import Source, write_model
from anchor_context.run.work import whole_size

PEFT = "peft==0.21.2"
"""What was tested; tests/requirements.txt has it."""
FOLDER = "adapter"
ALL_LINEAR = "all-linear"
A, B, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."
"""How peft calls the matrices of a layer, and what is the layer's own."""


@dataclass(frozen=True)
class Lora:
    """What is adapted, and how."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | None
    """Names of linear layers (`q_proj`), in every decoder layer; None: all of them."""
    embeddings_and_norms: bool
    """Whether these are trained too, as whole weights."""

    @classmethod
    def of(
        cls, *, rank: int, alpha: float | None, targets: str, embeddings_and_norms: bool
    ) -> Lora | None:
        """From the flags; None for rank 0.

        Raises:
            ValueError: values that cannot work, or peft is not installed.
        """
        if rank == 0:
            if alpha is not None or targets != ALL_LINEAR or embeddings_and_norms:
                raise ValueError(
                    "--lora_alpha, --lora_targets and --lora_embeddings_and_norms need --lora_rank"
                )
            return None
        if rank < 0:
            raise ValueError(f"--lora_rank {rank} must be at least 1, or 0 for none")
        if alpha is not None and alpha <= 0:
            raise ValueError(f"--lora_alpha {alpha} must be positive, or left out")
        names = tuple(sorted({name.strip() for name in targets.split(",")} - {""}))
        if not names:
            raise ValueError(f"--lora_targets is empty: name linear layers, or {ALL_LINEAR}")
        if importlib.util.find_spec("peft") is None:
            raise ValueError(f"--lora_rank needs peft: pip install {PEFT}")
        return cls(
            rank=rank,
            alpha=2.0 * rank if alpha is None else alpha,
            targets=None if names == (ALL_LINEAR,) else names,
            embeddings_and_norms=embeddings_and_norms,
        )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def __str__(self) -> str:
        targets = "all linear layers" if self.targets is None else ", ".join(self.targets)
        beside = ", embeddings and norms whole" if self.embeddings_and_norms else ""
        return f"rank {self.rank}, alpha {self.alpha:g}, on {targets}{beside}"


def adapter_origin(lora: Lora | None) -> dict[str, object]:
    """What a resumed run must have in common with its checkpoint, for `check_same_training`."""
    if lora is None:
        return NO_ADAPTER
    return {
        "--lora_rank": lora.rank,
        "--lora_alpha": lora.alpha,
        "--lora_targets": ALL_LINEAR if lora.targets is None else ",".join(lora.targets),
        "--lora_embeddings_and_norms": lora.embeddings_and_norms,
    }


# --- adding ---------------------------------------------------------------------------------------


def add_adapters(model: PreTrainedModel, lora: Lora, *, seed: int) -> None:
    """Put adapters into `model`, in place; from then on they alone train, and what `lora` names beside them.

    As soon as the model is loaded, also by ZeRO-3 in parts, or on the meta device. All ranks alike.

    Args:
        seed: of A's values. The caller's random state stays.

    Raises:
        ValueError: the model has no linear layer of a name that `lora` targets.
    """
    from peft import LoraConfig, inject_adapter_in_model

    there = adaptable_layers(model)
    targets = lora.targets or there
    unknown = [name for name in targets if name not in there]
    if unknown or not there:
        has = f"its linear layers are {', '.join(there)}" if there else "it has no linear layer"
        what = f"--lora_targets {','.join(unknown)}" if unknown else "--lora_rank"
        experts = sorted(set(linear_layers(model)) - set(there))
        beside = "besides the head" + f", and {', '.join(experts)}, experts to peft" * bool(experts)
        raise ValueError(f"{what} cannot adapt a {model.config.model_type}: {has} ({beside})")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):  # peft makes them on the CPU
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model)
    adapted = [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]
    assert all(isinstance(layer, nn.Linear) for layer in adapted), "peft adapted something else"
    if lora.embeddings_and_norms:
        for module in embeddings_and_norms(model):
            module.requires_grad_(True)
    else:
        # Some treatments of memory see their tensors alone, and would take a layer whose input needs no
        # gradient for one that is not trained.
        model.enable_input_require_grads()


def describe_adapters(model: PreTrainedModel, lora: Lora) -> str:
    """A line on what trains in the adapted `model`, for people."""
    trained = (p for p in model.parameters() if p.requires_grad)
    size = sum(whole_size(p) for p in trained)
    return f"adapters {lora}: {size:,} parameters train"


def linear_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """The names that the linear layers of `model` have in their parents, sorted; without the head's."""
    head = model.get_output_embeddings()
    return tuple(
        sorted(
            {
                name.rpartition(".")[-1]
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and module is not head
            }
        )
    )


def adaptable_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Those of `linear_layers` that peft adapts as such.

    In some families (DeepSeek-V3, GLM-4.5 MoE) peft takes the names of dense layers and shared experts,
    `gate_proj` for one, for the routed experts, which version 4 of transformers kept in layers of these
    names: it would put adapters of another rank beside their one tensor, here and wherever the adapter is
    loaded.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def stays(name: str) -> bool:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # such experts are adapted together or not at all
            return False
        return name in config.target_modules

    return tuple(name for name in linear_layers(model) if stays(name))


def embeddings_and_norms(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights LongLoRA trains whole: embeddings, of learnt positions too, and norms."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Norm")
    ]


def frozen_checksum(model: nn.Module) -> int:
    """A sum over the bits of all weights that are not trained. Collective under ZeRO-3.

    Checkpoints leave these weights out: a run that goes on with others would be another training.
    """
    total = 0
    frozen = (p for p in model.parameters() if not p.requires_grad)
    for number, parameter in enumerate(frozen, start=1):
        with deepspeed.zero.GatheredParameters([parameter]):
            bits = parameter.detach().view({2: torch.int16, 4: torch.int32}[parameter.itemsize])
            total += number * int(bits.sum(dtype=torch.int64))
    return total


# --- saving ---------------------------------------------------------------------------------------


def write_merged_model(
    folder: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    source: Source,
    *,
    lora: Lora,
    base: str,
) -> None:
    """`write_model` of the merged model, and the adapter in `adapter/` of its folder.

    Args:
        weights: all of them, by the names that they have in the adapted `model`.
        base: the model that the adapter belongs to, as its folder or hub name.
    """
    write_model(folder, model, merged(weights, scale=lora.scale), source)
    write_adapter(folder / FOLDER, model, weights, lora=lora, base=base)


def merged(weights: dict[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """The weights of the model without adapters that computes the same, by that model's names."""
    plain = {}
    for name, weight in weights.items():
        if name.endswith((A, B)):
            continue
        layer, is_adapted, rest = name.rpartition(BASE)
        if is_adapted and rest == "weight":
            change = weights[layer + B].float() @ weights[layer + A].float()
            weight = (weight.float() + scale * change).to(weight.dtype)
        plain[f"{layer}.{rest}" if is_adapted else name] = weight
    return plain


def write_adapter(
    folder: Path, model: PreTrainedModel, weights: dict[str, Tensor], *, lora: Lora, base: str
) -> None:
    """What is trained, in peft's form: the config, and safetensors under the names that peft gives them."""
    from peft import LoraConfig

    trained = {name: weights[name] for name, p in model.named_parameters() if p.requires_grad}
    for copy, original in (model.all_tied_weights_keys or {}).items():
        if original in trained:  # peft loads each of them by itself
            trained[copy] = trained[original].clone()
    whole = {name for name in trained if not name.endswith((A, B))}
    LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=sorted({n.split(".")[-4] for n in trained if n.endswith(A)}),
        modules_to_save=sorted({name.split(".")[-2] for name in whole}) or None,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(folder)
    tensors = {
        f"base_model.model.{name.replace('.default.', '.')}": weight.contiguous()
        for name, weight in trained.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
