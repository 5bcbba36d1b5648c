"""`ppl`: perplexity by position, of documents in any form that train.py reads."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from anchor_context.attention.patterns import find_anchor_id
from anchor_context.data.documents import DATA_FORMATS, DocumentReader
from anchor_context.data.sources import find_inputs, read_portions
from anchor_context.evaluate.commands.common import positive, write
from anchor_context.evaluate.perplexity import every_document_rows, perplexity_rows, token_losses
from anchor_context.evaluate.plots import perplexity_curve


def add_flags(add: Callable) -> None:
    add("--dataset", required=True, help="documents, in any form train.py reads")
    add("--data_format", "--data-format", default="raw_json", choices=DATA_FORMATS)
    add("--text_column", "--text-column", default="text", help="the column of the text")
    add(
        "--parse_special_tokens",
        "--parse-special-tokens",
        action="store_true",
        help="take <s>, </s>, … written in a text for the tokens",
    )
    add(
        "--skip_bad_documents",
        "--skip-bad-documents",
        action="store_true",
        help="leave out records that are damaged or have no text, and say how many",
    )
    add(
        "--every_document",
        "--every-document",
        action="store_true",
        help="short ones, too, and their ends: what validation measures of each document alone",
    )
    add(
        "--documents",
        type=positive,
        help="at most so many, from the start; default: 50, or all with --every_document",
    )


def documents_to_measure(
    flags: argparse.Namespace, tokenizer, state: PartialState
) -> Iterator[Tensor]:
    """(tokens,) int64 of each document: the anchor, then its tokens, none behind the longest length.

    With --every_document a document may be shorter, and the target of its last token at that length is kept.

    Raises:
        ValueError: there is none, or a record is bad and --skip_bad_documents was not given.
    """
    every, most = flags.every_document, flags.documents or (None if flags.every_document else 50)
    reader = DocumentReader(
        tokenizer,
        flags.data_format,
        vocab_size=len(tokenizer),
        text_column=flags.text_column,
        skip_bad_documents=flags.skip_bad_documents,
        parse_special_tokens=flags.parse_special_tokens,
    )
    anchor, needed = torch.tensor([find_anchor_id(tokenizer)]), max(flags.lengths) - 1
    found, longest = 0, 0
    for portion in read_portions(find_inputs(flags.dataset), reader.columns):
        documents = reader(portion)
        if bad := documents.skipped:
            first = (
                f"{bad[0]['file']}, {bad[0].get('line', bad[0].get('row'))}: {bad[0]['problem']}"
            )
            state.print(f"note: bad documents skipped: {len(bad)}; the first: {first}")
        tokens = torch.from_numpy(documents.tokens).long()
        for document in tokens.split(documents.lengths.tolist()):
            if not every and flags.data_format == "raw_json":
                document = document[:-1]  # the reader's EOS: an end is not what is asked
            document = document[int(torch.equal(document[:1], anchor)) :]  # it is not doubled
            if every:
                document = document[: needed + 1]
            else:
                longest = max(longest, len(document))
                document = document[:needed] if len(document) >= needed else document[:0]
            if len(document):
                yield torch.cat((anchor, document))
                found += 1
                if found == most:
                    return
    if not found:
        raise ValueError(
            f"--dataset {flags.dataset}: no document fills --lengths {max(flags.lengths)}; the longest "
            f"has {longest} tokens: give shorter --lengths or longer documents"
        )


def evaluate_perplexity(
    flags: argparse.Namespace,
    state: PartialState,
    model: PreTrainedModel,
    tokenizer,
    documents: list[Tensor],
) -> None:
    mine = range(state.process_index, len(documents), state.num_processes)
    losses = [
        (number, token_losses(model, documents[number]))
        for number in tqdm(mine, unit="document", disable=not state.is_main_process)
    ]
    losses = [loss for _, loss in sorted(gather_object(losses), key=lambda pair: pair[0])]
    if not state.is_main_process:
        return
    rows_of = every_document_rows if flags.every_document else perplexity_rows
    rows = rows_of(losses, flags.lengths)
    for row in rows:
        if row["kind"] == "length":
            last = row["last"]
            what = (
                f"positions to {last:,}" if flags.every_document else f"first {last + 1:,} tokens"
            )
            print(f"ppl of the {what}: {row['perplexity']:.4g}")
    figure = perplexity_curve(rows, title=f"perplexity by position: {Path(flags.model).name}")
    write(flags, figure, rows, rows)
