"""What rounding does to RoPE: the change of attention when every position moves by the same shift.

RoPE is a relative encoding: in exact arithmetic a common shift changes no score (arXiv 2104.09864). In
bfloat16 it does (arXiv 2411.13476, section 3). The measurement takes queries and keys as a layer's
projections give them, computes scores and weights at the positions p and at p + shift, once in float64
and once in the arithmetic under test, and splits the change in two that are never added up:

    exact     the change in float64: zero, unless a position stays while the others move (the anchor's)
    rounding  the change in the arithmetic under test, less the exact part

Guarantees: the float64 side is exact to its own rounding, at any length: transformers' frequencies are
float32 numbers of 24 bits and positions integers of fewer than 29, so their product has no error.
Costs: no S × S memory, but for the mask of a sliding window in the model's own forward. A sample of the
queries meets all keys, one key/value head at a time: some ten tensors of (queries × heads per key/value
head × S) float64 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from anchor_context.precision.arithmetic import EXACT, Arithmetic, Rope, attention, round_to
from anchor_context.precision.arrangement import Arrangement


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
            attend = partial(
                _attend,
                round_to(query[heads], dtype),
                round_to(key[kv_head], dtype),
                arrangement=arrangement,
                queries=queries,
                starts=starts,
                visible=visible,
                rope=rope,
                scale=scale,
            )
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
                        summaries = _summaries(exact, rounding, visible, starts)
                        for head, summary in enumerate(summaries):
                            name = (case.label, arrangement.name, shift, layer)
                            name = (*name, kv_head * per_head + head, quantity)
                            yield Change(*name, **summary, first_key_error=first_key_error)
                            if by_token:
                                yield TokenChange(*name, profiles[head])


def _attend(
    query: Tensor,
    key: Tensor,
    shift: int,
    arithmetic: Arithmetic,
    *,
    arrangement: Arrangement,
    starts: Tensor,
    **how,
) -> tuple[dict[str, Tensor], Tensor]:
    """The quantities of attention after a shift, and the rotated keys of the first tokens seen, `starts`.

    Other arguments as `arithmetic.attention`.
    """
    logits, weights, rotated_key = attention(
        query, key, positions=arrangement.shifted(shift), arithmetic=arithmetic, **how
    )
    return {"logit": logits, "weight": weights}, rotated_key[starts]


def _summaries(
    exact: Tensor, rounding: Tensor, visible: Tensor, starts: Tensor
) -> list[dict[str, float]]:
    """Of each head's `Change`, from absolute changes (heads, queries, S), zero where not visible."""
    pairs, queries = visible.sum(), len(starts)
    row = torch.arange(queries, device=starts.device)
    exact_sum, rounding_sum = exact.sum(dim=(1, 2)), rounding.sum(dim=(1, 2))
    first_exact = exact[:, row, starts].sum(dim=1)
    first_rounding = rounding[:, row, starts].sum(dim=1)
    share = torch.where(rounding_sum > 0, first_rounding / rounding_sum, 0.0)
    columns = {
        "exact_mean": exact_sum / pairs,
        "exact_max": exact.amax(dim=(1, 2)),
        "exact_sum_per_query": exact_sum / queries,
        "rounding_mean": rounding_sum / pairs,
        "rounding_max": rounding.amax(dim=(1, 2)),
        "rounding_sum_per_query": rounding_sum / queries,
        "first_exact_mean": first_exact / queries,
        "first_rounding_mean": first_rounding / queries,
        "first_share": share,
        "first_share_over_average": share * pairs / queries,
    }
    by_head = torch.stack(list(columns.values()), dim=1).tolist()  # a GPU is waited for once
    return [dict(zip(columns, numbers, strict=True)) for numbers in by_head]


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
