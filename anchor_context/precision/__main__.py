"""The precision laboratory: what bfloat16 does to RoPE in a model.

    python -m anchor_context.precision precision --model PATH --out DIR
        [--random-weights] [--text FILE] [--lengths 1024,4096] [--shifts 0,16,1024]
        [--dtypes float32,bfloat16,float16] [--patterns full,anchor] [--layers 0,15] [--documents 4]
        [--queries 32] [--device cuda]

writes DIR/report.md, change.csv, steps.csv and tokens.csv, anew as soon as another length is measured, and
last seven pictures. Works without a GPU and without S × S memory (a sliding window's mask apart): a sample
of each row's queries meets all of its keys, and the report says how many.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    set_seed,
)

from anchor_context.attention.patterns import PATTERNS, anchor_ids
from anchor_context.command_line import FlagParser, model_errors, one_line_errors, read_text
from anchor_context.data.tokenizer import load_tokenizer
from anchor_context.integrations.models import check_layers
from anchor_context.precision.arithmetic import (
    Rope,
    each_step,
    float32_rotation,
    model_arithmetic,
)
from anchor_context.precision.arrangement import arrange, document_starts
from anchor_context.precision.measure import Case, TokenChange, measure_layer, sample_queries
from anchor_context.precision.model import (
    Scoring,
    check_attention,
    rope_of,
    scoring_of,
    visit_layers,
)
from anchor_context.precision.plots import PICTURES
from anchor_context.precision.report import Measurements, write_report
from anchor_context.precision.table import Table
from anchor_context.precision.timing import time_rotation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    set_seed(flags.seed)
    with model_errors(flags.model, "--model"):
        model = load_model(flags.model, random_weights=flags.random_weights)
    model = model.to(flags.device)
    token_ids = load_tokens(flags.text, flags.model, model.config.vocab_size, max(flags.lengths))
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)

    for found in measure(
        model,
        token_ids,
        lengths=flags.lengths,
        shifts=flags.shifts,
        dtypes=flags.dtypes,
        patterns=flags.patterns,
        layers=flags.layers,
        documents=flags.documents,
        queries=flags.queries,
        setting={
            "model": f"{flags.model} ({model.config.model_type}, {model.dtype})",
            "weights": f"random, seed {flags.seed}" if flags.random_weights else "the model's own",
            "tokens": flags.text or f"drawn at random from the vocabulary, seed {flags.seed}",
            "machine": machine(flags.device),
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        },
    ):
        found.changes.write_csv(out / "change.csv")
        found.steps.write_csv(out / "steps.csv")
        found.tokens.write_csv(out / "tokens.csv")
        write_report(out / "report.md", found, pictures=list(PICTURES))
    print(f"{out}/report.md")
    for name, draw in tqdm(PICTURES.items(), desc="pictures", unit="picture"):
        draw(found).savefig(out / name, dpi=120)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(
        prog="python -m anchor_context.precision", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "precision", help="the change of attention under a shift"
    ).add_argument
    add("--model", required=True, help="a Hugging Face model, or a folder with its config.json")
    add("--random-weights", "--random_weights", action="store_true", help="read its config only")
    add("--text", help="a UTF-8 file to run the model on; default: random tokens")
    add("--lengths", type=positive_integers, default="1024,4096,16384", help="row lengths, tokens")
    add("--shifts", type=integers, default="0,16,128,1024,16384", help="shifts of all positions")
    add("--dtypes", type=names_of(DTYPES), default=",".join(DTYPES), help="of the tested model")
    add("--patterns", type=names_of(PATTERNS), default=",".join(PATTERNS), help="who sees whom")
    add("--layers", type=integers, help="the layers to measure, counted from 0; default: all")
    add("--documents", type=int, default=4, help="documents in a row")
    add("--queries", type=int, default=32, help="sampled queries in a row")
    add("--seed", type=int, default=42, help="of random weights and tokens")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where the model runs and is measured")
    add("--out", required=True, help="the folder for report, tables and pictures")
    flags = parser.parse_args(arguments)
    if max(flags.shifts) == 0:
        parser.error("--shifts 0 changes nothing; name at least one other, for example 0,16,1024")
    if flags.documents < 1 or min(flags.lengths) < 2 * flags.documents:
        parser.error(
            f"--documents {flags.documents} must be at least 1, and leave every document of the shortest "
            f"row (--lengths {min(flags.lengths)}) two tokens"
        )
    if flags.queries < 1:
        parser.error(f"--queries {flags.queries} must be at least 1")
    return flags


def measure(
    model: PreTrainedModel,
    token_ids: Tensor,
    *,
    lengths: list[int],
    shifts: list[int],
    dtypes: list[str],
    patterns: list[str],
    layers: list[int] | None = None,
    documents: int,
    queries: int,
    setting: dict[str, str],
) -> Iterator[Measurements]:
    """Measure every length, shift, type and pattern, layer by layer of one forward pass per length.

    Yields:
        after every length, what is measured so far.

    Raises:
        ValueError: a layer that the model has not, or a model that computes its attention in another way
            than the laboratory.
    """
    config = model.config
    layers = layers or list(range(config.num_hidden_layers))
    if max(layers) >= config.num_hidden_layers:
        raise ValueError(
            f"--layers {max(layers)}: the model has the layers 0 to {config.num_hidden_layers - 1}"
        )
    check_layers(config)
    check_attention(model)
    rope, scoring = rope_of(model), scoring_of(model)
    cases = [case for dtype in dtypes for case in cases_of(dtype)]
    steps = [
        Case(f"{dtype}/{step}/{rounded}", DTYPES[dtype], arithmetic)
        for dtype in dtypes
        for step, rounded, arithmetic in each_step(DTYPES[dtype])
    ]
    setting = setting | circumstances(
        config, rope, scoring, layers=layers, documents=documents, queries=queries
    )
    changes, step_changes, tokens = [], [], []

    def measure_row(length: int) -> None:
        sampled = sample_queries(length, number=queries).to(model.device)
        arrangements = [arrange(name, length, documents, model.device) for name in patterns]
        bar = tqdm(total=len(layers), desc=f"{length:,} tokens", unit="layer")

        def visit(layer: int, query: Tensor, key: Tensor) -> None:
            if layer not in layers:
                return
            for arrangement in arrangements:
                common = {
                    "layer": layer,
                    "queries": sampled,
                    "rope": rope,
                    "scale": scoring[layer].scale,
                    "window": scoring[layer].window,
                    "arrangement": arrangement,
                }
                for row in measure_layer(
                    query, key, cases=cases, shifts=shifts, by_token=True, **common
                ):
                    line = {"length": length, **asdict(row)}
                    if isinstance(row, TokenChange):
                        tokens.append(line | line.pop("rounding_mean"))
                    else:
                        changes.append(line)
                for row in measure_layer(query, key, cases=steps, shifts=[max(shifts)], **common):
                    dtype, step, rounded = row.arithmetic.split("/")
                    place = {"length": length, "dtype": dtype, "step": step, "rounded": rounded}
                    step_changes.append({**place, **asdict(row)})
            bar.update()

        row_ids = put_anchors(token_ids[:length], document_starts(length, documents), config)
        with bar:
            visit_layers(model, row_ids[None].to(model.device), visit, queries=sampled)

    for length in lengths:
        measure_row(length)
        seconds = {
            dtype: time_rotation(
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                row_length=length,
                rope=rope,
                dtype=DTYPES[dtype],
            )
            for dtype in dtypes
            if DTYPES[dtype] != torch.float32
        }
        yield Measurements(
            setting, Table(changes[:]), Table(step_changes[:]), Table(tokens[:]), seconds
        )


def circumstances(
    config: PretrainedConfig,
    rope: Rope,
    scoring: list[Scoring],
    *,
    layers: list[int],
    documents: int,
    queries: int,
) -> dict[str, str]:
    """What of the model is measured, and in which rows: for `Measurements.setting`."""
    sizes = (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        2 * len(rope.inv_freq),
    )
    windows = [layer.window for layer in scoring if layer.window]
    return {
        "layers, heads, key/value heads, head size": ", ".join(map(str, sizes)),
        "layers measured": "all"
        if len(layers) == config.num_hidden_layers
        else ", ".join(map(str, layers)),
        "RoPE": str(config.rope_parameters),
        "scale of the scores": ", ".join(f"{scale:g}" for scale in {s.scale for s in scoring}),
        "sliding window": f"{max(windows):,} tokens in {len(windows)} layers"
        if windows
        else "none",
        "row": f"{documents} documents of equal length, each with the anchor token first",
        "queries sampled per row, each against all keys it sees": f"{queries}, evenly over the row",
    }


def cases_of(dtype: str) -> list[Case]:
    """The model's own arithmetic, and where it differs, the rotation in float32."""
    torch_dtype = DTYPES[dtype]
    cases = [Case(dtype, torch_dtype, model_arithmetic(torch_dtype))]
    if torch_dtype != torch.float32:
        label = f"{dtype}, rotated in float32"
        cases.append(Case(label, torch_dtype, float32_rotation(torch_dtype)))
    return cases


def put_anchors(token_ids: Tensor, starts: np.ndarray, config) -> Tensor:
    """The row with the anchor token (token 0 where the model has none) at each document's start."""
    token_ids = token_ids.clone()
    token_ids[starts] = [*anchor_ids(config), 0][0]
    return token_ids


def load_model(path: str, *, random_weights: bool) -> PreTrainedModel:
    """The decoder without its head, in the type it is stored in."""
    if random_weights:
        config = AutoConfig.from_pretrained(path)
        model = AutoModel.from_config(config, attn_implementation="sdpa")
    else:
        model = AutoModel.from_pretrained(path, dtype="auto", attn_implementation="sdpa")
    return model.eval()


def load_tokens(text: str | None, model: str, vocab_size: int, number: int) -> Tensor:
    """(number,) int64 from the file, or at random.

    Raises:
        ValueError: the file cannot be read, or has fewer tokens.
    """
    if text is None:
        return torch.randint(vocab_size, (number,))
    with model_errors(model, "--model"):
        tokenizer = load_tokenizer(model)
    token_ids = tokenizer(
        read_text(text, "--text"), add_special_tokens=False, split_special_tokens=True
    )["input_ids"]
    if len(token_ids) < number:
        raise ValueError(
            f"--text {text} has {len(token_ids):,} tokens, and --lengths asks for {number:,}; "
            "give a longer text or shorter rows"
        )
    return torch.tensor(token_ids[:number])


def machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def positive_integers(text: str) -> list[int]:
    values = integers(text)
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must hold positive numbers only")
    return values


def integers(text: str) -> list[int]:
    values = sorted({int(part) for part in text.split(",")})
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} holds a negative number")
    return values


def names_of(known):
    def names(text: str) -> list[str]:
        found = text.split(",")
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{unknown} unknown; choose from {','.join(known)}, separated by commas"
            )
        return found

    return names


if __name__ == "__main__":
    with one_line_errors():
        main()
