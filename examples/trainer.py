"""The Hugging Face Trainer with AnchorAttention: two lines more than without it.

    PYTHONPATH=. python examples/trainer.py MODEL TEXTS.jsonl OUTPUT_DIR [--max_steps 100 …]

MODEL is a folder or hub name, each line of TEXTS.jsonl has a "text", and whatever follows is
for `TrainingArguments`. A batch of N documents is one row, each document behind its anchor.

On several GPUs start it with `PYTHONPATH=. accelerate launch examples/trainer.py …`, a process for each:
under plain `python` the Trainer would take them all for torch's DataParallel, which splits a row's tokens
from its layout.
"""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from anchor_context import AnchorDataCollator, patch_model

if len(sys.argv) < 4:
    sys.exit("usage: python examples/trainer.py MODEL TEXTS.jsonl OUTPUT_DIR [--max_steps 100 …]")
name, texts, output_dir, *flags = sys.argv[1:]
(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
    ["--output_dir", output_dir, *flags]
)
tokenizer = AutoTokenizer.from_pretrained(name)
model = patch_model(AutoModelForCausalLM.from_pretrained(name), engine="flash", pattern="anchor")
collator = AnchorDataCollator(tokenizer, engine="flash", pattern="anchor")
texts = load_dataset("json", data_files=texts, split="train")


def tokens_of(example: dict) -> dict:
    """A text and the end of it. A special token that is written in it is text; the collator places BOS."""
    as_text = {"add_special_tokens": False, "split_special_tokens": True}
    ids = tokenizer(example["text"], **as_text)["input_ids"]
    return {"input_ids": [*ids, tokenizer.eos_token_id]}


documents = texts.map(tokens_of, remove_columns=texts.column_names)
trainer = Trainer(model, arguments, data_collator=collator, train_dataset=documents)
trainer.train()
model.save_pretrained(output_dir)  # a plain Hugging Face model: no trace of the patch
tokenizer.save_pretrained(output_dir)
