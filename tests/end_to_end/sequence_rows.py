"""Tokenised rows whose documents lie where sequence parallelism could go wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ROW = 240
KINDS = {  # documents of a row, in tokens, the first of each the BOS; a quarter of a row is 60
    "one document fills the row": [ROW],
    "200 documents": [1] * 180 + [3] * 20,
    "documents end exactly at a chunk's edge": [60, 53, 7, 120],
    "a document of one token at the edge": [59, 1, 1, 59, 59, 1, 60],
    "odd prime lengths": [13, 101, 3, 31, 61, 7, 5, 19],
}


def write_rows(path: Path, *, bos: int, vocab_size: int) -> None:
    """Four rows of each kind, and a last row of one short document: the rest of it is padding."""
    rng = np.random.default_rng(0)
    with path.open("w") as stream:
        for lengths in [*list(KINDS.values()) * 4, [20]]:
            # Tokens from a small set, so that there is something to learn in ten steps.
            tokens = rng.integers(vocab_size // 2, vocab_size // 2 + 20, sum(lengths))
            tokens[np.cumsum([0, *lengths[:-1]])] = bos
            source = [{"end": int(end)} for end in np.cumsum(lengths)]
            stream.write(json.dumps({"input_ids": tokens.tolist(), "source": source}) + "\n")
