"""Tokenizers cut texts as the model's tokenizer.json says, whatever class transformers makes of them."""

from __future__ import annotations

import json
import pickle

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from anchor_context.data.documents import token_ids
from anchor_context.data.tokenizer import load_tokenizer
from anchor_context.demo import train_tokenizer

DIGITS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
"""SmolLM2's and StarCoder2's."""
TEXT = "In 1234 it's 1234"


@pytest.mark.parametrize(
    ("config", "name", "otherwise"),
    [
        (LlamaConfig, "GPT2Tokenizer", True),
        (Qwen2Config, "PreTrainedTokenizerFast", True),
        (LlamaConfig, "PreTrainedTokenizerFast", False),
    ],
)
def test_texts_are_cut_as_tokenizer_json_says(tmp_path, capsys, config, name, otherwise):
    made = train_tokenizer(["In 1234 it's a text to learn 1234 from"] * 9, vocab_size=300)
    made.backend_tokenizer.pre_tokenizer = DIGITS
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    made.save_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": name})
    )

    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    written = file.encode(TEXT, add_special_tokens=False).ids
    assert (token_ids(AutoTokenizer.from_pretrained(tmp_path), [TEXT]) != [written]) == otherwise
    tokenizer = load_tokenizer(str(tmp_path))
    assert token_ids(tokenizer, [TEXT]) == [written]
    assert token_ids(pickle.loads(pickle.dumps(tokenizer)), [TEXT]) == [written]  # a worker's
    assert (tokenizer.bos_token, tokenizer.eos_token) == (made.bos_token, made.eos_token)
    told = capsys.readouterr().err
    assert ("cut as its tokenizer.json says" in told) == otherwise
    if otherwise:  # what the warning says works
        again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert token_ids(again, [TEXT]) == [written]


def test_a_tokenizer_without_such_a_file_is_transformers_own(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert isinstance(tokenizer, ByT5Tokenizer) and not tokenizer.is_fast
