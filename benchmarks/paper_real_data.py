"""What `paper_real.py` extends, trains on and asks: a model, long rows, held-out documents, prompts.

Guarantees: no held-out document is trained on, nor a copy of it. The same flags give the same material; it
is made once and kept in the folder of the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import paper_small
import torch
from paper_data import make_data, prompts_of, rows_of
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from anchor_context.attention.patterns import find_anchor_id
from anchor_context.command_line import model_errors
from anchor_context.data.documents import token_ids
from anchor_context.data.options import DataOptions
from anchor_context.data.rows import PreparedRows
from anchor_context.data.texts import collect_texts
from anchor_context.data.tokenizer import load_tokenizer
from anchor_context.demo import make_smollm2
from anchor_context.evaluate.prompts import TASKS, Prompt
from anchor_context.files import whole


@dataclass(frozen=True)
class RealData:
    short: int
    """Tokens that the model knows."""
    long: int
    """Tokens of a row, of the longest prompt, and of the long held-out documents."""
    lengths: tuple[int, ...]
    """Of the prompts."""
    depths: tuple[float, ...]
    trials: int
    long_documents: int
    short_documents: int
    short_tokens: int
    """Of a short held-out document."""
    digits: int | None = None
    """Of the hidden numbers; None: the tasks' own."""


@dataclass(frozen=True)
class Material:
    model: Path
    """A folder with the model to extend and its tokenizer."""
    tokenizer: PreTrainedTokenizerBase
    rows: PreparedRows
    long_documents: list[Tensor]
    """(long,) int64 each: the anchor and the beginning of a document."""
    short_documents: list[Tensor]
    """(short_tokens,) int64 each, likewise."""
    prompts: dict[str, list[Prompt]]
    """Of the tasks needle and passkey."""

    def weights(self) -> dict[str, Tensor]:
        return _weights(self.model)


@cache
def _weights(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def real_material(size: RealData, folder: Path, *, model: Path, texts: list[str]) -> Material:
    """Of the texts that fill a long row every other one is held out while they are needed, of all other
    texts every sixth.

    Raises:
        ValueError: the texts are too short or too few.
    """
    with model_errors(str(model), "--model"):
        tokenizer = load_tokenizer(str(model))
    anchor = find_anchor_id(tokenizer)
    texts = list(dict.fromkeys(texts))  # a copy of what is held out would be trained on

    def beginning(text: str, length: int) -> Tensor | None:
        """The anchor and so many tokens less one; None of a shorter text."""
        if len(text) < length:  # hardly any tokenizer makes more tokens than letters
            return None
        found = token_ids(tokenizer, [text[: 16 * length]])[0]
        return torch.tensor([anchor, *found[: length - 1]]) if len(found) >= length else None

    fill = [beginning(text, size.long) for text in texts]
    long_places = [place for place, document in enumerate(fill) if document is not None][::2]
    long_places = long_places[: size.long_documents]
    others = [place for place in range(len(texts)) if place not in long_places][::6]
    short = ((place, beginning(texts[place], size.short_tokens)) for place in others)
    short = [(place, document) for place, document in short if document is not None]
    short = short[: size.short_documents]
    if len(long_places) < 2 or len(short) < 2:
        raise ValueError(
            f"--texts has {len(long_places)} documents of {size.long:,} tokens to hold out and {len(short)} "
            f"of {size.short_tokens:,}; at least two of each are needed: give longer ones, or more"
        )
    held_out = {*long_places, *(place for place, _ in short)}
    path = folder / "documents.jsonl"
    if not path.exists():
        with whole(path) as unfinished, unfinished.open("w") as stream:
            trained = (text for place, text in enumerate(texts) if place not in held_out)
            stream.writelines(json.dumps({"text": text}) + "\n" for text in trained)
    rows = rows_of(path, DataOptions(seq_length=size.long), tokenizer)
    return Material(
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        long_documents=[fill[place] for place in long_places],
        short_documents=[document for _, document in short],
        prompts=all_prompts(size, tokenizer),
    )


def smollm2_material(
    size: RealData, folder: Path, *, model: Path | None, texts: Path | None
) -> Material:
    """SmolLM2 and the texts that the machine has, unless flags name another model or other texts."""
    if model is None and not (model := folder / "smollm2").exists():
        make_smollm2(model)
    if texts is None:
        collected = [folder / "texts" / name for name in ("train.jsonl", "held_out.jsonl")]
        if not all(path.exists() for path in collected):
            # Nine million tokens: more than any variant reads, and prepared within a call's minutes.
            collect_texts(folder / "texts", characters_per_tree=8_000_000)
        files = collected
    else:
        files = [texts]
    return real_material(
        size, folder, model=model, texts=[t for path in files for t in lines(path)]
    )


def lines(path: Path) -> Iterator[str]:
    """The texts of a JSON-lines file (`{"text": …}`)."""
    with path.open() as stream:
        for line in stream:
            yield json.loads(line)["text"]


def small_material(
    size: RealData, folder: Path, *, model: Path | None, texts: Path | None
) -> Material:
    """A small LLaMA that learnt short rows as `paper.py --size cpu` has it, and that setting's text."""
    if model is not None:
        return smollm2_material(size, folder, model=model, texts=texts)
    small = paper_small.SIZES["cpu"]
    small = replace(small, data=replace(small.data, held_out_documents=size.long_documents))
    assert (small.data.short, small.data.long) == (size.short, size.long)
    data = make_data(small.data, folder)
    model = folder / "start"
    if not model.exists():
        first = paper_small.short_phase(0, data, small, torch.device("cpu"))
        with whole(model) as unfinished:
            data.tokenizer.save_pretrained(unfinished)
            first.model.save_pretrained(unfinished)
    return Material(
        model=model,
        tokenizer=data.tokenizer,
        rows=data.long,
        long_documents=data.held_out,
        short_documents=[document[: size.short_tokens] for document in data.held_out],
        prompts=all_prompts(size, data.tokenizer),
    )


def all_prompts(size: RealData, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Prompt]]:
    """The same for every variant."""
    tasks = [TASKS[name] for name in ("needle", "passkey")]
    return {
        task.name: prompts_of(
            replace(task, digits=size.digits or task.digits),
            tokenizer,
            size,
            longest=max(size.lengths),
        )
        for task in tasks
    }
