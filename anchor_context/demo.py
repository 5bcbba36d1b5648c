"""What the demo and the tests train: a tiny LLaMA, and real text found on the machine.

    python -m anchor_context.demo OUTPUT

writes OUTPUT/documents.jsonl (the Python standard library's source files, one document each) and
OUTPUT/model (a byte-level BPE tokenizer trained on them, and a LLaMA with random weights). Nothing is
downloaded, and the same Python gives the same files.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging as transformers_logging


def standard_library_texts(*, at_most_characters: int) -> list[str]:
    """The standard library's top-level modules and packages, up to so many characters in all."""
    root = Path(sysconfig.get_path("stdlib"))
    texts, total = [], 0
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) < 200:
            continue
        texts.append(text)
        total += len(text)
        if total >= at_most_characters:
            break
    return texts


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, bos: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with EOS; with BOS before every text as LLaMA's, or without as Qwen's."""
    special = ["</s>", "<s>"] if bos else ["</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>" if bos else None
    )


def tiny_llama(tokenizer: PreTrainedTokenizerFast, *, hidden: int, layers: int) -> LlamaForCausalLM:
    """A LLaMA with random weights: 4 heads, 2 key/value heads."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--characters", type=int, default=3_000_000)
    transformers_logging.disable_progress_bar()
    flags = parser.parse_args()
    output = flags.output
    output.mkdir(parents=True, exist_ok=True)
    texts = standard_library_texts(at_most_characters=flags.characters)
    with (output / "documents.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer = train_tokenizer(texts, vocab_size=2048)
    tokenizer.save_pretrained(output / "model")
    tiny_llama(tokenizer, hidden=128, layers=4).save_pretrained(output / "model")
    print(
        f"{len(texts)} documents, {sum(map(len, texts)):,} characters -> {output}/documents.jsonl"
    )
    print(f"a tiny LLaMA and its tokenizer -> {output}/model")


if __name__ == "__main__":
    main()
