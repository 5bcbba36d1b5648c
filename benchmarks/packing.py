"""How fast rows are prepared and collated, next to the bare tokenizer, and how many tokens they keep.

    python benchmarks/packing.py [--megabytes 32] [--row_length 65536]

Documents are the demo's, the Python standard library's source files, over and over; the tokenizer is a
byte-level BPE trained on them. Everything runs in one process; the tokenizer uses its own threads, for
itself and inside `prepare` alike. Rates are per second of processor time, all threads together: what one
core does, whatever else the machine does. The clock's rates stand beside them. `tokens_kept` is the share
of the documents' tokens that lie in rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import print_json, print_table
from transformers import PreTrainedTokenizerFast

from anchor_context.data.documents import token_ids
from anchor_context.data.loader import collate
from anchor_context.data.options import DataOptions
from anchor_context.data.prepare import prepare_rows
from anchor_context.data.rows import PreparedRows
from anchor_context.demo import standard_library_texts, train_tokenizer

REPEATS = 3


def seconds(run: Callable[[], object]) -> np.ndarray:
    """The median (processor, clock) time of `REPEATS` runs."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time(), time.perf_counter()
        run()
        times.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return np.median(times, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=32, help="of text")
    parser.add_argument("--row_length", type=int, default=65536, help="tokens")
    args = parser.parse_args()

    library = standard_library_texts(at_most_characters=4 << 20)
    tokenizer = train_tokenizer(library, vocab_size=8192)
    texts, size = [], 0
    while size < args.megabytes << 20:
        texts.append(library[len(texts) % len(library)])
        size += len(texts[-1])

    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), texts, tokenizer, row_length=args.row_length)

    print_table(
        {
            "stage": [line["stage"] for line in results],
            "million tokens/s": [f"{line['tokens_per_second'] / 1e6:.2f}" for line in results],
            "by the clock": [
                f"{line['tokens_per_second_by_the_clock'] / 1e6:.2f}" for line in results
            ],
            "tokens kept": [
                "" if line["tokens_kept"] is None else f"{line['tokens_kept']:.1%}"
                for line in results
            ],
        }
    )
    rates = {line["stage"]: line["tokens_per_second"] for line in results}
    share = rates["prepare raw_json"] / rates["bare tokenizer"]
    print(f"prepare runs at {share:.0%} of the bare tokenizer")
    print_json(
        "packing",
        device=torch.device("cpu"),
        ceiling={"bare_tokenizer_tokens_per_second": rates["bare tokenizer"]},
        results=results,
    )


def measure(
    folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast, *, row_length: int
) -> list[dict]:
    """Every stage's result, in the order of the work."""
    raw = folder / "raw.jsonl"
    raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents: list[list[int]] = []

    def bare() -> None:
        documents.clear()
        for start in range(0, len(texts), 64):
            documents.extend(token_ids(tokenizer, texts[start : start + 64]))

    run = 0

    def prepare(data: Path, data_format: str) -> PreparedRows:
        nonlocal run
        run += 1  # a fresh cache: nothing is reused
        return prepare_rows(
            str(data),
            DataOptions(data_format=data_format, seq_length=row_length),
            tokenizer=tokenizer,
            vocab_size=len(tokenizer),
            anchor_placement="per_document",
            cache_dir=folder / f"cache{run}",
        )

    bare_s = seconds(bare)
    raw_tokens = sum(map(len, documents)) + len(documents)  # and an EOS each
    raw_s = seconds(lambda: prepare(raw, "raw_json"))
    from_raw = prepare(raw, "raw_json")

    # Rows as Long-Context-Data-Engineering writes them: about 256,000 tokens, documents' ends aside.
    pretokenised = folder / "tokenized.jsonl"
    with pretokenised.open("w") as file:
        row: list[int] = []
        ends: list[int] = []
        for i, document in enumerate(documents):
            row += [tokenizer.bos_token_id, *document]
            ends.append(len(row))
            if len(row) >= 256_000 or i == len(documents) - 1:
                file.write(
                    json.dumps({"input_ids": row, "source": [{"end": e} for e in ends]}) + "\n"
                )
                row, ends = [], []
    row_tokens = sum(map(len, documents)) + len(documents)  # and a BOS each
    tokenized_s = seconds(lambda: prepare(pretokenised, "tokenized"))
    prepared = prepare(pretokenised, "tokenized")

    order = np.random.default_rng(0).permutation(len(prepared))

    def collate_all() -> None:
        for i in order:
            collate(prepared, [int(i)], pattern="anchor")

    collate_s = seconds(collate_all)
    laid = len(prepared) * row_length
    # Packing and collating one after the other: what a core does per pre-tokenised token.
    both_s = tokenized_s / row_tokens + collate_s / laid
    return [
        result("bare tokenizer", raw_tokens / bare_s, None),
        result(
            "prepare raw_json", raw_tokens / raw_s, from_raw.report["document_tokens"] / raw_tokens
        ),
        result(
            "prepare tokenized",
            row_tokens / tokenized_s,
            prepared.report["document_tokens"] / row_tokens,
        ),
        result("collate", laid / collate_s, None),
        result("pack and collate", 1 / both_s, None),
    ]


def result(stage: str, rates: np.ndarray, tokens_kept: float | None) -> dict:
    """One line of the table; `rates` by processor time and by the clock."""
    return {
        "stage": stage,
        "tokens_per_second": float(rates[0]),
        "tokens_per_second_by_the_clock": float(rates[1]),
        "tokens_kept": tokens_kept,
    }


if __name__ == "__main__":
    main()
