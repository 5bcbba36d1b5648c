"""Saved models, read by transformers 4.57 in an environment of its own: what serving engines make of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from test_saved_model import TABLE, train_and_save
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

OLDER = ("transformers==4.57.6", "tokenizers>=0.22,<0.23", "huggingface_hub>=0.34,<1")
TOKENIZERS = (
    "PreTrainedTokenizerFast",
    "LlamaTokenizerFast",
    "Qwen2TokenizerFast",
    "GPT2TokenizerFast",
)
TEXT = "A text, with  spaces and\nlines: ünïcode."

MAKE_TOKENIZERS = """
import sys
import tokenizers, transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

folder, text, *classes = sys.argv[1:]
special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
tokenizer.train_from_iterator([text] * 9, trainer)
for name in classes:
    made = getattr(transformers, name)(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<|endoftext|>"],
    )
    made.save_pretrained(f"{folder}/{name}")
"""

READ = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4.57")
transformers.logging.set_verbosity_error()
text, length, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", attn_implementation="eager")
    dtype = str(model.dtype)
    positions = torch.arange(int(length))[None]
    with torch.no_grad():
        logits = model.float()(positions, use_cache=False).logits
        short = model(positions[:, :9], use_cache=False).logits
    tables = [m for m in model.modules() if hasattr(m, "inv_freq")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(json.dumps({
        "dtype": dtype,
        "logits": logits.tolist(),
        "short": short.tolist(),
        "frequencies": [table.inv_freq.tolist() for table in tables],
        "scaling": [table.attention_scaling for table in tables],
        "class": type(tokenizer).__name__,
        "ids": tokenizer(text).input_ids,
        "special": tokenizer.additional_special_tokens,
    }))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """older(script, *arguments) -> what it prints, run with the older library."""
    target = tmp_path_factory.mktemp("older")
    install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target)
    subprocess.run([*install, *OLDER], check=True)

    def run(script: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, *arguments],
            env=os.environ | {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


def test_transformers_4_57_reads_what_was_trained(older, tmp_path):
    older(MAKE_TOKENIZERS, str(tmp_path / "tokenizers"), TEXT, *TOKENIZERS)
    for number, (config, flags, _) in enumerate(TABLE.values()):
        source = tmp_path / "sources" / str(number)
        source.mkdir(parents=True)
        for file in (tmp_path / "tokenizers" / TOKENIZERS[number % len(TOKENIZERS)]).iterdir():
            (source / file.name).write_bytes(file.read_bytes())
        (source / "config.json").write_text(json.dumps(config))
        train_and_save(source, tmp_path / str(number), **flags)

    folders = [tmp_path / str(number) for number in range(len(TABLE))]
    printed = older(READ, TEXT, "256", *map(str, folders)).splitlines()
    classes = {}
    for name, folder, line in zip(TABLE, folders, printed, strict=True):
        there = json.loads(line)
        assert there["dtype"] == "torch.bfloat16"
        here = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
        positions = torch.arange(256)[None]
        with torch.no_grad():
            for call, length in (("logits", 256), ("short", 9)):
                logits = here(positions[:, :length], use_cache=False).logits
                close = {"rtol": 1e-3, "atol": 1e-4}
                torch.testing.assert_close(torch.tensor(there[call]), logits, **close, msg=name)
        if not name.startswith("by kind of layer"):  # 4.57 keeps one module for each
            (table,) = (m for m in here.modules() if hasattr(m, "inv_freq"))
            assert there["frequencies"] == [pytest.approx(table.inv_freq.tolist())], name
            assert there["scaling"] == [pytest.approx(table.attention_scaling)], name
        classes.setdefault(there["class"], []).append((there["ids"], there["special"]))
    assert classes.keys() == set(TOKENIZERS)
    for of_class in classes.values():
        assert of_class.count(of_class[0]) == len(of_class) > 1
        assert len(of_class[0][0]) > 5 and "<|endoftext|>" in of_class[0][1]
