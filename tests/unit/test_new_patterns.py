"""A pattern is one entry of `PATTERNS`: two that the project does not have train by the entry alone.

    anchor_reset   as `anchor`, but positions restart behind every anchor: what the fields can say
    neighbour      a document sees the one before it besides: a rule of its own

They go the way that `train.py` goes: placement, rows, loader, engine, model with its loss, optimiser
steps. They are held to transformers' own attention in float64, with masks and positions written out here.
"""

from __future__ import annotations

import ast
import copy
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import BOS, prepare, write_token_rows
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from anchor_context.attention import flex, patterns, reference
from anchor_context.attention.patterns import PATTERNS, Pattern, attended_pairs
from anchor_context.data.inspection import Inspection
from anchor_context.data.loader import Dealing, collate, make_loader, one_step
from anchor_context.engine import check_combination, choose_anchor_placement, make_engine
from anchor_context.integrations.models import set_attention
from anchor_context.integrations.trainers import AnchorDataCollator, patch_model
from anchor_context.loss import CausalLMWithLoss, tiled_loss
from anchor_context.parallel.groups import RankGrid
from anchor_context.parallel.shard import shard_batch
from anchor_context.precision.arrangement import arrange
from tests.unit.test_rooms import sources

NEW = (
    Pattern(
        name="anchor_reset",
        unit="document",
        positions=lambda index, start: index - start,
        anchored=True,
    ),
    Pattern(
        name="neighbour",
        unit="row",
        positions=lambda index, start: index,
        sees=lambda query, key: query - key <= 1,
    ),
)
ROW, STEPS, ROWS_PER_STEP, RATE = 64, 3, 2, 0.5
CPU = torch.device("cpu")
make_cpu_engine = partial(make_engine, device=CPU)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for pattern in NEW:
        monkeypatch.setitem(PATTERNS, pattern.name, pattern)


@pytest.fixture
def prepared_for(tmp_path):
    """Rows of documents of 1 to 40 tokens for a pattern and an engine, as train.py asks for them."""
    lengths = np.random.default_rng(0).integers(1, 40, 40)
    documents = [[10 + (7 * d + i) % 190 for i in range(n)] for d, n in enumerate(lengths)]
    data = write_token_rows(tmp_path / "d.jsonl", [documents])

    def make(pattern: str, engine: str, **options):
        placement = choose_anchor_placement(pattern, engine)
        check_combination(engine, pattern=pattern, anchor_placement=placement)
        return prepare(
            data,
            tmp_path,
            data_format="tokenized",
            seq_length=ROW,
            anchor_placement=placement,
            **options,
        )

    return make


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=ROW,
    )
    return LlamaForCausalLM(config)


def train(prepared, pattern: str, engine: str, *, micro_batch_tokens: int | None) -> list:
    """(loss, rows) of every step, float32, and last the first step's gradients by name."""
    model = tiny_model()
    set_attention(model, make_cpu_engine(engine, dtype=torch.float32).attend)
    model = CausalLMWithLoss(model, tiled_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loader = make_loader(
        prepared,
        pattern=pattern,
        seed=0,
        batch_size=1,
        accumulation=ROWS_PER_STEP,
        data_rank=0,
        data_degree=1,
        dealing=Dealing(micro_batch_tokens=micro_batch_tokens),
    )
    batches, found, gradients = iter(loader), [], None
    for _ in range(STEPS):
        loss = 0.0
        for batch in one_step(batches):
            inputs = {key: batch[key] for key in ("input_ids", "position_ids", "labels", "layout")}
            loss_sum, _ = model(**inputs)
            (loss_sum / batch["step_targets"]).backward()
            loss += loss_sum.item() / batch["step_targets"]
        gradients = gradients or {n: p.grad.clone() for n, p in model.model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss, batch["step_rows"], batch["step_pairs"]))
    return [*found, gradients]


def by_hand(row, pattern: str, placement: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pattern's name means in one row: visible (S, S) bool, positions (S,)."""
    starts, documents = row.pieces()
    edges = [*starts.tolist(), ROW]
    document = torch.from_numpy(np.repeat(documents, np.diff(edges)))
    distance = document[:, None] - document
    if pattern == "neighbour":
        visible = (distance == 0) | (distance == 1)
    else:
        visible = distance == 0
        visible[:, 0] |= placement == "shared"
    visible = visible.tril()
    positions = torch.arange(ROW)
    if pattern == "anchor_reset":
        for start, end in pairwise(edges):
            shared = placement == "shared" and start > 0
            positions[start:end] = torch.arange(end - start) + shared  # behind the anchor at 0
    return visible, positions


def train_by_hand(prepared, pattern: str, steps_of_rows: list[list[int]]) -> list:
    """The losses of `train`, and the first gradients, by transformers' eager attention in float64."""
    model = tiny_model().double()
    model.set_attn_implementation("eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    found, gradients = [], None
    for ids in steps_of_rows:
        targets = int(prepared.target_counts[ids].sum())
        loss = 0.0
        for i in ids:
            row = prepared.row(i)
            visible, positions = by_hand(row, pattern, prepared.anchor_placement)
            mask = torch.zeros(1, 1, ROW, ROW, dtype=torch.float64).masked_fill(~visible, -1e300)
            logits = model(
                torch.from_numpy(row.tokens[:ROW].astype(np.int64))[None],
                attention_mask=mask,
                position_ids=positions[None],
            ).logits[0]
            part = cross_entropy(logits, torch.from_numpy(row.labels()), reduction="sum") / targets
            part.backward()
            loss += part.item()
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss)
    return [*found, gradients]


@pytest.mark.parametrize("micro_batch_tokens", [None, 30])
@pytest.mark.parametrize(
    ("pattern", "engine"),
    [("anchor_reset", "flash"), ("anchor_reset", "flex"), ("neighbour", "flex")],
)
def test_it_trains_as_its_entry_says(prepared_for, pattern, engine, micro_batch_tokens):
    prepared = prepared_for(pattern, engine)
    *steps, gradients = train(prepared, pattern, engine, micro_batch_tokens=micro_batch_tokens)
    rows = [ids for _, ids, _ in steps]
    *expected, true_gradients = train_by_hand(prepared, pattern, rows)
    assert [loss for loss, _, _ in steps] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]
    for name, true in true_gradients.items():
        error = (gradients[name] - true).abs().max() / true.abs().max()
        assert error < 1e-5, name

    def pairs(ids) -> int:
        visible = (by_hand(prepared.row(i), pattern, prepared.anchor_placement)[0] for i in ids)
        return sum(of_row.sum().item() for of_row in visible)

    assert [step_pairs for _, _, step_pairs in steps] == [pairs(ids) for ids in rows]
    share = pairs(range(len(prepared))) / (len(prepared) * ROW * (ROW + 1) // 2)
    assert Inspection.of(prepared).mask_share[pattern] == pytest.approx(share)


def test_the_anchored_one_has_its_anchors(prepared_for):
    """The project's own subject: a pattern that some list forgot would train without them, silently."""
    for engine, where in (("flash", "per_document"), ("flex", "shared")):
        prepared = prepared_for("anchor_reset", engine)
        assert prepared.anchor_placement == where
        batch = collate(prepared, [0, 1], pattern="anchor_reset")
        starts = batch["layout"].cu_seqlens[:-1].long()
        firsts = batch["input_ids"].flatten()[starts if where == "per_document" else [0, ROW]]
        assert (firsts == BOS).all()
        features = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
        tokens = AnchorDataCollator(_Tokenizer, engine=engine, pattern="anchor_reset")(features)
        assert (tokens["input_ids"] == BOS).sum() == (2 if where == "per_document" else 1)


class _Tokenizer:
    bos_token_id, eos_token_id, pad_token_id = BOS, 0, 0


def test_both_placements_compute_the_same(prepared_for):
    """A document's tokens have the same positions behind an anchor of their own and a shared one."""
    laid = {}
    for engine in ("flash", "flex"):
        batch = collate(prepared_for("anchor_reset", engine), [0], pattern="anchor_reset")
        ids, positions = batch["input_ids"][0], batch["position_ids"][0]
        laid[engine] = list(zip(ids.tolist(), positions.tolist(), strict=True))[:9]
        assert laid[engine][0] == (BOS, 0)
    own = [pair for pair in laid["flash"] if pair[0] != BOS]
    assert [pair for pair in laid["flex"] if pair[0] != BOS][: len(own)] == own


@pytest.mark.parametrize("window", [None, 1, 9, 30])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_pairs_of_a_new_rule_are_those_of_its_mask(prepared_for, interleaved, window):
    for pattern, engine in (("neighbour", "flex"), ("anchor_reset", "flash")):
        prepared = prepared_for(pattern, engine, interleave_chunks=interleaved)
        for i in range(4):
            starts, documents = prepared.row(i).pieces()
            mask = flex.dense_mask(
                collate(prepared, [i], pattern=pattern)["layout"], sliding_window=window
            )
            pairs = attended_pairs(
                np.diff(starts, append=ROW),
                documents=documents,
                pattern=pattern,
                anchor_placement=prepared.anchor_placement,
                windows=(window,),
            )
            assert pairs == mask.sum().item()


@pytest.mark.parametrize("window", [None, 9])
def test_flex_takes_pytorchs_way_to_the_mask_of_a_new_rule(prepared_for, window):
    prepared = prepared_for("neighbour", "flex")
    layout = collate(prepared, [0, 1], pattern="neighbour")["layout"]
    q, k, v = (torch.randn(2, 2, ROW, 16, dtype=torch.float64) for _ in range(3))
    mask = flex.block_mask(layout, sliding_window=window)
    out = flex_attention(q, k, v, block_mask=mask, scale=0.25)
    expected = reference.attend(q, k, v, layout, scale=0.25, sliding_window=window)
    torch.testing.assert_close(out, expected)


def test_chunks_of_interleaved_rows_see_by_their_documents(prepared_for):
    prepared = prepared_for("neighbour", "flex", interleave_chunks=True)
    found = collate(prepared, [0, 1, 2], pattern="neighbour")["layout"]
    visible = flex.dense_mask(found)[:, 0]
    for b in range(3):
        assert torch.equal(visible[b], by_hand(prepared.row(b), "neighbour", "none")[0])


def test_flash_and_the_ring_refuse_a_new_rule_by_name(prepared_for):
    says = "--attention_pattern neighbour has a rule of its own.*--attn_engine flex"
    with pytest.raises(ValueError, match=says):
        check_combination("flash", pattern="neighbour")
    with pytest.raises(ValueError, match=says):
        patch_model(copy.deepcopy(tiny_model()), engine="flash", pattern="neighbour")
    prepared = prepared_for("neighbour", "flex")
    batch = collate(prepared, [0], pattern="neighbour")
    q = torch.zeros(1, 2, ROW, 16)
    with pytest.raises(ValueError, match=says):
        make_cpu_engine("flash", dtype=torch.float32).attend(q, q, q, batch["layout"], scale=1.0)
    with pytest.raises(ValueError, match=says):
        shard_batch(batch, grid=RankGrid(ring_degree=2))


def test_the_laboratory_knows_it():
    for pattern in NEW:
        index = torch.arange(30)
        arrangement = arrange(pattern.name, 30, 3, CPU)
        starts, visible = arrangement.seen(index, None)
        back = 10 if pattern.name == "neighbour" else 0
        assert starts.tolist() == [max(0, i // 10 * 10 - back) for i in range(30)]
        assert visible.sum(1).tolist() == (index - starts + 1).tolist()
        moved = arrangement.shifted(5) - arrangement.positions
        stays = [0, 10, 20] if pattern.anchored else []
        assert (moved == 0).nonzero().flatten().tolist() == stays


def test_no_other_room_writes_patterns_down():
    """A comparison with a pattern's name, or a list of names, would not know the next pattern.

    A benchmark may choose which it compares; "full" is also a word of other flags.
    """
    names = set(PATTERNS) - {pattern.name for pattern in NEW} - {"full"}
    for path in sources():
        if path == Path(patterns.__file__) or "benchmarks" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
            elif isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
                parts = node.keys if isinstance(node, ast.Dict) else node.elts
            else:
                continue
            found = names & {part.value for part in parts if isinstance(part, ast.Constant)}
            allowed = 0 if isinstance(node, ast.Compare) else 1
            assert len(found) <= allowed, f"{path}:{node.lineno} names {sorted(found)}"
