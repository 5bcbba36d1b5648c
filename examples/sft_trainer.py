"""TRL's SFTTrainer, packing on, with AnchorAttention: two lines more than without it.

    PYTHONPATH=. python examples/sft_trainer.py MODEL TEXTS.jsonl OUTPUT_DIR [--max_length 4096 …]

MODEL is a folder or hub name, each line of TEXTS.jsonl has a "text", and whatever follows is for
`SFTConfig`. TRL packs documents into rows of at most max_length; the anchors come on top. A document
longer than that is split, each piece behind its own anchor (TRL's default would drop the rest of it).

It needs `pip install trl`. On several GPUs start it with `PYTHONPATH=. accelerate launch
examples/sft_trainer.py …`, a process for each: under plain `python` the trainer would take them all for
torch's DataParallel, which splits a row's tokens from its layout.
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from anchor_context import AnchorDataCollator, patch_model

if len(sys.argv) < 4:
    sys.exit(
        "usage: python examples/sft_trainer.py MODEL TEXTS.jsonl OUTPUT_DIR [--max_length 4096 …]"
    )
name, texts, output_dir, *flags = sys.argv[1:]
(arguments,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses(
    ["--output_dir", output_dir, "--packing", "true", "--packing_strategy", "bfd_split", *flags]
)
tokenizer = AutoTokenizer.from_pretrained(name)
model = patch_model(AutoModelForCausalLM.from_pretrained(name), engine="flash", pattern="anchor")
texts = load_dataset("json", data_files=texts, split="train")

trainer = SFTTrainer(model, arguments, train_dataset=texts, processing_class=tokenizer)
# Set afterwards: SFTTrainer takes no other collator than its own while it packs.
trainer.data_collator = AnchorDataCollator(tokenizer, engine="flash", pattern="anchor")
trainer.train()
model.save_pretrained(output_dir)  # a plain Hugging Face model: no trace of the patch
tokenizer.save_pretrained(output_dir)
