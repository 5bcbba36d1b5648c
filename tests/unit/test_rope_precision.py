"""The precision laboratory, on random weights: its steps are transformers' own, and its two parts part."""

from __future__ import annotations

import csv
from itertools import pairwise

import pytest
import torch
from transformers import AutoModel, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from anchor_context.demo import standard_library_texts, tiny_llama, train_tokenizer
from anchor_context.rope.__main__ import arrange, load_tokens, main
from anchor_context.rope.precision import (
    EXACT,
    Case,
    Change,
    TokenChange,
    each_step,
    float32_rotation,
    measure_layer,
    model_arithmetic,
    rope_of,
    rotate,
    sample_queries,
    visit_layers,
)

HEAD_DIM = 32
CASES = [
    Case("float32", torch.float32, model_arithmetic(torch.float32)),
    Case("bfloat16", torch.bfloat16, model_arithmetic(torch.bfloat16)),
    Case("bfloat16, rotated in float32", torch.bfloat16, float32_rotation(torch.bfloat16)),
]
PATTERNS = ("full", "intra_doc", "intra_doc_reset", "anchor")


def make_model(config_class=LlamaConfig):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    return AutoModel.from_config(config).eval()


def measure(length: int, pattern: str, shifts: list[int], *, documents: int = 4) -> list:
    model = make_model()
    queries = sample_queries(length, number=16)
    found = []

    def visit(layer, query, key):
        found.extend(
            measure_layer(
                query,
                key,
                layer=layer,
                queries=queries,
                rope=rope_of(model),
                scale=HEAD_DIM**-0.5,
                arrangement=arrange(pattern, length, documents, torch.device("cpu")),
                cases=CASES,
                shifts=shifts,
                by_token=True,
            )
        )

    visit_layers(model, torch.randint(128, (1, length)), visit, queries=queries)
    return found


def mean(changes: list, column: str, **where) -> float:
    found = [
        getattr(change, column)
        for change in changes
        if isinstance(change, Change) and all(getattr(change, k) == v for k, v in where.items())
    ]
    assert found
    return sum(found) / len(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["model", "float32"])
def test_the_steps_are_those_of_transformers_to_the_bit(dtype, which):
    table = make_model().rotary_emb
    rope = rope_of(make_model())
    positions = torch.arange(30_000, 30_256)
    x = torch.randn(4, 256, HEAD_DIM).to(dtype)
    if which == "model":
        arithmetic = model_arithmetic(dtype)
        expected = apply_rotary_pos_emb(x[None], x[None], *table(x, positions[None]))[0][0]
    else:
        arithmetic = float32_rotation(dtype)
        wide = x[None].float()
        expected = apply_rotary_pos_emb(wide, wide, *table(wide, positions[None]))[0][0].to(dtype)
    found = rotate(x.double(), *rope.tables(positions, arithmetic), arithmetic)
    assert torch.equal(found, expected.double())


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_visited_queries_and_keys_give_the_models_own_attention(config_class):
    model = make_model(config_class)
    ids, queries = torch.randint(128, (1, 40)), sample_queries(40, number=8)
    seen = []
    visit_layers(model, ids, lambda layer, q, k: seen.append((layer, q, k)), queries=queries)
    assert [layer for layer, *_ in seen] == [0, 1]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    cos, sin = rope_of(model).tables(torch.arange(40), EXACT)
    for (_, q, k), expected in zip(seen, attentions, strict=True):
        q = rotate(q.double(), cos[queries], sin[queries], EXACT)
        k = rotate(k.double(), cos, sin, EXACT).repeat_interleave(2, dim=0)
        scores = q @ k.mT * HEAD_DIM**-0.5
        weights = scores.masked_fill(torch.arange(40) > queries[:, None], -torch.inf).softmax(-1)
        torch.testing.assert_close(weights.float(), expected[0][:, queries], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [64, 512, 4096])
def test_a_common_shift_changes_nothing_in_float64_and_something_in_bfloat16(length):
    changes = measure(length, "full", [16, 65_536])
    for change in changes:
        if isinstance(change, Change):
            assert change.exact_max < 1e-10
    assert mean(changes, "rounding_mean", arithmetic="bfloat16", quantity="logit") > 1e-3


def test_float64_stays_exact_at_long_positions():
    # The positions of the longest rows; the model's forward is not needed for it.
    rope, length = rope_of(make_model()), 256
    x = torch.randn(length, HEAD_DIM, dtype=torch.float64)
    scores = []
    for start in (0, 1_048_576):
        tables = rope.tables(start + torch.arange(0, length * 1024, 1024), EXACT)
        rotated = rotate(x, *tables, EXACT)
        scores.append(rotated @ rotated.T)
    assert (scores[1] - scores[0]).abs().max() < 1e-10


def test_the_change_in_bfloat16_grows_with_the_rows_length():
    # What a query suffers in all grows with every length, and so does its attention; a single
    # pair's logit is rounded by much the same amount wherever it stands.
    logits, weights = [], []
    for length in (64, 256, 1024, 4096):
        changes = measure(length, "full", [65_536])
        where = {"arithmetic": "bfloat16", "shift": 65_536}
        logits.append(mean(changes, "rounding_sum_per_query", quantity="logit", **where))
        weights.append(mean(changes, "rounding_sum_per_query", quantity="weight", **where))
    assert all(3 < long / short < 6 for short, long in pairwise(logits)), logits
    assert weights[-1] > weights[0]


def test_rotating_in_float32_removes_a_part_of_it():
    changes = measure(512, "full", [16, 65_536])
    once = mean(changes, "rounding_mean", arithmetic=CASES[2].label, quantity="logit")
    model = mean(changes, "rounding_mean", arithmetic="bfloat16", quantity="logit")
    exact = mean(changes, "rounding_mean", arithmetic="float32", quantity="logit")
    assert exact < once < 0.8 * model


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_anchors_distance_is_the_exact_part_and_its_key_has_no_error(pattern):
    # 4 documents of 64 tokens; the shift is coarse enough for every head to feel the distance.
    changes = [c for c in measure(256, pattern, [1024]) if isinstance(c, Change)]
    for change in changes:
        if pattern == "anchor":
            assert change.first_key_error == 0.0
            assert change.exact_sum_per_query > 1e-4
            if (
                change.quantity == "logit"
            ):  # nothing but the anchor's logit moves in exact arithmetic
                assert change.exact_sum_per_query == pytest.approx(
                    change.first_exact_mean, abs=1e-10
                )
        else:
            assert change.first_key_error > 0.0
            assert change.exact_max < 1e-10
        # The exact part is not in it: an anchor's distance changes its logit by far more than this.
        if change.quantity == "logit":
            limit = 1e-3 if change.arithmetic == "float32" else 0.2
            assert 0 < change.rounding_max < limit


def test_the_two_parts_add_up_to_what_the_arithmetic_computes():
    changes = [c for c in measure(64, "anchor", [128], documents=1) if isinstance(c, Change)]
    model, queries = make_model(), sample_queries(64, number=16)
    # Independently: a bfloat16 layer of transformers, anchor at 0, the rest at i and at i + 128.
    expected = {}

    def visit(layer, query, key):
        q, k = query.bfloat16()[None], key.bfloat16()[None]
        logits = []
        for shift in (0, 128):
            positions = torch.arange(64) + shift
            positions[0] = 0
            cos, sin = model.rotary_emb(q, positions[None])
            rotated_q = apply_rotary_pos_emb(q, q, cos[:, queries], sin[:, queries])[0][0]
            rotated_k = apply_rotary_pos_emb(k, k, cos, sin)[0][0].repeat_interleave(2, dim=0)
            logits.append(rotated_q.float() @ rotated_k.float().mT * HEAD_DIM**-0.5)
        # Away from the anchor the exact part is 0, so that the change there is the rounding part.
        change = (logits[1] - logits[0]).abs()[:, :, 1:]
        visible = torch.arange(1, 64) <= queries[:, None]
        for head in range(4):
            expected[layer, head] = change[head][visible].max().item()

    visit_layers(model, torch.randint(128, (1, 64)), visit, queries=queries)
    found = [c for c in changes if c.arithmetic == "bfloat16" and c.quantity == "logit"]
    assert len(found) == len(expected) == 8
    for change in found:
        at_least = expected[change.layer, change.head]
        assert change.rounding_max >= at_least * (1 - 1e-4)
        if change.rounding_max > at_least * (
            1 + 1e-4
        ):  # then the anchor's own rounding is the worst
            assert change.first_rounding_mean * 16 >= change.rounding_max * (1 - 1e-4)


def test_the_first_tokens_share_and_the_profile_by_token():
    found = measure(256, "full", [16, 1024])
    share = mean(found, "first_share", arithmetic="bfloat16", quantity="weight")
    assert 0 < share < 1
    profile = [
        row
        for row in found
        if isinstance(row, TokenChange)
        and (row.layer, row.arithmetic, row.quantity) == (0, "bfloat16", "logit")
    ]
    assert [(row.distance_from, row.distance_to) for row in profile[:4]] == [
        (0, 0),
        (1, 1),
        (2, 3),
        (4, 7),
    ]
    assert {row.shift for row in profile} == {1024}
    first = mean(
        found, "first_rounding_mean", arithmetic="bfloat16", quantity="logit", layer=0, shift=1024
    )
    assert profile[0].rounding_mean == pytest.approx(first)


def test_each_step_is_rounded_alone_and_together():
    steps = list(each_step(torch.bfloat16))
    assert [step for step, how, _ in steps if how == "alone"] == [
        "angles",
        "tables",
        "rotation",
        "kernel",
        "score",
    ]
    alone = {step: arithmetic for step, how, arithmetic in steps if how == "alone"}
    assert alone["tables"].tables == torch.bfloat16 and alone["tables"].kernel == torch.float64
    whole = steps[-1][2]
    assert (whole.angles, whole.score) == (torch.float32, torch.bfloat16)


def test_the_command_writes_report_tables_and_pictures(tmp_path):
    make_model().config.save_pretrained(tmp_path / "model")
    flags = f"precision --model {tmp_path}/model --random-weights --out {tmp_path}/out"
    main([*flags.split(), "--lengths", "64,128", "--shifts", "0,16", "--documents", "2"])
    out = tmp_path / "out"
    report = (out / "report.md").read_text()
    for said in (
        "first token's share",
        "32, evenly over the row",
        "random, seed 42",
        "intra_doc_reset",
    ):
        assert said in report
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert len(pictures) == 6 and all(f"({name})" in report for name in pictures)
    with (out / "change.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    # lengths × shifts × patterns × arithmetics × layers × heads × quantities
    assert len(rows) == 2 * 2 * 4 * 5 * 2 * 4 * 2
    still = [row for row in rows if row["shift"] == "0"]
    assert all(float(row["rounding_max"]) == 0 for row in still)


def test_a_models_own_weights_on_a_text(tmp_path):
    texts = standard_library_texts(at_most_characters=20_000)
    tokenizer = train_tokenizer(texts, vocab_size=512)
    tokenizer.save_pretrained(tmp_path)
    tiny_llama(tokenizer, hidden=32, layers=2).save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(texts[0])
    flags = f"precision --model {tmp_path} --text {tmp_path}/text.txt --out {tmp_path}/out"
    only = "--lengths 128 --shifts 64 --dtypes bfloat16 --patterns anchor --documents 2 --queries 8"
    main([*flags.split(), *only.split()])
    report = (tmp_path / "out/report.md").read_text()
    assert "the model's own" in report and "text.txt" in report
    with (tmp_path / "out/change.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["first_key_error"] for row in rows} == {"0.0"}
    assert all(float(row["rounding_max"]) > 0 for row in rows)


def test_dynamic_frequencies_are_refused():
    model = make_model()
    model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="dynamic RoPE has other frequencies at every length"):
        rope_of(model)


def test_bad_values_are_named(tmp_path, capsys):
    for flags, said in (
        (["--shifts", "0"], "--shifts 0 changes nothing"),
        (["--lengths", "4"], "--documents 4"),
        (["--dtypes", "int8"], "['int8'] unknown; choose from float32,bfloat16,float16"),
        (["--patterns", "ful"], "choose from full,intra_doc"),
        (["--lengths", "0,64"], "positive numbers"),
    ):
        with pytest.raises(SystemExit):
            main(["precision", "--model", "m", "--out", "o", *flags])
        assert said in capsys.readouterr().err
    train_tokenizer(["a b c"], vocab_size=300).save_pretrained(tmp_path)
    (tmp_path / "short.txt").write_text("a b c")
    with pytest.raises(ValueError, match=r"short.txt has 3 tokens, and --lengths asks for 64"):
        load_tokens(f"{tmp_path}/short.txt", str(tmp_path), 300, 64)
