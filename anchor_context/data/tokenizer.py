"""The tokenizer of a model, cutting texts as the model learnt them: as its tokenizer.json says.

transformers 5 takes the vocabulary alone from that file where it has a class for the tokenizer or the model's
family, and cuts texts before the merges as that class does. Numbers that SmolLM2 and StarCoder2 learnt digit
by digit (`GPT2Tokenizer`, digits split) become whole numbers; a fine-tune of Qwen2 with another tokenizer is
cut like Qwen2. Version 4 cut as the file says, and so were these models trained.

Costs: the file is read twice.
"""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from anchor_context.files import warn

FILE = "tokenizer.json"
PROBE = "It's  a\ttext, 12345\r\n\r\n   lines; ünï: e\u0301 \u4e2d\u6587 \U0001f600 <a_b>def f(x):"
"""Cut otherwise by nearly every two ways to cut texts."""


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Of the model `name`, a folder or a hub name; says so where it is not what transformers makes of it.

    Raises:
        OSError, ValueError: there is none.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    path = Path(name) / FILE
    if not Path(name).is_dir():
        path = try_to_load_from_cache(name, FILE)  # transformers has just asked the hub for it
    if not isinstance(path, str | Path) or not Path(path).is_file() or not tokenizer.is_fast:
        return tokenizer
    written, loaded = Tokenizer.from_file(str(path)), tokenizer.backend_tokenizer
    if _cut(loaded) != _cut(written):
        loaded.normalizer, loaded.pre_tokenizer = written.normalizer, written.pre_tokenizer
        loaded.model = written.model
        first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        if first_here:  # it speaks for the ranks of its machine
            warn(
                f"{name}: texts are cut as its tokenizer.json says. transformers makes a "
                f"{type(tokenizer).__name__} of it, which cuts otherwise: where you use the trained model, "
                "load its tokenizer by PreTrainedTokenizerFast.from_pretrained"
            )
    return tokenizer


def _cut(backend: Tokenizer) -> list[str]:
    """The tokens of the probe."""
    backend.no_truncation()
    backend.no_padding()
    return backend.encode(PROBE, add_special_tokens=False).tokens
