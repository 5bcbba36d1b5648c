"""Micro-batches of units: every token as in its row, and sums over them equal to those over rows."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial

import numpy as np
import pytest
import torch
from data_samples import BOS, prepare, write_token_rows
from transformers import LlamaConfig, LlamaForCausalLM

from anchor_context.attention import flash, flex
from anchor_context.attention.kernels import KERNELS
from anchor_context.data.loader import Dealing, make_loader, one_step
from anchor_context.integrations.models import set_attention
from anchor_context.layout import IGNORE_INDEX
from anchor_context.loss import CausalLMWithLoss, tiled_loss

CASES = [
    ("anchor", "per_document", False),
    ("anchor", "shared", False),
    ("intra_doc", "none", False),
    ("intra_doc_reset", "none", False),
    ("full", "none", False),
    ("anchor", "per_document", True),
    ("anchor", "shared", True),
    ("intra_doc", "none", True),
    ("full", "none", True),
]
"""(pattern, anchor placement, interleaved)."""
TOKENS = [64, 300, 1000]
"""Of a micro-batch: fewer than the longest document, a row's and more, two rows' and more."""


@pytest.fixture(scope="module")
def prepared_rows(tmp_path_factory):
    """Ten rows of 256 tokens: documents of one token, longer than 64 tokens, cut by rows' ends; padding."""
    folder = tmp_path_factory.mktemp("collate")
    lengths = np.random.default_rng(0).integers(1, 130, 36)
    documents = [[10 + (7 * d + i) % 190 for i in range(n)] for d, n in enumerate(lengths)]
    assert {1, 128} & set(lengths.tolist()) and max(lengths) > 64
    data = write_token_rows(folder / "d.jsonl", [documents, [[17], [18]]])

    @cache
    def make(placement: str, interleaved: bool):
        return prepare(
            data,
            folder,
            data_format="tokenized",
            seq_length=256,
            anchor_placement=placement,
            interleave_chunks=interleaved,
        )

    return make


def step_of(prepared, *, pattern, ranks=1, first_row=0, rows=4, **dealing):
    """The micro-batches of one step, of all data ranks."""
    found = []
    for rank in range(ranks):
        loader = make_loader(
            prepared,
            pattern=pattern,
            seed=0,
            batch_size=1,
            accumulation=rows // ranks,
            data_rank=rank,
            data_degree=ranks,
            first_row=first_row,
            total_rows=len(prepared),
            dealing=Dealing(**dealing),
        ).dataset
        found += one_step(iter(loader))
    return found


def documents_of(batch) -> Counter:
    """What each document of a batch holds, whole: tokens, labels and positions in order. Left out is what
    holds the anchor's token alone: padding (of the same token), and shared anchors."""
    layout = batch["layout"]
    ids = layout.document_ids.flatten()
    fields = [batch[k].flatten() for k in ("input_ids", "labels", "position_ids")]
    found = Counter()
    for document in ids.unique():
        there = ids == document
        content = tuple(tuple(f[there].tolist()) for f in fields)
        if set(content[0]) != {BOS}:
            found[content] += 1
    return found


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("pattern", "placement", "interleaved"), CASES)
def test_every_document_is_what_it_is_in_its_row(
    prepared_rows, pattern, placement, interleaved, ranks, zero_stage
):
    prepared = prepared_rows(placement, interleaved)
    for first_row in (0, 8):  # the last step has blank rows
        rows = step_of(prepared, pattern=pattern, first_row=first_row)
        expected = sum(map(documents_of, rows), Counter())
        for tokens in TOKENS:
            step = step_of(
                prepared,
                pattern=pattern,
                ranks=ranks,
                first_row=first_row,
                micro_batch_tokens=tokens,
                zero_stage=zero_stage,
                divisible_by=8,
            )
            got = sum(map(documents_of, step), Counter())
            assert got == expected
            assert len({b["micro_batches"] for b in step}) == 1
            for batch in step:
                assert batch["input_ids"].shape[1] % 8 == 0
                assert batch["input_ids"].shape[1] <= batch["planned_tokens"]
                assert batch["step_rows"] == rows[0]["step_rows"]
                assert not (batch["layout"].interleaved and pattern != "full")
                if placement == "shared":
                    anchor = [
                        batch[k][0, 0].item() for k in ("input_ids", "labels", "position_ids")
                    ]
                    assert anchor == [BOS, IGNORE_INDEX, 0]
                    assert batch["layout"].cu_seqlens[1] == 1 or not documents_of(batch)
            targets = sum((b["labels"] != IGNORE_INDEX).sum().item() for b in step)
            assert targets == step[0]["step_targets"] == rows[0]["step_targets"] > 0


FLASH = partial(flash.attend, kernel=KERNELS["torch_cpu"])


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def gradients(model: CausalLMWithLoss, step: list[dict]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of a step, summed over its micro-batches."""
    model.zero_grad()
    total = 0.0
    for batch in step:
        keys = ("input_ids", "position_ids", "labels", "layout")
        loss_sum = model(**{key: batch[key] for key in keys})
        loss_sum = loss_sum[0] if isinstance(loss_sum, tuple) else loss_sum
        (loss_sum / batch["step_targets"]).backward()
        total += loss_sum.item() / batch["step_targets"]
    return total, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("pattern", "placement", "interleaved", "engine"),
    [
        (*case, engine)
        for case in CASES
        for engine in ("flash", "flex")
        if engine == "flex" or case[1] != "shared"  # flash takes an anchor per document
    ],
)
def test_the_sum_over_micro_batches_is_the_sum_over_rows(
    prepared_rows, pattern, placement, interleaved, engine
):
    model = tiny_llama()
    prepared = prepared_rows(placement, interleaved)

    # Rows of interleaved chunks are for flex alone; as units their documents are in one piece again.
    set_attention(model, flex.make_attend())
    with_loss = CausalLMWithLoss(model, tiled_loss)
    loss, expected = gradients(with_loss, step_of(prepared, pattern=pattern, first_row=8))
    assert all(g.abs().max() > 0 for g in expected)
    set_attention(model, FLASH if engine == "flash" else flex.make_attend())
    for tokens in TOKENS:
        step = step_of(
            prepared,
            pattern=pattern,
            ranks=2,
            first_row=8,
            micro_batch_tokens=tokens,
            divisible_by=8,
        )
        found_loss, found = gradients(with_loss, step)
        assert found_loss == pytest.approx(loss, abs=1e-5)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


SPLITS = {64: (1, 1), 300: (3, 3), 1000: (4, 1)}
"""Tokens of a micro-batch -> (data ranks, ZeRO stage): the sum over ranks is what DeepSpeed reduces."""


@pytest.mark.parametrize(
    ("pattern", "placement", "interleaved", "engine"),
    [
        ("anchor", "per_document", False, "flash"),
        ("anchor", "per_document", False, "flex"),
        ("anchor", "shared", False, "flex"),
        ("anchor", "per_document", True, "flash"),
        ("intra_doc", "none", False, "flash"),
        ("intra_doc_reset", "none", False, "flash"),
        ("full", "none", False, "flash"),
    ],
)
def test_ten_steps_have_the_losses_of_whole_rows(
    prepared_rows, pattern, placement, interleaved, engine
):
    prepared = prepared_rows(placement, interleaved)

    def losses(attend, **split) -> list[float]:
        model = tiny_llama()
        set_attention(model, attend)
        with_loss = CausalLMWithLoss(model, tiled_loss)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for k in range(10):
            step = step_of(
                prepared, pattern=pattern, first_row=12 * k % len(prepared), rows=12, **split
            )
            loss, _ = gradients(with_loss, step)
            optimizer.step()
            found.append(loss)
        return found

    expected = losses(flex.make_attend())
    assert expected[-1] < expected[0] - 0.1
    attend = flex.make_attend() if engine == "flex" else FLASH
    for tokens, (ranks, zero_stage) in SPLITS.items():
        split = {"ranks": ranks, "zero_stage": zero_stage, "micro_batch_tokens": tokens}
        assert losses(attend, **split) == pytest.approx(expected, rel=1e-5)
