"""What the data room's tests share: small tokenizers, and data sets written in the two formats."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anchor_context.data.options import DataOptions
from anchor_context.data.prepare import prepare_rows
from anchor_context.data.rows import PreparedRows


def byte_tokenizer(*, bos: bool = True, words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token per byte, after `</s>` = 0 and, with `bos`, `<s>` = 1. Ids change with `words`."""
    special = ["</s>", "<s>"] if bos else ["</s>"]
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    model = models.BPE({token: i for i, token in enumerate(vocabulary)}, [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>" if bos else None
    )


BYTES = byte_tokenizer()
EOS, BOS = 0, 1


def write_texts(path: Path, texts: list, **more) -> Path:
    """A raw_json file. Records are texts, or raw lines as bytes."""
    lines = [
        text if isinstance(text, bytes) else json.dumps({"text": text, **more}).encode()
        for text in texts
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_token_rows(path: Path, rows: list[list[list[int]]]) -> Path:
    """A tokenized file: each row a list of documents."""
    lines = []
    for documents in rows:
        ends = [sum(map(len, documents[: i + 1])) for i in range(len(documents))]
        row = {
            "input_ids": [token for document in documents for token in document],
            "source": [{"end": end} for end in ends],
        }
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


def prepare(dataset, cache: Path, **options) -> PreparedRows:
    """`prepare_rows` with the byte tokenizer and raw_json, unless told otherwise."""
    settings = {
        "tokenizer": BYTES,
        "vocab_size": 1 << 20,
        "anchor_placement": "per_document",
        "num_proc": 1,
    }
    settings |= {name: options.pop(name) for name in settings if name in options}
    names = [str(name) for name in dataset] if isinstance(dataset, list) else str(dataset)
    shape = DataOptions(**{"seq_length": 64, "seed": 0} | options)
    return prepare_rows(names, shape, cache_dir=cache, **settings)


def file_bytes(prepared: PreparedRows) -> dict[str, bytes]:
    """Everything in a prepared set, by file name."""
    files = [path for path in prepared.directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(prepared.directory)): path.read_bytes() for path in files}
