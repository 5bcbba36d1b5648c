"""How often each document is laid: long ones upsampled within their source, sources mixed by weight.

Upsampling long documents *within* each source, instead of taking the sources that have long ones,
keeps the mixture of the data (Fu et al., "Data Engineering for Scaling Language Models to 128K
Context", arXiv 2402.10171).

Guarantees: the sampled epoch has as many tokens as the data; each source's share of them is what
it was, or what `--mixture` says, to within one document of each length class; the seed decides.
Costs: some documents are laid several times and, to make room, others not at all; the report counts them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Upsampling:
    """Documents longer than `tokens` count `factor` times as much as the others of their source."""

    factor: float
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Upsampling:
        """Read "FACTOR@TOKENS". Raises `ValueError` for anything else, and for a factor below 1."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)@(\d+)", text)
        if not match or float(match[1]) < 1:
            raise ValueError(
                f"--upsample_long {text} is not FACTOR@TOKENS with a factor of 1 or more; "
                "for example 5@4096"
            )
        return cls(float(match[1]), int(match[2]))


def parse_mixture(text: str) -> dict[str, float]:
    """Read "source=weight,..." -> each source's share, summing to 1.

    Raises:
        ValueError: not of this form, a source named twice, or no positive weight.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = part.rpartition("=")
        if not equals or not name or not re.fullmatch(r"\d*\.?\d+", weight) or name in weights:
            raise ValueError(
                f"--mixture {text}: {part!r} is not source=weight, or names a source again; "
                "for example books=0.3,code=0.7"
            )
        weights[name] = float(weight)
    total = sum(weights.values())
    if not total:
        raise ValueError(f"--mixture {text} gives every source the weight 0")
    return {name: weight / total for name, weight in weights.items()}


def copies(
    lengths: np.ndarray,
    source_ids: np.ndarray,
    sources: list[str],
    *,
    upsampling: Upsampling | None,
    mixture: dict[str, float] | None,
    seed: int,
) -> np.ndarray:
    """How many times each document is laid, (documents,) int64.

    Args:
        lengths: (documents,) tokens.
        source_ids: (documents,) into `sources`.

    Raises:
        ValueError: the mixture names a source that the data lack, or leaves one of theirs out.
    """
    tokens = np.bincount(source_ids, weights=lengths, minlength=len(sources))
    shares = tokens / tokens.sum()
    if mixture is not None:
        if set(mixture) != set(sources):
            raise ValueError(
                f"--mixture names {sorted(mixture)}, the data have the sources {sorted(sources)}; "
                "give each of them a weight, 0 to leave it out"
            )
        shares = np.array([mixture[name] for name in sources])
    factor, longest_short = (
        (upsampling.factor, upsampling.tokens) if upsampling else (1.0, np.iinfo(np.int64).max)
    )
    is_long = lengths > longest_short
    result = np.zeros(len(lengths), np.int64)
    for source in range(len(sources)):
        wanted = shares[source] * tokens.sum()
        of_source = source_ids == source
        weighted = lengths[of_source] @ np.where(is_long[of_source], factor, 1.0)
        for long, weight in ((False, 1.0), (True, factor)):
            members = np.flatnonzero(of_source & (is_long == long))
            rng = np.random.default_rng((seed, source, int(long)))
            result[members] = _copies_at_rate(lengths[members], weight * wanted / weighted, rng)
    return result


def _copies_at_rate(lengths: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Copies that make `rate` times the tokens, to within half a document.

    Each document is laid `floor(rate)` times, and once more the first of a random order, up to the
    tokens that are still missing.
    """
    whole = int(rate)
    result = np.full(len(lengths), whole)
    order = rng.permutation(len(lengths))
    up_to = np.cumsum(lengths[order], dtype=np.float64)
    missing = (rate - whole) * lengths.sum()
    result[order[up_to - lengths[order] / 2 < missing]] += 1
    return result


def laying_order(copies: np.ndarray) -> np.ndarray:
    """Document numbers in the order they are laid: rounds through the data, so copies lie far apart."""
    rounds = [np.flatnonzero(copies > k) for k in range(int(copies.max(initial=0)))]
    return np.concatenate(rounds) if rounds else np.zeros(0, np.int64)
