"""Documents kept out of training, for validation (`--eval_documents`).

They are drawn from all documents by the seed: the last ones of the data would often be of a single source.
Documents equal to one of them, token by token, are left out of training, too. They lie beside the rows as
`held_out.jsonl`, in the tokenized format: data like any other, for `train.py` and `evaluate ppl` alike.

Guarantees: the same data, seed and number give the same documents; none of them is ever laid in a row. A
near copy (another header, a page of another document) is no equal one, and stays in training.
Costs: the documents as long as one of them are read once, before sampling and packing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from anchor_context.data.store import TokenStore

HELD_OUT = "held_out.jsonl"


@dataclass(frozen=True)
class HeldOut:
    """Which documents of a store are kept out. Numbers are those of the store, increasing."""

    documents: np.ndarray
    """(documents,) int64: to validate on."""
    copies: np.ndarray
    """(copies,) int64: equal to one of them, and left out."""
    rest: np.ndarray
    """(others,) int64: to train on."""


def hold_out(store: TokenStore, *, documents: int, seed: int) -> HeldOut:
    """Draw so many documents; 0 for none.

    Raises:
        ValueError: nothing of a source would be left to train on.
    """
    total = len(store.lengths)
    if not documents:
        none = np.zeros(0, np.int64)
        return HeldOut(none, none, np.arange(total))
    drawn = np.random.default_rng(seed).permutation(total)[:documents]
    held = np.sort(drawn)
    others = np.setdiff1d(np.arange(total), held)
    known = set(_digests(store, held))
    candidates = others[np.isin(store.lengths[others], store.lengths[held])]
    equal = [digest in known for digest in _digests(store, candidates)]
    copies = candidates[np.array(equal, bool)]
    rest = np.setdiff1d(others, copies)
    left = np.bincount(store.source_ids[rest], minlength=len(store.sources))
    if not left.all():
        raise ValueError(
            f"--eval_documents {documents}: of the {total:,} documents of the data none of the source "
            f"{store.sources[int(left.argmin())]!r} would be left to train on; hold out fewer"
        )
    return HeldOut(held, copies, rest)


def write_held_out(path: Path, store: TokenStore, held: np.ndarray, *, source: str | None) -> None:
    """The documents numbered `held` as JSON lines in the tokenized format.

    Args:
        source: the column of the source's name, if it is known.
    """
    with path.open("w") as stream:
        for tokens, number in store.documents(held):
            name = {} if source is None else {source: store.sources[number]}
            record = {"input_ids": tokens.tolist(), "source": [{"end": len(tokens), **name}]}
            stream.write(json.dumps(record) + "\n")


def _digests(store: TokenStore, documents: np.ndarray) -> list[bytes]:
    return [sha256(tokens).digest() for tokens, _ in store.documents(documents)]
