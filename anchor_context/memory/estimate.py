"""How many bytes of tensors a rank holds at once in a training step: the formulas of the memory plan.

    states        weights, optimiser, gradients: as long as the run. Who holds which part is ZeRO's business
    activations   what the forward keeps for the backward, per token and layer
    at work       what one layer, or the loss, needs besides while it computes

They add up to a peak in one of these moments: at the loss, when all layers keep what they keep; behind it,
when the head's gradient is sent; in the backward of a layer, often the last one, with what it computes again
and its scratch; in the update. The
formulas follow transformers' LLaMA, Mistral and Qwen layers, the kernels of `attention/`, the losses of
`loss.py`, and DeepSpeed 0.19.8's optimisers; a layer of another family is taken for one of these with the
sizes that its configuration tells.

Checked against what PyTorch's allocator handed out, on the CPU in float32 and bfloat16, with every
treatment, with and without DeepSpeed: between 1.0 and 1.2 times it (`tests/unit/test_memory_estimate.py`,
`benchmarks/memory.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from anchor_context import loss
from anchor_context.memory import treatments
from anchor_context.memory.offload import LEAVING
from anchor_context.memory.treatments import Treatment, is_swiglu_mlp
from anchor_context.run.work import head_dim, kv_heads, layer_configs, whole_size


@dataclass(frozen=True)
class ModelSizes:
    """What the formulas need to know of a model."""

    layers: int
    hidden: int
    intermediate: int
    """Of the MLP; where a token goes through several experts, theirs together."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    parameters: int
    query_key_norm: bool = False
    """Whether queries and keys are normalised, as Qwen3's are."""
    capped_logits: bool = False
    """Whether the logits are capped, as Gemma 2's are."""
    changed_scores: bool = False
    """Whether scores are capped, or have sinks: flex on the CPU then writes them all out."""
    frozen: int = 0
    """Of the parameters, those that are not trained, beside adapters."""
    head_trained: bool = True
    largest_trained: int = 0
    """The largest of the weights that are trained; 0 for the head."""
    norms_trained: bool = True
    mlps_trained: bool = True
    """Whether they, or adapters in them, are: what is not keeps no inputs for its own gradient."""
    adapter_ranks: int = 0
    """The ranks of all adapters in a layer together: entries per token between their two matrices."""

    @property
    def trained(self) -> int:
        return self.parameters - self.frozen

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSizes:
        text = model.config.get_text_config()
        layers = layer_configs(text)  # where they differ, the largest counts for all
        intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        if experts := getattr(text, "num_experts_per_tok", None):
            of_one = getattr(text, "moe_intermediate_size", None) or intermediate
            intermediate = experts * of_one
            intermediate += getattr(text, "shared_expert_intermediate_size", None) or 0
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=intermediate,
            heads=max(layer.num_attention_heads for layer in layers),
            kv_heads=max(map(kv_heads, layers)),
            head_dim=max(map(head_dim, layers)),
            vocabulary=text.vocab_size,
            parameters=sum(map(whole_size, model.parameters())),
            query_key_norm=any(name.endswith("q_norm") for name, _ in model.named_modules()),
            capped_logits=bool(getattr(text, "final_logit_softcapping", None)),
            changed_scores=bool(getattr(text, "attn_logit_softcapping", None))
            or any(name.endswith("sinks") for name, _ in model.named_parameters()),
            frozen=sum(whole_size(p) for p in model.parameters() if not p.requires_grad),
            head_trained=model.get_output_embeddings().weight.requires_grad,
            largest_trained=max(whole_size(p) for p in model.parameters() if p.requires_grad),
            norms_trained=_any_trained(m for m in model.modules() if _is_norm(m)),
            mlps_trained=_any_trained(m for m in model.modules() if is_swiglu_mlp(m)),
            adapter_ranks=sum(
                matrix.out_features
                for module in model.modules()
                for matrix in getattr(module, "lora_A", {}).values()
            )
            // text.num_hidden_layers,
        )


def _any_trained(modules: Iterable[nn.Module]) -> bool:
    """Whether one of them is; also if there is none that is known."""
    known = [p.requires_grad for module in modules for p in module.parameters()]
    return any(known) or not known


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


@dataclass(frozen=True)
class Sharding:
    """Which part of weights, gradients and optimiser a rank holds: ZeRO's stage, over how many ranks.

    Stage 0 is a plain PyTorch loop: everything in the model's type, on every rank.
    """

    stage: int = 0
    ranks: int = 1
    bucket: int = 0
    """Gradients that are reduced together, in elements."""
    buckets: int = 1
    """Two where one is filled while the other is reduced (`overlap_comm`)."""
    most_gathered: int = 0
    """Stage 3: weights that may be whole at once, in elements (`stage3_max_live_parameters`)."""
    gathered_together: int = 0
    """Stage 3: weights that one message brings, in elements (`stage3_prefetch_bucket_size`)."""
    offload_optimizer: bool = False
    offload_weights: bool = False

    @classmethod
    def of(cls, deepspeed_config: dict[str, Any], *, ranks: int) -> Sharding:
        """From DeepSpeed's configuration; where it says nothing, DeepSpeed's defaults."""
        zero = deepspeed_config.get("zero_optimization", {})

        def offloads(what: str) -> bool:
            return (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"

        stage = zero.get("stage", 0)
        return cls(
            stage=stage,
            ranks=ranks,
            bucket=_elements(zero.get("reduce_bucket_size"), 5e8),
            # Stage 3 reduces out of one bucket; 1 and 2 fill a second one meanwhile.
            buckets=2 if zero.get("overlap_comm", False) and stage < 3 else 1,
            most_gathered=_elements(zero.get("stage3_max_live_parameters"), 1e9),
            gathered_together=_elements(zero.get("stage3_prefetch_bucket_size"), 5e7),
            offload_optimizer=offloads("optimizer"),
            offload_weights=offloads("param"),
        )


UNSHARDED = Sharding()


def _elements(value: Any, default: float) -> int:
    return int(default if value in (None, "auto") else value)


@dataclass(frozen=True)
class Setup:
    """What is the same in every forward of a run."""

    sizes: ModelSizes
    element_bytes: int
    """2 for bfloat16, 4 for float32: of weights and activations."""
    device: str
    """"cuda" or "cpu". On the CPU there is nowhere to offload to, and memory that nobody wrote to is free."""
    liger: bool = False
    dense_mask: bool = False
    """Whether attention reads a (tokens × tokens) mask: the flex engine on the CPU."""
    hidden_anchors: bool = False
    """Whether the flash engine attends to anchors by a call of their own, because a window hides them."""
    sharding: Sharding = UNSHARDED
    ring_degree: int = 1
    ulysses_degree: int = 1


@dataclass(frozen=True)
class Peak:
    """The moment of a step in which a rank holds most, and what it holds then, in bytes."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        held = ", ".join(f"{part} {as_text(size)}" for part, size in self.parts.items() if size)
        return f"{as_text(self.total)} in {self.moment} ({held})"


def as_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def expected_peak(setup: Setup, treatment: Treatment, tokens: int) -> Peak:
    """Of a forward of `tokens` tokens on this rank, its backward, and the update behind it.

    Gradients of earlier micro-batches are there.
    """
    states = bytes_of_states(setup)
    activations = _activations(setup, treatment, tokens)
    computing = states.always | states.while_computing
    reducing = computing | states.while_reducing
    moments = [
        Peak("the loss", computing | activations.at_loss),
        Peak("the reduction of the head's gradient", reducing | activations.before_layers),
        *(
            Peak(f"the backward of layer {layer}", reducing | parts)
            for layer, parts in enumerate(activations.in_layers)
        ),
        Peak("the update", states.always | states.in_update | activations.of_batch),
    ]
    return max(moments, key=lambda moment: moment.total)


@dataclass(frozen=True)
class States:
    """What a rank holds whatever the tokens, by what it is for, in bytes."""

    always: dict[str, int]
    while_computing: dict[str, int]
    """Besides, in forward and backward."""
    while_reducing: dict[str, int]
    """Besides, in the backward, behind the loss."""
    in_update: dict[str, int]
    """Besides, in the optimiser's update."""


def bytes_of_states(setup: Setup) -> States:
    """DeepSpeed keeps a float32 copy of the weights, two float32 moments and float32 sums of gradients."""
    zero, b = setup.sharding, setup.element_bytes
    all_of_them, trained = setup.sizes.parameters, setup.sizes.trained
    part = -(-trained // zero.ranks)
    head = setup.sizes.vocabulary * setup.sizes.hidden
    largest = setup.sizes.largest_trained or min(head, trained)
    # Allocated whole; on the CPU only what is written to is there.
    bucket = zero.bucket if setup.device == "cuda" else min(zero.bucket, trained)
    in_bucket = min(zero.bucket, trained)

    weights, gathered, kept_bucket, buckets, in_transit = b * all_of_them, 0, 0, 0, 0
    if zero.stage == 0:
        optimizer, gradients = 2 * b * trained, b * trained
        # PyTorch's AdamW makes √v of all weights at once on CUDA, of one after the other on the CPU.
        update = b * trained if setup.device == "cuda" else 2 * b * largest
    else:
        optimizer = 12 * part  # float32 weights and two moments
        update = 8 * part  # √v, twice
    if zero.stage == 1:
        # The sums of all gradients; under bfloat16, those of one backward beside them.
        gradients = 4 * trained if b == 4 else (4 + b) * trained
        buckets = 4 * zero.buckets * bucket if b == 4 else 0
    if zero.stage >= 2:
        gradients = 4 * part
        # They travel in float32, as a copy in the ranks' order. Stage 2's buckets are in the model's type:
        # under bfloat16, a copy more.
        in_transit = (8 if zero.stage == 2 and b == 2 else 4) * in_bucket
        # What does not fit into it travels alone, as two copies; in stage 2 the one before is there still.
        if largest > zero.bucket:
            in_transit = max(in_transit, (12 if zero.stage == 2 else 8) * largest)
    if zero.stage == 2:
        buckets = b * zero.buckets * bucket
    if zero.stage == 3:
        weights = b * -(-all_of_them // zero.ranks)
        kept_bucket = 4 * bucket
        in_transit += -(-in_transit // zero.ranks)
        update = 12 * part  # and the part's gradients as one tensor
        if zero.ranks > 1 or zero.offload_weights:
            # The head is read outside its module, and stays whole besides. What one message brings is there
            # as the message, too.
            gathered = min(all_of_them, zero.most_gathered + head)
            gathered = b * (gathered + min(gathered, zero.gathered_together))
    if setup.device == "cuda":
        if zero.offload_optimizer:
            optimizer = update = 0
            gradients = b * trained if zero.stage == 1 else 0
        if zero.offload_weights:
            weights = 0

    return States(
        always={
            "weights": weights,
            "optimiser": optimizer,
            "gradients": gradients,
            "bucket of gradients": kept_bucket,
        },
        while_computing={
            "gathered weights": gathered,
            "buckets of gradients": buckets,
            "a new gradient": b * largest,  # before it is added to the others
        },
        while_reducing={"gradients in reduction": in_transit},
        in_update={"update": update},
    )


def bytes_on_host(setup: Setup, treatment: Treatment, tokens: int) -> int:
    """What a rank keeps in the host's memory: what ZeRO offloads, and the checkpoints of a forward."""
    zero, sizes = setup.sharding, setup.sizes
    # The optimiser's states, and the sums of the gradients.
    held = 16 * -(-sizes.trained // zero.ranks) if zero.offload_optimizer else 0
    if zero.offload_weights:
        held += setup.element_bytes * -(-sizes.parameters // zero.ranks)
    if treatment.offload:
        one = setup.element_bytes * tokens * sizes.hidden
        held += sizes.layers * (1 << (one - 1).bit_length())  # PyTorch pins powers of two
    return held


@dataclass(frozen=True)
class _Activations:
    """By what they are for, in bytes."""

    of_batch: dict[str, int]
    """Of the whole model, as long as the micro-batch is there."""
    at_loss: dict[str, int]
    before_layers: dict[str, int]
    """The loss is done, the head's gradient is there."""
    in_layers: list[dict[str, int]]


def _activations(setup: Setup, treatment: Treatment, tokens: int) -> _Activations:
    """What a forward and backward of `tokens` tokens hold, at the loss and in each layer's backward.

    All lower-case figures are bytes per token, unless they say otherwise.
    """
    s, b = setup.sizes, setup.element_bytes  # b: bytes of an element of weights and activations
    kv_repeats = setup.ulysses_degree // gcd(s.kv_heads, setup.ulysses_degree)
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim * kv_repeats  # entries per token

    # --- What a layer keeps for its backward.
    # A norm: its input as float32, the normalised values and the output; Liger's, input and output alone.
    # 8: mean and root of the squares.
    norm = (2 * b if setup.liger else 4 + 2 * b) * s.hidden + 8
    attention = 2 * b * q + 2 * b * kv  # rotated queries and keys, values, the output
    attention += 4 * s.heads  # the log-sum-exp
    attention += 2 * b * kv * (setup.ring_degree - 1)  # keys and values of the other ranks, at most
    if setup.ulysses_degree > 1:
        attention += b * q  # the output, of all heads again
    if s.query_key_norm:
        attention += (b if setup.liger else 4 + b) * (q + kv)
    if setup.dense_mask:
        attention += b * tokens  # a row of the mask, as numbers
    written_scores = b * s.heads * tokens if setup.dense_mask and s.changed_scores else 0
    attention += 3 * written_scores  # tanh, scores and weights
    # gate, up, their product, and silu(gate), which Liger computes again
    mlp = 0 if treatment.tiled_mlp else (3 if setup.liger else 4) * b * s.intermediate
    whole_layer = 2 * norm + attention + mlp + b * s.adapter_ranks
    # Of that, what only the gradients of weights need goes at once where these are not trained: the
    # normalised values, the MLP's input and the product.
    spared = 0 if s.norms_trained or setup.liger else 2 * b * s.hidden
    if not s.mlps_trained and not treatment.tiled_mlp:
        spared += b * (s.hidden + s.intermediate)
    # A recomputed layer keeps its input, unless that waits in host memory.
    kept = [
        whole_layer - spared
        if not treatment.recomputes(layer)
        else (0 if treatment.offload else b * s.hidden)
        for layer in range(s.layers)
    ]
    # Of the whole model: cos and sin; tokens, labels, positions, documents; a row of the mask, as booleans.
    once = 2 * b * s.head_dim + 32 + (tokens if setup.dense_mask else 0)

    # What a norm's backward needs besides: the gradient of its input; without Liger, five steps of it in
    # float32, when the normalised values and the output are gone.
    norm_scratch = (b if setup.liger else 5 * 4 - 2 * b) * s.hidden

    # --- The loss: the last norm, the hidden states' gradient, and what the loss or that norm needs besides.
    leaving = LEAVING * b * s.hidden if treatment.offload else 0  # inputs on their way to the host
    before_layers = {"activations": tokens * (once + sum(kept) + leaving + norm + b * s.hidden)}
    loss = {"loss": max(_bytes_of_loss(setup, tokens), tokens * norm_scratch)}

    # --- The backward of a layer. What its parts need besides what the layer kept, whichever needs most:
    gradient = b * s.hidden  # of the residual stream
    if treatment.tiled_mlp:
        tile = min(treatments.TILE_TOKENS, tokens)
        # Gradients of the MLP's input and, padded to whole tiles, of its output; a tile's activations and
        # their gradients.
        mlp_scratch = tokens * 2 * b * s.hidden
        mlp_scratch += tile * b * (s.hidden + (4 if setup.liger else 6) * s.intermediate)
        if b < 4 and s.mlps_trained and not s.adapter_ranks:
            mlp_scratch += 4 * 3 * s.hidden * s.intermediate  # float32 sums of weights' gradients
    else:
        # Gradients of two (tokens × intermediate) tensors; Liger's take the place of what was kept.
        mlp_scratch = tokens * (1 if setup.liger else 2) * b * s.intermediate
    attention_scratch = b * (2 * q + 2 * kv)  # gradients of output, queries, keys, values
    attention_scratch += 3 * written_scores
    if setup.device == "cuda":
        attention_scratch += 4 * q  # FlashAttention's sum of the queries' gradients
        attention_scratch += 2 * b * q if kv < q else 0  # and keys' and values', per query head
    if setup.ulysses_degree > 1:
        attention_scratch += 2 * b * q  # what is exchanged, by rank: sent and received
    if setup.hidden_anchors:
        attention_scratch += 2 * b * q  # gradients of output and queries once more, of that call
    at_work = max(
        mlp_scratch,
        tokens * (norm_scratch - mlp),  # what the MLP kept is gone by then
        tokens * (attention_scratch - mlp - norm),
    )

    in_layers = []
    for layer in range(s.layers):
        recomputed = spared  # or, where nothing is, what is there for a moment
        if treatment.recomputes(layer):
            recomputed = whole_layer
            if setup.liger or b == 4:  # its first norm keeps the input, which was kept before
                recomputed -= b * s.hidden
            if treatment.offload:  # its own input, and the next one on its way back
                recomputed += 2 * b * s.hidden
        in_layers.append(
            {
                "activations": tokens * (once + sum(kept[: layer + 1]) + gradient),
                "layer at work": tokens * recomputed + at_work,
            }
        )
    return _Activations({"batch": tokens * once}, before_layers | loss, before_layers, in_layers)


def _bytes_of_loss(setup: Setup, tokens: int) -> int:
    """What the loss of `loss.py` needs at once besides the hidden states and their gradient."""
    s, b = setup.sizes, setup.element_bytes
    head = s.vocabulary * s.hidden if s.head_trained else 0  # its gradient, in elements
    if setup.liger:  # chunks of tokens, so that their logits take what the hidden states take
        chunk = 1 << (-(-tokens // -(-s.vocabulary // s.hidden)) - 1).bit_length()
        # Logits, overwritten by their gradient; the head's gradient, in float32 and then rounded.
        return b * min(chunk, tokens) * s.vocabulary + (4 + b) * head
    tile = min(loss.tile_tokens(s.vocabulary, capped=s.capped_logits), tokens)
    logits = tile * s.vocabulary
    slopes = 4 * logits if s.capped_logits else 0
    forward = 4 * logits + 4 * head + slopes
    if b < 4:  # products in the model's type: of this tile, and those of the one before
        forward += b * (2 if tile < tokens else 1) * logits
        # Later the tile's rounded gradient, and its product by the hidden states or the head: the head's is
        # added to float32, for which the CPU makes a copy of it.
        added = (b if setup.device == "cuda" else b + 4) * head
        rounded = (4 + b) * logits + 4 * head + max(added, b * tile * s.hidden)
        forward = max(forward, rounded + slopes)
    # The gradients of head and hidden states once more, scaled.
    backward = (8 if b == 4 else 8 + b) * head + b * tokens * s.hidden
    return max(forward, backward)
