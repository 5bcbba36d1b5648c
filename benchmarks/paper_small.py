"""The small LLaMA of `paper.py`, whose short phase `paper_real.py` starts from on a CPU, too.

Guarantees: variants that train together read the same rows, byte for byte, in the same order, and take turns
step by step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from paper_data import Data, DataSize
from paper_train import PRECISIONS, Variant
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from anchor_context.attention.patterns import PATTERNS
from anchor_context.data.loader import make_loader
from anchor_context.data.rows import PreparedRows
from anchor_context.rope.scaling import apply_rope_settings

THETA = 10_000.0


@dataclass(frozen=True)
class Size:
    """A model, its data and how long it trains. Rates rise for a tenth of it, fall in its last fifth."""

    data: DataSize
    hidden: int
    layers: int
    heads: int
    step_tokens: int
    short_steps: int
    long_steps: int
    short_rate: float
    long_rate: float
    prompts_at_a_time: int


SIZES = {
    "cpu": Size(
        DataSize(
            short=256,
            long=1024,
            characters=1_500_000,
            median_document=150,
            questions_share=0.6,
            vocabulary=512,
            depths=(10.0, 30.0, 50.0, 70.0, 90.0),
            trials=8,
            held_out_documents=16,
        ),
        hidden=64,
        layers=2,
        heads=2,
        step_tokens=1024,
        short_steps=1400,
        long_steps=100,
        short_rate=6e-3,
        long_rate=1e-3,
        prompts_at_a_time=20,
    ),
    "gpu": Size(
        DataSize(
            short=2048,
            long=8192,
            characters=20_000_000,
            median_document=600,
            questions_share=0.6,
            vocabulary=2048,
            depths=(10.0, 30.0, 50.0, 70.0, 90.0),
            trials=8,
            held_out_documents=32,
        ),
        hidden=256,
        layers=4,
        heads=4,
        step_tokens=32_768,
        short_steps=400,
        long_steps=40,
        short_rate=2e-3,
        long_rate=5e-4,
        prompts_at_a_time=20,
    ),
}


def variant_of(
    pattern: str,
    precision: str,
    config: LlamaConfig,
    start: dict[str, Tensor] | None,
    *,
    device: torch.device,
    rate: float,
    steps: int,
) -> Variant:
    """`start`: float32 weights, or None for random ones from torch's generator."""
    model = LlamaForCausalLM._from_config(config, dtype=PRECISIONS[precision]).to(device)

    def rate_after(done: int) -> float:
        share = (done + 0.5) / steps
        return rate * min(share / 0.1, 1.0, (1 - share) / 0.2)

    return Variant(pattern, precision, model, start, rate=rate_after)


def train(
    variants: list[Variant], rows: PreparedRows, *, steps: int, tokens: int, seed: int
) -> None:
    """Every variant takes so many steps, one after the other."""
    loader = make_loader(
        rows,
        pattern="anchor",
        seed=seed,
        batch_size=tokens // rows.row_length,
        accumulation=1,
        data_rank=0,
        data_degree=1,
    )
    for step, batch in zip(range(steps), loader, strict=False):
        # In a new order each time: who meets a batch's shapes first may pay for kernels that all others use.
        for variant in random.Random(f"{seed} {step}").sample(variants, len(variants)):
            variant.step([batch])


def short_phase(seed: int, data: Data, size: Size, device: torch.device) -> Variant:
    """A model that was trained from random weights on the short rows."""
    torch.manual_seed(seed)
    first = variant_of(
        "intra_doc_reset",
        "float32",
        model_config(size, data.tokenizer),
        None,
        device=device,
        rate=size.short_rate,
        steps=size.short_steps,
    )
    train([first], data.short, steps=size.short_steps, tokens=size.step_tokens, seed=seed)
    return first


def model_config(size: Size, tokenizer) -> LlamaConfig:
    """Of the short phase."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.data.short,
        # transformers' 0.02 is for thousands of channels; at 64 all scores would start at nothing.
        initializer_range=size.hidden**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def extended(
    config: LlamaConfig, start: dict[str, Tensor], size: Size, device: torch.device
) -> list[Variant]:
    """All variants, at the start of the extension."""
    config = LlamaConfig.from_dict(config.to_dict())
    apply_rope_settings(
        config, row_length=size.data.long, rope_theta=THETA * size.data.long / size.data.short
    )
    return [
        variant_of(
            pattern,
            precision,
            config,
            start,
            device=device,
            rate=size.long_rate,
            steps=size.long_steps,
        )
        for precision in PRECISIONS
        for pattern in PATTERNS
    ]
