"""What rounding does to RoPE: the change of attention when every position moves by the same shift.

RoPE is a relative encoding: in exact arithmetic a common shift changes no score (arXiv 2104.09864). In
bfloat16 it does (arXiv 2411.13476, section 3). The measurement takes queries and keys as a layer's
projections give them, computes scores and weights at the positions p and at p + shift, once in float64
and once in the arithmetic under test, and splits the change in two that are never added up:

    exact     the change in float64: zero, unless a position stays while the others move (the anchor's)
    rounding  the change in the arithmetic under test, less the exact part

Guarantees: the float64 side is exact to its own rounding, at any length: transformers' frequencies are
float32 numbers of 24 bits and positions integers of fewer than 29, so their product has no error. A model
whose attention is not the one computed here is refused (`check_attention`).
Costs: no S × S memory, but for the mask of a sliding window in the model's own forward. A sample of the
queries meets all keys, one key/value head at a time: some ten tensors of (queries × heads per key/value
head × S) float64 numbers.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anchor_context.rope.float32 import rotary_tables, rotating_layers, wrap_rotation


@dataclass(frozen=True)
class Arithmetic:
    """The floating-point type of each step, in the order of the computation; float64 is exact here."""

    angles: torch.dtype = torch.float64
    """position × frequency, and its cosine and sine"""
    tables: torch.dtype = torch.float64
    """cos and sin as the rotation reads them"""
    rotation: torch.dtype = torch.float64
    """the two products of the rotation"""
    kernel: torch.dtype = torch.float64
    """rotated queries and keys as the attention kernel reads them"""
    score: torch.dtype = torch.float64
    """the score: float32 in a flash kernel, the model's type in transformers' eager attention"""


EXACT = Arithmetic()
STEPS = tuple(field.name for field in fields(Arithmetic))


def model_arithmetic(dtype: torch.dtype) -> Arithmetic:
    """What transformers and a flash kernel do in a model of this type."""
    return Arithmetic(torch.float32, dtype, dtype, dtype, torch.float32)


def float32_rotation(dtype: torch.dtype) -> Arithmetic:
    """What `rotate_in_float32` makes of it: only the rotated queries and keys are rounded to the type."""
    return Arithmetic(torch.float32, torch.float32, torch.float32, dtype, torch.float32)


def eager_arithmetic(dtype: torch.dtype) -> Arithmetic:
    """What transformers' eager attention does: the scores too are of the model's type."""
    return replace(model_arithmetic(dtype), score=dtype)


def each_step(dtype: torch.dtype) -> Iterator[tuple[str, str, Arithmetic]]:
    """(step, "alone" or "up to here", arithmetic) for every step of transformers' eager attention."""
    eager = eager_arithmetic(dtype)
    so_far = EXACT
    for step in STEPS:
        rounded = {step: getattr(eager, step)}
        yield step, "alone", replace(EXACT, **rounded)
        so_far = replace(so_far, **rounded)
        yield step, "up to here", so_far


@dataclass(frozen=True)
class Arrangement:
    """Positions and visibility in a row of S tokens. Token i sees the tokens starts[i] … i."""

    name: str
    positions: Tensor
    """(S,) int64"""
    starts: Tensor
    """(S,) int64: the first token that each token sees."""
    fixed: Tensor
    """(S,) bool: whose position stays when the others move (the anchors)."""

    def shifted(self, shift: int) -> Tensor:
        return self.positions + shift * ~self.fixed

    def seen(self, queries: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """The first token that each query sees, (queries,) int64, and all that it does, (queries, S) bool.

        `window` (tokens, the query included, as transformers counts) hides what is farther, but no
        anchor: as `attention.patterns.mask_predicate` has it.
        """
        starts, index = self.starts[queries], torch.arange(len(self.starts), device=queries.device)
        window = len(index) if window is None else window
        starts = torch.where(self.fixed[starts], starts, starts.maximum(queries - window + 1))
        query, start = queries[:, None], starts[:, None]
        near = (index > query - window) | (index == start)
        return starts, near & (start <= index) & (index <= query)


@dataclass(frozen=True)
class Rope:
    """What a model's rotary table computes from."""

    inv_freq: Tensor
    """(head_dim / 2,) float32"""
    attention_scaling: float

    def tables(self, positions: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
        """cos and sin, each (tokens, head_dim), rounded as told and held in float64."""
        angle = positions.to(arithmetic.angles)[:, None] * self.inv_freq.to(arithmetic.angles)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
        return _round(cos, arithmetic.tables), _round(sin, arithmetic.tables)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Rotate x (…, tokens, head_dim) float64, step by step as transformers' `apply_rotary_pos_emb`."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotated = _round(x * cos, arithmetic.rotation) + _round(turned * sin, arithmetic.rotation)
    return _round(rotated, arithmetic.kernel)


def scores(query: Tensor, key: Tensor, *, scale: float, arithmetic: Arithmetic) -> Tensor:
    """(heads, queries, keys) float64 from query (heads, queries, D) and key (keys, D).

    The product is rounded before it is scaled and again after, as transformers' eager attention does.
    """
    if arithmetic.score != torch.float64:  # every kernel accumulates in float32
        query, key = query.float(), key.float()
    return _round(_round(query @ key.T, arithmetic.score) * scale, arithmetic.score)


def attention(
    query: Tensor,
    key: Tensor,
    *,
    positions: Tensor,
    queries: Tensor,
    visible: Tensor,
    rope: Rope,
    scale: float,
    arithmetic: Arithmetic,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and weights, each (heads, queries, S), and the rotated keys (S, head_dim), all float64.

    Args:
        query: (heads, queries, head_dim) float64 of one key/value head's queries, not rotated.
        key: (S, head_dim) float64, not rotated.
        positions: (S,) int64. queries: (queries,) int64, their indices in the row.
        visible: (queries, S) bool.
    """
    cos, sin = rope.tables(positions, arithmetic)
    rotated_key = rotate(key, cos, sin, arithmetic)
    rotated = rotate(query, cos[queries], sin[queries], arithmetic)
    logits = scores(rotated, rotated_key, scale=scale, arithmetic=arithmetic)
    return logits, logits.masked_fill(~visible, -math.inf).softmax(dim=-1), rotated_key


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).double()


@dataclass(frozen=True)
class Case:
    """One measurement on a layer: how to compute, and what it is compared with."""

    label: str
    dtype: torch.dtype
    """Queries and keys are rounded to it before both sides are computed: this error is not RoPE's."""
    arithmetic: Arithmetic


@dataclass
class Change:
    """The change under a shift, for one head of one layer: what a line of change.csv holds.

    Of logits (scores × scale) or of weights (after softmax), over the sampled queries and all the keys
    they see. Sums per query are averaged over the queries.
    """

    arithmetic: str
    pattern: str
    shift: int
    layer: int
    head: int
    quantity: str
    exact_mean: float
    exact_max: float
    exact_sum_per_query: float
    rounding_mean: float
    rounding_max: float
    rounding_sum_per_query: float
    first_exact_mean: float
    """of the first token that each query sees"""
    first_rounding_mean: float
    first_share: float
    """of the first token in the sum of the rounding part"""
    first_share_over_average: float
    """the same, over the share of an average token"""
    first_key_error: float
    """the largest error of the rotated key of the first token itself, any element"""


@dataclass
class TokenChange:
    """The rounding part by distance from the first token seen, of one head: a line of tokens.csv."""

    arithmetic: str
    pattern: str
    shift: int
    layer: int
    head: int
    quantity: str
    rounding_mean: dict[str, float]
    """"distance_0" (the first token itself), "distance_1", "distance_2_3", "distance_4_7", … -> the mean
    over the pairs at as many tokens after the first one, both ends included"""


@torch.no_grad()
def measure_layer(
    query: Tensor,
    key: Tensor,
    *,
    layer: int,
    queries: Tensor,
    rope: Rope,
    scale: float,
    window: int | None = None,
    arrangement: Arrangement,
    cases: list[Case],
    shifts: list[int],
    by_token: bool = False,
) -> Iterator[Change | TokenChange]:
    """Measure one layer.

    Args:
        query: (heads, queries, head_dim), not rotated: the sampled queries.
        key: (key/value heads, S, head_dim), not rotated.
        queries: (queries,) int64: their indices in the row.
        window: the layer's sliding window in tokens, the query included.
        by_token: yield a `TokenChange` with every `Change`.
    """
    starts, visible = arrangement.seen(queries, window)
    per_head = query.shape[0] // key.shape[0]
    distances = _Distances(starts, visible)
    for dtype in dict.fromkeys(case.dtype for case in cases):
        same = [case for case in cases if case.dtype == dtype]
        for kv_head in range(key.shape[0]):
            heads = slice(kv_head * per_head, (kv_head + 1) * per_head)
            q, k = _round(query[heads], dtype), _round(key[kv_head], dtype)

            def attend(shift: int, arithmetic: Arithmetic, q: Tensor = q, k: Tensor = k):
                logits, weights, rotated_key = attention(
                    q,
                    k,
                    positions=arrangement.shifted(shift),
                    queries=queries,
                    visible=visible,
                    rope=rope,
                    scale=scale,
                    arithmetic=arithmetic,
                )
                return {"logit": logits, "weight": weights}, rotated_key[starts]

            before, _ = attend(0, EXACT)
            before_rounded = [attend(0, case.arithmetic)[0] for case in same]
            for shift in shifts:
                after, first_key = attend(shift, EXACT)
                for case, rounded_before in zip(same, before_rounded, strict=True):
                    rounded_after, rounded_first_key = attend(shift, case.arithmetic)
                    first_key_error = (rounded_first_key - first_key).abs().max().item()
                    for quantity in after:
                        exact = after[quantity] - before[quantity]
                        rounding = rounded_after[quantity] - rounded_before[quantity] - exact
                        for parts in (exact, rounding):
                            parts.masked_fill_(~visible, 0).abs_()
                        profiles = distances.means(rounding) if by_token else []
                        for head in range(per_head):
                            name = (case.label, arrangement.name, shift, layer)
                            name = (*name, kv_head * per_head + head, quantity)
                            yield Change(
                                *name,
                                **_summary(exact[head], rounding[head], visible, starts),
                                first_key_error=first_key_error,
                            )
                            if by_token:
                                yield TokenChange(*name, profiles[head])


def _summary(exact: Tensor, rounding: Tensor, visible: Tensor, starts: Tensor) -> dict[str, float]:
    """The numbers of a `Change` from absolute changes (queries, S), zero where not visible."""
    pairs, queries = visible.sum().item(), len(starts)
    row = torch.arange(queries, device=starts.device)
    exact_sum, rounding_sum = exact.sum().item(), rounding.sum().item()
    first_exact = exact[row, starts].sum().item()
    first_rounding = rounding[row, starts].sum().item()
    share = first_rounding / rounding_sum if rounding_sum else 0.0
    return {
        "exact_mean": exact_sum / pairs,
        "exact_max": exact.max().item(),
        "exact_sum_per_query": exact_sum / queries,
        "rounding_mean": rounding_sum / pairs,
        "rounding_max": rounding.max().item(),
        "rounding_sum_per_query": rounding_sum / queries,
        "first_exact_mean": first_exact / queries,
        "first_rounding_mean": first_rounding / queries,
        "first_share": share,
        "first_share_over_average": share * pairs / queries,
    }


class _Distances:
    """Bins 0, 1, 2–3, 4–7, … of the distance from the first token seen."""

    def __init__(self, starts: Tensor, visible: Tensor):
        index = torch.arange(visible.shape[1], device=starts.device)
        distance = (index - starts[:, None]).clamp(min=0)
        self.bins = torch.where(distance > 0, distance.log2().floor().long() + 1, 0)
        self.count = torch.bincount(self.bins[visible], minlength=int(self.bins.max()) + 1)
        ranges = [f"distance_{2**n}_{2 ** (n + 1) - 1}" for n in range(1, len(self.count))]
        self.names = ["distance_0", "distance_1", *ranges][: len(self.count)]

    def means(self, rounding: Tensor) -> list[dict[str, float]]:
        """The mean of each head's (heads, queries, S), zero where not visible, in each bin with a pair."""
        sums = rounding.new_zeros(len(rounding), len(self.count))
        sums.index_add_(1, self.bins.flatten(), rounding.flatten(1))
        found, means = self.count > 0, (sums / self.count).tolist()
        return [
            {name: mean for name, mean, any_ in zip(self.names, head, found, strict=True) if any_}
            for head in means
        ]


def sample_queries(row_length: int, *, number: int) -> Tensor:
    """(number,) int64: query indices evenly over the row, the last token among them."""
    return torch.linspace(0, row_length - 1, min(number, row_length - 1) + 1).long()[1:]


@torch.no_grad()
def visit_layers(
    model: PreTrainedModel,
    input_ids: Tensor,
    visit: Callable[[int, Tensor, Tensor], None],
    *,
    queries: Tensor,
) -> None:
    """Run the base model on input_ids (1, S) and call `visit(layer, query, key)` on every layer's
    unrotated queries (heads, queries, head_dim) and keys (key/value heads, S, head_dim)."""
    layers = itertools.count()

    def record(rotate: Callable) -> Callable:
        layer = next(layers)

        def rotate_and_visit(query: Tensor, key: Tensor, *args, **kwargs):
            visit(layer, query[0][:, queries], key[0])
            return rotate(query, key, *args, **kwargs)

        return rotate_and_visit

    undo = wrap_rotation(model, record)
    try:
        model(input_ids, use_cache=False)
    finally:
        undo()


def rope_of(model: PreTrainedModel) -> Rope:
    """The frequencies of a model, float32 as transformers computes them.

    Raises:
        ValueError: they depend on the row's length.
    """
    table = rotary_tables(model)[0]
    if table.rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"{table.rope_type} RoPE has other frequencies at other lengths, so a shift changes it by "
            "intent; measure the model with rope_type default, linear, yarn or llama3"
        )
    return Rope(table.inv_freq, table.attention_scaling)


@dataclass(frozen=True)
class Scoring:
    """How one attention layer scores: `measure_layer`'s `scale` and `window`."""

    scale: float
    window: int | None


def scoring_of(model: PreTrainedModel) -> list[Scoring]:
    """Of every attention layer, in order.

    Raises:
        ValueError: layers that do not rotate, or do not say how they scale.
    """
    config, layers = model.config, rotating_layers(model)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if len(layers) != len(kinds):
        raise _unlike(model, f"only {len(layers)} of {len(kinds)} layers rotate")
    if not all(hasattr(layer, "scaling") for layer in layers):
        raise _unlike(model, "its layers do not say how they scale")
    return [
        Scoring(layer.scaling, window if kind == "sliding_attention" else None)
        for layer, kind in zip(layers, kinds, strict=True)
    ]


CHECKED_ROW, CHECKED_WINDOW = 48, 16
"""Tokens of the row on which a model's attention is checked, and of a sliding window there."""
AGREEMENT = 0.02
"""Of two weights, which lie in [0, 1]: above bfloat16's rounding, far below another attention."""


@torch.no_grad()
def check_attention(model: PreTrainedModel) -> None:
    """Raise `ValueError` unless this model's attention is the one that is measured here.

    In one forward of a short row, every layer gets queries and keys drawn at random, so that its
    weights are far from even whatever the model's weights; transformers' eager attention must give
    the weights that we compute.
    """
    drawn, generator = [], torch.Generator().manual_seed(0)

    def draw(rotate: Callable) -> Callable:
        def rotate_drawn(query: Tensor, key: Tensor, *args, **kwargs):
            query, key = (torch.randn(x.shape, generator=generator).to(x) for x in (query, key))
            drawn.append((query[0], key[0]))
            return rotate(query, key, *args, **kwargs)

        return rotate_drawn

    config = model.config
    own_window, own_attention = getattr(config, "sliding_window", None), config._attn_implementation
    undo = wrap_rotation(model, draw)
    try:
        model.set_attn_implementation("eager")
        if own_window:
            config.sliding_window = CHECKED_WINDOW  # masks are made from it
        rope, scoring = rope_of(model), scoring_of(model)
        ids = torch.arange(CHECKED_ROW, device=model.device)[None] % config.vocab_size
        theirs = model(ids, use_cache=False, output_attentions=True).attentions or ()
    finally:
        undo()
        model.set_attn_implementation(own_attention)
        if own_window:
            config.sliding_window = own_window
    if not len(drawn) == len(theirs) == len(scoring):
        raise _unlike(model, f"only {len(drawn)} of {len(scoring)} layers rotate")
    for number, (layer, weights) in enumerate(zip(drawn, theirs, strict=True)):
        ours = _eager_weights(*layer, rope=rope, scoring=scoring[number], dtype=model.dtype)
        if ours.shape != weights[0].shape:
            raise _unlike(model, f"layer {number} rotates a part of its heads")
        error = (ours - weights[0]).abs().max().item()
        if not error < AGREEMENT:
            raise _unlike(model, f"the weights of layer {number} differ by {error:.2g}")


def _eager_weights(
    query: Tensor, key: Tensor, *, rope: Rope, scoring: Scoring, dtype: torch.dtype
) -> Tensor:
    """(heads, S, S) float64 from query (heads, S, D), key (key/value heads, S, D), not rotated; empty
    where the rotation does not fit them."""
    positions, per_head = torch.arange(key.shape[1], device=key.device), len(query) // len(key)
    if query.shape[1:] != key.shape[1:] or query.shape[2] != 2 * len(rope.inv_freq) or not per_head:
        return query.new_empty(0)
    everything = Arrangement("full", positions, 0 * positions, positions < 0)
    _, visible = everything.seen(positions, scoring.window)
    weights = [
        attention(
            query[head].double()[None],
            key[head // per_head].double(),
            positions=positions,
            queries=positions,
            visible=visible,
            rope=rope,
            scale=scoring.scale,
            arithmetic=eager_arithmetic(dtype),
        )[1]
        for head in range(per_head * len(key))
    ]
    return torch.cat(weights)


def _unlike(model: PreTrainedModel, how: str) -> ValueError:
    return ValueError(
        f"{model.config.model_type}: its attention is not what the precision laboratory computes ({how}):"
        " in every layer all heads rotated whole and by halves, one set of frequencies, scores scaled, "
        "causal, at most a sliding window; measure LLaMA, Mistral, Qwen2, Qwen3 or another such model"
    )


@torch.no_grad()
def time_rotation(
    *, heads: int, kv_heads: int, row_length: int, rope: Rope, dtype: torch.dtype, repeats: int = 7
) -> dict[str, float]:
    """Median seconds to rotate one layer's queries and keys in the model's type, and in float32
    rounded once."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    device = rope.inv_freq.device
    head_dim = 2 * len(rope.inv_freq)
    query = torch.randn(1, heads, row_length, head_dim, device=device).to(dtype)
    key = torch.randn(1, kv_heads, row_length, head_dim, device=device).to(dtype)
    positions = torch.arange(row_length, device=device)
    tables = rope.tables(positions, replace(EXACT, angles=torch.float32))
    found = {}
    for name, table_dtype in (("model", dtype), ("float32", torch.float32)):
        cos, sin = (table[None].to(table_dtype) for table in tables)
        seconds = []
        for _ in range(repeats):
            _wait_for(device)
            start = time.perf_counter()
            for rotated in apply_rotary_pos_emb(query, key, cos, sin):
                rotated.to(dtype)
            _wait_for(device)
            seconds.append(time.perf_counter() - start)
        found[name] = median(seconds)
    return found


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
