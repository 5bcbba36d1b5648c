"""What attention and a token cost: pairs are those of the mask, parameters those that PyTorch multiplies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_samples import prepare, write_token_rows
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedModel

import train
from anchor_context.attention import flex
from anchor_context.attention.patterns import (
    PATTERNS,
    attended_pairs,
    causal_pairs,
    make_layout,
)
from anchor_context.data.loader import collate
from anchor_context.data.micro_batches import cut_rows, cut_units, deal_units, unit_kind
from anchor_context.integrations.adapters import Lora, add_adapters
from anchor_context.integrations.calls import layer_windows
from anchor_context.parallel.groups import RankGrid
from anchor_context.run.metrics import finish_record
from anchor_context.run.work import ModelWork
from tests import model_coverage as coverage
from tests.unit.test_data_micro_batches import make_row

PLACED = [(name, where) for name, pattern in PATTERNS.items() for where in pattern.placements]
WINDOWS = [(None,), (1,), (2,), (7,), (30,), (90,), (500,), (7, None, 7), (30, 7, None, None)]
LENGTHS = (1, 40, 7, 8, 31, 1, 90, 2)
TOKENS = 32


def pairs_in_the_mask(layout, window: int | None) -> int:
    return int(flex.dense_mask(layout, sliding_window=window).sum())


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize(("pattern", "placement"), PLACED)
def test_a_rows_pairs_are_those_of_the_mask_the_mean_over_the_layers(pattern, placement, windows):
    layout = make_layout(
        np.cumsum([0, *LENGTHS[:-1]]),
        batch_size=1,
        row_length=sum(LENGTHS),
        pattern=pattern,
        anchor_placement=placement,
    )
    seen = np.mean([pairs_in_the_mask(layout, window) for window in windows])
    how = {"pattern": pattern, "anchor_placement": placement}
    assert attended_pairs(LENGTHS, **how, windows=windows) == pytest.approx(seen, rel=1e-12)
    # Its units have the same ones, but for the one of a shared anchor with itself.
    units = cut_rows([make_row(LENGTHS)], kind=unit_kind(pattern, placement), windows=windows)
    assert units.pairs.sum() + units.anchors == pytest.approx(seen, rel=1e-12)


@pytest.mark.parametrize("window", [None, 5, 9])
@pytest.mark.parametrize(("pattern", "placement"), PLACED)
def test_cut_units_see_through_the_same_windows(pattern, placement, window):
    kind = unit_kind(pattern, placement)
    cut = cut_units(cut_rows([make_row(LENGTHS)], kind=kind, windows=(window,)), context=20)
    assert len(cut.tokens) > len(LENGTHS)
    anchor = [1] * cut.anchors
    for tokens, pairs in zip(cut.tokens.tolist(), cut.pairs.tolist(), strict=True):
        layout = make_layout(
            np.array([0, *anchor]),
            batch_size=1,
            row_length=tokens + cut.anchors,
            pattern=pattern,
            anchor_placement=placement,
        )
        assert pairs == pairs_in_the_mask(layout, window) - cut.anchors


def test_a_long_document_costs_a_windowed_model_in_proportion():
    n = np.arange(64, 4096)
    assert (np.diff(causal_pairs(n, windows=(64,))) == 64).all()
    assert (np.diff(causal_pairs(n, windows=(64,), anchored=True)) == 65).all()
    assert (np.diff(causal_pairs(n)) == n[1:]).all()

    rows = [make_row([900, *[300] * 7])]
    told = {"data_ranks": 2, "zero_stage": 1, "most_tokens": 3000, "pair_price": 1.0}
    for windows, tokens in (((10,), [1500, 1500]), ((None,), [900, 2100])):
        plan = deal_units(cut_rows(rows, kind="document", windows=windows), **told)
        assert sorted(plan.tokens[0].tolist()) == tokens


def test_a_run_prices_and_counts_through_its_models_windows(tmp_path):
    """`train.py`'s loader: the dealing, the hours of `--plan_only` and the MFU."""
    lengths = np.random.default_rng(0).integers(1, 200, 40)
    documents = [[5 + i % 90 for i in range(n)] for n in lengths]
    data = write_token_rows(tmp_path / "d.jsonl", [documents])
    prepared = prepare(data, tmp_path, data_format="tokenized", seq_length=512)
    flags = train.Flags(model_name_or_path="m", seq_length=512, gradient_accumulate_every=2)
    config = MistralConfig(num_hidden_layers=4, sliding_window=16)
    work = ModelWork(matmul_parameters=1000, attention_width=64)

    def first_batch(config):
        grid = RankGrid(data_degree=2)
        how = {"micro_batch_tokens": 256, "zero_stage": 1, "pair_price": work.pair_price}
        loader = train.loader_of(flags, config, prepared, grid, **how).dataset
        return next(iter(loader)), loader.totals(1)

    batch, (_, pairs) = first_batch(config)
    rows = batch["step_rows"]
    layout = collate(prepared, rows, pattern="anchor")["layout"]
    assert batch["step_pairs"] == pairs == pairs_in_the_mask(layout, 16)
    units = cut_rows([prepared.row(i) for i in rows], kind="anchored_document", windows=(16,))
    told = {"zero_stage": 1, "most_tokens": 256, "pair_price": work.pair_price}
    assert batch["work_imbalance"] == deal_units(units, data_ranks=2, **told).work_imbalance
    everything, _ = first_batch(LlamaConfig(num_hidden_layers=4))
    assert everything["step_pairs"] > 3 * batch["step_pairs"]
    assert everything["work_imbalance"] != batch["work_imbalance"]

    record = finish_record(
        {"tokens": batch["step_tokens"], "pairs": pairs, "target_tokens": 1, "grad_norm": 0.0},
        loss=0.0,
        step_seconds=2.0,
        data_wait_share=0.0,
        work=work,
        full_pairs=4 * 512 * 513 // 2,
        peak=1e9,
        device=torch.device("cpu"),
    )
    assert record["mfu"] == (6 * 1000 * batch["step_tokens"] + 12 * 64 * pairs) / 2e9


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "qwen2"])
def test_layers_of_both_kinds_count_by_their_number(family):
    """Gemma 3: one of six layers sees everything; gpt-oss: every other; Qwen2 uses its window nowhere."""
    full, layers = {"gemma3_text": (4, 26), "gpt_oss": (18, 36), "qwen2": (32, 32)}[family]
    windows = layer_windows(AutoConfig.for_model(family))
    assert (windows.count(None), len(windows)) == (full, layers)
    (window,) = set(windows) - {None} or {1}
    narrow, wide = (causal_pairs(100_000, windows=(w,)) for w in (window, None))
    mean = ((layers - full) * narrow + full * wide) / layers
    assert causal_pairs(100_000, windows=windows) == pytest.approx(mean, rel=1e-12)


# --- A model's ------------------------------------------------------------------------------------


def counted(model: PreTrainedModel) -> int:
    """Forward and backward of a row of `TOKENS`, as PyTorch counts them."""
    model.set_attn_implementation("eager")  # writes out every pair, so the counter sees them
    tokens = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, use_cache=False).logits
        cross_entropy(logits[0], tokens[0]).backward()
    return counter.get_total_flops()


def vectors(model: PreTrainedModel) -> int:
    """Parameters of norms and biases: they multiply nothing, but count as parameters."""
    return sum(p.numel() for p in model.parameters() if p.ndim == 1)


@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_work_is_what_pytorch_counts(tied, head_dim):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        vocab_size=40,
        tie_word_embeddings=tied,
    )
    check(LlamaForCausalLM(config))


@pytest.mark.parametrize(
    "family",
    ["gpt2", "mixtral", "qwen2_moe", "granitemoe", "glm4_moe", "deepseek_v2", "gemma4_text"],
)
def test_experts_that_a_token_does_not_go_through_cost_it_nothing(family):
    """Nor do embeddings of positions; keys and values may differ in their width (DeepSeek), and so may the
    heads of layers (Gemma 4)."""
    check(coverage.tiny_model(family, window=4096).float())


def test_what_is_frozen_gets_no_gradient():
    model = coverage.tiny_model("llama", window=4096).float()
    model.enable_input_require_grads()  # else the first layer's have fewer
    lora = Lora(rank=2, alpha=4.0, targets=None, embeddings_and_norms=False)
    add_adapters(model, lora, seed=0)
    work = ModelWork.of(model)
    assert 0 < work.matmul_parameters - work.frozen_parameters < work.frozen_parameters
    check(model)


def test_experts_may_be_modules_of_their_own():
    """As in the code that comes with a model."""
    model = coverage.tiny_model("mixtral", window=4096)
    before = ModelWork.of(model).matmul_parameters
    layer = model.model.layers[0].mlp
    in_tensors = sum(p.numel() for p in layer.experts.parameters())
    layer.experts = torch.nn.ModuleList(torch.nn.Linear(32, 8) for _ in range(4))
    assert ModelWork.of(model).matmul_parameters == before - in_tensors // 2 + 2 * (33 * 8)


def check(model: PreTrainedModel) -> None:
    work = ModelWork.of(model)
    # Eager attention computes the future pairs too, and hides them afterwards.
    frozen = work.frozen_parameters > 0  # vectors, then, too
    flops = work.flops(tokens=TOKENS, pairs=TOKENS**2) - (6 - 2 * frozen) * TOKENS * vectors(model)
    assert flops == counted(model)


def test_a_model_without_weights_costs_the_same():
    for family in ("llama", "mixtral", "gemma3_text"):
        with torch.device("meta"):
            weightless = ModelWork.of(coverage.tiny_model(family, window=64))
        assert weightless == ModelWork.of(coverage.tiny_model(family, window=64))
