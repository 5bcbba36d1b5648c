"""What to expect of each recipe: writes its plan into it, as `--plan_only` prints it.

    PYTHONPATH=. python examples/recipes/expectations.py /tmp/stand_ins [llama2_7b_64k …]

Without a hub, a GPU or the real data: a plan needs the model's sizes and the documents' lengths. So stand-ins
take the place of the model (a configuration with the published sizes, and a tokenizer of which only BOS and
EOS count) and of the data: documents of one token over and over, their lengths log-normal (median 1,339
tokens, sigma 1.0, this project's choice) but for a share of all tokens that lies in long documents. There is
one as long as a row, for the longest decides the memory. Plan with your own data before you train on them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config

from anchor_context.demo import train_tokenizer

RECIPES = Path(__file__).parent
GPU = ("--plan_gpu", "H100", "--memory_gib", "78")
MEDIAN, SIGMA = 1_339, 1.0
ROWS = 16
START, END = "# --- expected, by expectations.py", "# --- end\n"

LLAMA_8B = {"intermediate_size": 14_336, "num_key_value_heads": 8, "vocab_size": 128_256}
LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8_192,
}
MODELS: dict[str, PretrainedConfig] = {  # what transformers has by default is LLaMA-2-7B's
    "Llama-2-7b-hf": LlamaConfig(intermediate_size=11_008, max_position_embeddings=4_096),
    "Llama-3.1-8B": LlamaConfig(
        **LLAMA_8B, max_position_embeddings=131_072, rope_parameters=LLAMA_31_ROPE
    ),
    "Llama-3-8B-ProLong-64k-Base": LlamaConfig(
        **LLAMA_8B,
        max_position_embeddings=65_536,
        rope_parameters={"rope_type": "default", "rope_theta": 8e6},
    ),
    "Qwen3-8B-Base": Qwen3Config(
        hidden_size=4_096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "Mistral-7B-v0.3": MistralConfig(
        vocab_size=32_768,
        max_position_embeddings=32_768,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}


@dataclass(frozen=True)
class StandIn:
    """What takes the place of a recipe's model and data."""

    model: str
    """A key of `MODELS`."""
    row_length: int
    long: dict[int, float]
    """Tokens of a long document -> the share of all tokens that lies in such documents."""


PROLONG = {524_288: 0.2, 65_536: 0.4}  # the shares of train_512K.sh's domains
STAND_INS = {
    "llama2_7b_64k": StandIn("Llama-2-7b-hf", 65_536, {65_536: 0.07}),
    "llama31_8b_128k": StandIn("Llama-3.1-8B", 131_072, {131_072: 0.07}),
    "llama31_8b_512k": StandIn("Llama-3.1-8B", 524_288, PROLONG),
    "mistral_7b_128k": StandIn("Mistral-7B-v0.3", 131_072, {131_072: 0.07}),
    "prolong_8b_512k_two_nodes": StandIn("Llama-3-8B-ProLong-64k-Base", 524_288, PROLONG),
    "qwen3_8b_128k": StandIn("Qwen3-8B-Base", 131_072, {131_072: 0.07}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the stand-ins lie")
    parser.add_argument("recipes", nargs="*", default=list(STAND_INS), help="default: all")
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True, exist_ok=True)
    for name in flags.recipes:
        recipe = RECIPES / f"{name}.sh"
        recipe.write_text(with_expectation(recipe.read_text(), plan(name, flags.folder)))


def run_recipe(recipe: Path, *flags: str, **environment: str) -> str:
    """What it prints, by the Python that runs here."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(recipe), *flags],
        env=os.environ | {"PATH": path} | environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def plan(name: str, folder: Path, *, run: Callable[..., str] = run_recipe) -> list[str]:
    """The lines of a recipe's plan, without those that name the stand-ins."""
    stand_in = STAND_INS[name]
    environment = {
        "MODEL": str(make_model(folder, stand_in)),
        "DATASET": str(make_documents(folder, stand_in)),
    }
    more = ("--data-format", "tokenized", "--cache_dir", str(folder / "rows"), "--plan_only", *GPU)
    printed = run(RECIPES / f"{name}.sh", *more, **environment)
    lines = printed[printed.index("model ") :].splitlines()
    told = [line for line in lines if not line.startswith(("model ", "data "))]
    return [re.sub(r" \([\d.,]+ epochs\)$", "", line) for line in told]


def with_expectation(recipe: str, lines: list[str]) -> str:
    """The text of a recipe with these lines, as comments, before its first command."""
    head, _, rest = recipe.partition(START)
    if rest:
        _, _, rest = rest.partition(END)
    else:
        head, command, rest = recipe.partition("set -euo pipefail\n")
        rest = command + rest
    block = [f"{START} with {' '.join(GPU)}", *map(as_comment, lines)]
    return head + "\n".join(block) + "\n" + END + rest


def as_comment(line: str) -> str:
    indent = "#" + 12 * " "
    return textwrap.fill(line, 110, initial_indent="# ", subsequent_indent=indent)


def make_model(folder: Path, stand_in: StandIn) -> Path:
    """A folder without weights."""
    made, config = folder / stand_in.model, MODELS[stand_in.model]
    if not (made / "config.json").exists():
        with_bos = config.model_type != "qwen3"
        train_tokenizer(["a"], vocab_size=300, bos=with_bos).save_pretrained(made)
        config.save_pretrained(made)
    return made


def make_documents(folder: Path, stand_in: StandIn) -> Path:
    """A file of pre-tokenised documents, `ROWS` rows of them."""
    made = folder / f"documents-{'-'.join(map(str, stand_in.long))}-{stand_in.row_length}.jsonl"
    if not made.exists():
        tokens = ROWS * stand_in.row_length
        lengths = []
        for length, share in stand_in.long.items():
            inside = min(length, stand_in.row_length - 1)  # beside its anchor
            lengths += [inside] * max(1, round(share * tokens / length))
        random = np.random.default_rng(0)
        while sum(lengths) < tokens:
            lengths.append(max(2, round(random.lognormal(np.log(MEDIAN), SIGMA))))
        first, *others = lengths  # a whole row: one behind it would be cut
        lengths = [first, *random.permutation(others).tolist()]
        with made.open("w") as stream:
            for length in lengths:
                ids = "[" + "5," * (length - 1) + "5]"
                stream.write(f'{{"input_ids": {ids}, "source": [{{"end": {length}}}]}}\n')
    return made


if __name__ == "__main__":
    main()
