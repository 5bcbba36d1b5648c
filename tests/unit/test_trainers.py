"""`patch_model` and `AnchorDataCollator`: what somebody else's training script gets."""

from __future__ import annotations

import copy
import subprocess
import sys
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import send_to_device
from torch.distributed.utils import _to_kwargs
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.data.data_collator import DataCollatorWithFlattening

from anchor_context import AnchorDataCollator, patch_model
from anchor_context.attention.patterns import mask_predicate
from anchor_context.integrations.boundaries import document_starts
from anchor_context.layout import IGNORE_INDEX as NO

BOS = 1
TOKENIZER = SimpleNamespace(bos_token_id=BOS, eos_token_id=2, pad_token_id=None)
DOCUMENTS = [[BOS, 11, 12, 13], [14, 15], [BOS, 16, 17, 18, 19]]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,  # sharp attention: a wrong mask is a large difference
    )
    return LlamaForCausalLM(config).double().eval()


def dense_logits(model, input_ids, layout) -> torch.Tensor:
    """transformers' own dense attention, given the pattern's mask and positions: the independent way."""
    index = torch.arange(input_ids.shape[1])
    batch = torch.arange(input_ids.shape[0])[:, None, None]
    visible = mask_predicate(layout)(batch, torch.tensor(0), index[:, None], index[None, :])
    visible = visible.expand(input_ids.shape[0], -1, -1)
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e300)
    model.set_attn_implementation("sdpa")  # eager rounds its softmax to float32
    with torch.no_grad():
        return model(
            input_ids,
            position_ids=layout.position_ids,
            attention_mask=mask[:, None],
            use_cache=False,
        ).logits


def features(documents=DOCUMENTS):
    return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in documents]


# --- the collator ---------------------------------------------------------------------------------


def test_documents_make_one_row_with_an_anchor_each():
    batch = AnchorDataCollator(TOKENIZER, engine="flash")(features())
    assert batch["input_ids"].tolist() == [[1, 11, 12, 13, 1, 14, 15, 1, 16, 17, 18, 19]]
    assert batch["labels"].tolist() == [[NO, 11, 12, 13, NO, 14, 15, NO, 16, 17, 18, 19]]
    assert batch["shift_labels"].tolist() == [[11, 12, 13, NO, 14, 15, NO, 16, 17, 18, 19, NO]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 5, 6, 0, 8, 9, 10, 11]]
    assert batch["layout"].cu_seqlens.tolist() == [0, 4, 7, 12]


def test_documents_share_one_anchor_for_flex():
    batch = AnchorDataCollator(TOKENIZER, engine="flex")(features())
    assert batch["input_ids"].tolist() == [[1, 11, 12, 13, 14, 15, 16, 17, 18, 19]]
    assert batch["labels"].tolist() == [[NO, NO, 12, 13, NO, 15, NO, 17, 18, 19]]
    assert batch["shift_labels"].tolist() == [[NO, 12, 13, NO, 15, NO, 17, 18, 19, NO]]
    assert batch["position_ids"].tolist() == [list(range(10))]
    assert batch["layout"].cu_seqlens.tolist() == [0, 1, 4, 6, 10]


def test_packed_rows_stay_rows_and_are_padded():
    rows = [
        {"input_ids": [3, 4, 5, 6, 7], "seq_lengths": [2, 3]},
        {"input_ids": [8, 9], "seq_lengths": [2], "labels": [8, NO]},
    ]
    batch = AnchorDataCollator(TOKENIZER, pattern="intra_doc_reset")(rows)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]]
    assert batch["shift_labels"].tolist() == [[4, NO, 6, 7, NO], [NO] * 5]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]
    assert batch["layout"].cu_seqlens.tolist() == [0, 2, 5, 7, 10]


def test_documents_of_a_row_are_told_by_its_positions_too():
    """As axolotl packs rows, with an attention mask that numbers the documents."""
    row = {"input_ids": [3, 4, 5, 6, 7], "position_ids": [0, 1, 0, 1, 2]}
    row |= {"attention_mask": [1, 1, 2, 2, 2], "completion_mask": [1] * 5}
    batch = AnchorDataCollator(TOKENIZER)([row, {"input_ids": [8, 9]}])
    apart = [{"input_ids": ids} for ids in ([3, 4], [5, 6, 7], [8, 9])]
    expected = AnchorDataCollator(TOKENIZER)(apart)
    for name in ("input_ids", "labels", "shift_labels", "position_ids"):
        assert batch[name].equal(expected[name]), name
    assert batch["layout"].cu_seqlens.equal(expected["layout"].cu_seqlens)
    masked = row | {"completion_mask": [0, 1, 0, 1, 1], "labels": [NO, 4, NO, 6, 7]}  # it says so
    assert AnchorDataCollator(TOKENIZER)([masked])["labels"][0].tolist() == [
        NO,
        NO,
        4,
        NO,
        NO,
        6,
        7,
    ]


def test_labels_of_the_feature_are_kept_under_an_added_anchor():
    feature = {"input_ids": [5, 6, 7], "labels": [NO, NO, 7]}
    batch = AnchorDataCollator(TOKENIZER)([feature])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7]]
    assert batch["shift_labels"].tolist() == [[NO, NO, 7, NO]]


def test_the_anchor_is_eos_where_there_is_no_bos():
    qwen = SimpleNamespace(bos_token_id=None, eos_token_id=2, pad_token_id=0)
    assert AnchorDataCollator(qwen)([{"input_ids": [5]}])["input_ids"].tolist() == [[2, 5]]
    neither = SimpleNamespace(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    with pytest.raises(ValueError, match="BOS"):
        AnchorDataCollator(neither)
    AnchorDataCollator(neither, pattern="intra_doc")  # needs none


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"input_ids": [3, 4], "attention_mask": [1, 0]}, "padding"),
        ({"input_ids": [3, 4], "seq_lengths": [3]}, "add up to 3"),
        ({"input_ids": [3, 4], "position_ids": [1, 2]}, "do not count"),
        ({"input_ids": [3, 4, 5], "position_ids": [1, 0, 1]}, "do not count"),
        ({"input_ids": [3, 4, 5], "position_ids": [0, 1, 1]}, "do not count"),
        ({"input_ids": [3, 4], "position_ids": [0]}, "do not count"),
        ({"input_ids": [3, 4], "completion_mask": [0, 1]}, "completion_mask leaves .* -100"),
        ({"input_ids": [3, 4], "assistant_masks": [0, 1]}, "assistant_masks leaves"),
        ({"input_ids": [3, 4], "labels": [3]}, "1 labels"),
    ],
)
def test_bad_features_are_named(feature, message):
    with pytest.raises(ValueError, match=message):
        AnchorDataCollator(TOKENIZER)([feature])


@pytest.mark.parametrize("pattern", ["anchor", "intra_doc"])
@pytest.mark.parametrize(
    "empty",
    [
        [],
        [{"input_ids": []}],
        [{"input_ids": []}, {"input_ids": []}],
        [{"input_ids": [3, 4], "seq_lengths": [2]}, {"input_ids": [], "seq_lengths": []}],
    ],
)
def test_a_row_without_tokens_is_named(empty, pattern):
    with pytest.raises(ValueError, match="have no tokens: drop empty documents"):
        AnchorDataCollator(TOKENIZER, pattern=pattern)(empty)


def test_an_empty_document_among_others_leaves_nothing():
    collator = AnchorDataCollator(TOKENIZER)
    batch = collator([{"input_ids": [5]}, {"input_ids": []}, {"input_ids": [6]}])
    assert batch["input_ids"].tolist() == [[1, 5, 1, 6]]


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["anchor", "intra_doc", "intra_doc_reset", "full"])
@pytest.mark.parametrize("engine", ["flash", "flex"])
def test_a_patched_model_computes_the_pattern(engine, pattern):
    rows = [
        {"input_ids": [*chain(*DOCUMENTS)], "seq_lengths": [4, 2, 5]},
        {"input_ids": [20, 21, 22], "seq_lengths": [3]},
    ]
    batch = AnchorDataCollator(TOKENIZER, engine=engine, pattern=pattern)(rows)
    layout = batch["layout"]
    model = tiny_llama()
    expected = dense_logits(model, batch["input_ids"], layout)
    plain = model(batch["input_ids"]).logits
    patch_model(model, engine=engine, pattern=pattern)
    out = model(**batch)
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-10)
    own_loss = torch.nn.functional.cross_entropy(
        expected.flatten(0, 1).float(), batch["shift_labels"].flatten()
    )
    torch.testing.assert_close(out.loss, own_loss)
    if pattern != "full":  # the case is not vacuous
        assert (plain - expected).abs().max() > 0.1


@pytest.mark.parametrize("stated_by", ["cu_seq_lens_q", "position_ids"])
def test_boundaries_of_other_collators_are_read(stated_by):
    """transformers' padding-free collator, with boundaries and without."""
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=stated_by == "cu_seq_lens_q")
    batch = flatten([{"input_ids": ids} for ids in DOCUMENTS])
    assert (batch.get("cu_seq_lens_q") is not None) == (stated_by == "cu_seq_lens_q")
    model = patch_model(tiny_llama(), engine="flex", pattern="anchor")
    logits = model(**batch).logits

    # By hand: own document and the row's first token, at the tokens' own indices.
    document = torch.tensor([0] * 4 + [1] * 2 + [2] * 5)
    index = torch.arange(11)
    own = document[:, None] == document[None, :]
    visible = (index[:, None] >= index) & (own | (index == 0))
    mask = torch.zeros(11, 11, dtype=torch.float64).masked_fill(~visible, -1e300)
    plain = tiny_llama()
    plain.set_attn_implementation("sdpa")
    expected = plain(
        batch["input_ids"], position_ids=index[None], attention_mask=mask[None, None]
    ).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_flash_without_anchors_is_refused_and_says_how():
    batch = DataCollatorWithFlattening()([{"input_ids": ids} for ids in DOCUMENTS])
    model = patch_model(tiny_llama(), engine="flash", pattern="anchor")
    with pytest.raises(ValueError, match="AnchorDataCollator"):
        model(**batch)


def test_documents_that_start_alike_have_no_anchor_for_that():
    batch = DataCollatorWithFlattening()([{"input_ids": [9, 5, 6]}, {"input_ids": [9, 7]}])
    model = patch_model(tiny_llama(), engine="flash", pattern="anchor")
    with pytest.raises(ValueError, match=r"BOS or EOS, \[1, 2\].*start with the tokens \[9\]"):
        model(**batch)


def test_a_model_that_names_no_special_token_takes_documents_that_start_alike():
    model = tiny_llama()
    model.config.bos_token_id = model.config.eos_token_id = None
    batch = DataCollatorWithFlattening()([{"input_ids": [9, 5, 6]}, {"input_ids": [9, 7]}])
    assert patch_model(model, engine="flash", pattern="anchor")(**batch).logits.isfinite().all()


def test_padding_behind_the_last_boundary_needs_no_anchor():
    model = patch_model(tiny_llama(), engine="flash", pattern="anchor")
    tokens, boundaries = torch.tensor([[1, 5, 6, 1, 7, 0, 0]]), torch.tensor([0, 3, 5])
    padded = model(tokens, cu_seq_lens_q=boundaries).logits[:, :5]
    torch.testing.assert_close(padded, model(tokens[:, :5], cu_seq_lens_q=boundaries).logits)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"attention_mask": torch.tensor([[0, 0, 1, 1]])},
        {"position_ids": torch.tensor([[1, 1, 0, 1]])},  # left padding
    ],
)
def test_a_call_without_boundaries_is_an_error(call):
    model = patch_model(tiny_llama())
    with pytest.raises(ValueError, match="does not say where documents are"):
        model(input_ids=torch.tensor([[1, 2, 3, 4]]), **call)


def test_a_layout_of_other_tokens_is_an_error():
    """Half of a batch with the whole batch's layout: what torch's DataParallel makes."""
    rows = [{"input_ids": [1, 5, 6], "seq_lengths": [3]}] * 2
    batch = AnchorDataCollator(TOKENIZER)(rows)
    model = patch_model(tiny_llama())
    with pytest.raises(ValueError, match=r"layout is of \(2, 3\) tokens, the call of \(1, 3\)"):
        model(input_ids=batch["input_ids"][:1], layout=batch["layout"])


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.tensor([[0] + [1] * 11]), "shuts out tokens"),
        (torch.ones(1, 1, 12, 12).bool(), "LlamaAttention was given an attention_mask"),
    ],
)
def test_a_mask_of_the_callers_own_is_an_error(mask, says):
    batch = AnchorDataCollator(TOKENIZER)(features())
    model = patch_model(tiny_llama())
    assert model(**batch, attention_mask=torch.ones(1, 12)).loss.isfinite()
    with pytest.raises(ValueError, match=says):
        model(**batch, attention_mask=mask)


def test_mismatches_are_errors():
    with pytest.raises(ValueError, match="engine 'fast'"):
        patch_model(tiny_llama(), engine="fast")
    with pytest.raises(ValueError, match="pattern 'mine'"):
        patch_model(tiny_llama(), pattern="mine")
    model = patch_model(tiny_llama(), pattern="intra_doc")
    with pytest.raises(ValueError, match="packed for the pattern 'anchor'"):
        model(**AnchorDataCollator(TOKENIZER)(features()))
    capped = tiny_llama()
    capped.config.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match="torch_varlen does not cap scores.*--attn_engine flex"):
        patch_model(capped, kernel="torch_varlen")


def test_a_model_patched_again_is_as_if_patched_once():
    twice = patch_model(tiny_llama(), engine="flex", pattern="anchor")
    copied = patch_model(copy.deepcopy(twice), pattern="full")  # a copy is patched on its own
    full = AnchorDataCollator(TOKENIZER, pattern="full")(features())
    assert copied(**full).loss.isfinite()
    with pytest.raises(ValueError, match="packed for the pattern 'full'"):
        twice(**full)
    with pytest.raises(ValueError, match="pattern 'mine'"):
        patch_model(twice, pattern="mine")
    batch = AnchorDataCollator(TOKENIZER, engine="flex", pattern="anchor")(features())
    first = twice(**batch).logits
    patch_model(twice, engine="flash", pattern="intra_doc")
    with pytest.raises(ValueError, match="packed for the pattern 'anchor'"):
        twice(**batch)
    once = patch_model(tiny_llama(), engine="flash", pattern="intra_doc")
    other = AnchorDataCollator(TOKENIZER, engine="flash", pattern="intra_doc")(features())
    torch.testing.assert_close(twice(**other).logits, once(**other).logits, rtol=0, atol=0)
    patch_model(twice, engine="flex", pattern="anchor")
    torch.testing.assert_close(twice(**batch).logits, first, rtol=0, atol=0)


def test_gradient_checkpointing_changes_nothing():
    batch = AnchorDataCollator(TOKENIZER)(features())
    losses = []
    for checkpointing in (False, True):
        model = patch_model(tiny_llama()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**batch).loss
        loss.backward()
        losses.append((loss, model.model.layers[0].self_attn.k_proj.weight.grad))
    torch.testing.assert_close(losses[0], losses[1])


def test_autocast_leaves_no_mixed_types():
    """Under autocast rotary embeddings return float32 queries beside bfloat16 values."""
    batch = AnchorDataCollator(TOKENIZER)(features())
    model = patch_model(tiny_llama().float())
    exact = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert abs(loss - exact) / exact < 0.05
    assert model.lm_head.weight.grad.isfinite().all()


def test_the_layout_survives_what_trainers_do_to_a_batch():
    """Accelerate moves batches to the device item by item, DDP walks through the arguments."""
    batch = AnchorDataCollator(TOKENIZER)(features())
    moved = send_to_device(batch, torch.device("meta"))
    assert moved["layout"].cu_seqlens.device.type == "meta"
    assert moved["layout"].max_seqlen == batch["layout"].max_seqlen
    assert _to_kwargs((), batch, torch.device("cpu"), False)[1][0]["layout"] is batch["layout"]


# --- boundaries in a call -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "starts"),
    [
        ([[0, 1, 2, 0, 1]], [0, 3]),
        ([[0, 1, 2, 0, 4]], [0, 3]),  # per-document anchors: a jump is not a restart
        ([[0, 0, 0]], [0, 1, 2]),
        ([[0, 1, 2], [0, 1, 0]], [0, 3, 5]),
        ([[1, 2, 3]], None),
        ([[1, 1, 0, 1]], None),
        ([[0, 1, 5, 3]], None),
    ],
)
def test_packed_positions(positions, starts):
    positions = torch.tensor(positions)
    found = document_starts(
        batch_size=positions.shape[0], row_length=positions.shape[1], position_ids=positions
    )
    assert (None if found is None else found.tolist()) == starts


def test_positions_of_images_say_nothing():
    positions = torch.arange(6).expand(3, 1, 6)
    assert document_starts(batch_size=1, row_length=6, position_ids=positions) is None


def test_boundaries_leave_padding_and_row_ends():
    starts = document_starts(batch_size=2, row_length=4, cu_seqlens=torch.tensor([0, 3, 6]))
    assert starts.tolist() == [0, 3, 4, 6]
    with pytest.raises(ValueError, match="rise from 0 to at most 8"):
        document_starts(batch_size=2, row_length=4, cu_seqlens=torch.tensor([0, 9]))


def test_importing_the_package_is_light():
    code = (
        "import sys, anchor_context; assert 'torch' not in sys.modules; anchor_context.patch_model"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("engine", "checkpointing"),
    [("flash", False), ("flex", False), ("reference", False), ("flash", True)],
)
def test_a_compiled_model_trains_as_it_does_without(engine, checkpointing):
    """What it attends to is asked outside its graphs, so new documents compile nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, plain = (patch_model(tiny_llama().train(), engine=engine) for _ in range(2))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend=backend)
    collator = AnchorDataCollator(TOKENIZER, engine=engine)
    counts = []
    for extra in range(6):
        documents = [*DOCUMENTS[: 1 + extra % 3], [BOS, *range(20, 24 + 3 * extra)]]
        batch = collator(features(documents))
        loss, expected = compiled(**batch).loss, plain(**batch).loss
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        loss.backward()
        expected.backward()
        counts.append(len(graphs))
    assert counts[0] > 0 and counts[-1] == counts[2]
    if not checkpointing:  # there PyTorch itself leaves layers uncompiled
        breaks = torch._dynamo.utils.counters["graph_break"]
        assert all("torch.compiler.disable" in reason for reason in breaks)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_a_call_are_told(rope_type, caplog):
    settings = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    if rope_type == "longrope":
        settings |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
        settings |= {"original_max_position_embeddings": 16}
    model = tiny_llama()
    patch_model(model)
    assert not caplog.records
    config = LlamaConfig(**model.config.to_dict() | {"rope_parameters": settings})
    patch_model(LlamaForCausalLM(config))
    assert "fix_frequencies" in caplog.text


def test_generating_with_a_patched_model_says_what_to_do():
    model = patch_model(tiny_llama())
    with pytest.raises(ValueError, match="to generate, save the model and load it"):
        model.generate(torch.tensor([[BOS, 5, 6]]), max_new_tokens=3)
