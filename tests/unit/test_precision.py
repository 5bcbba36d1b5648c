"""The precision laboratory, on random weights: its steps are transformers' own, and its two parts part."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModel,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

import anchor_context.precision.__main__ as laboratory
from anchor_context.attention.patterns import PATTERNS, make_layout, mask_predicate
from anchor_context.demo import standard_library_texts, tiny_llama, train_tokenizer
from anchor_context.precision import plots
from anchor_context.precision.__main__ import arrange, document_starts, load_tokens, main
from anchor_context.precision.arithmetic import (
    EXACT,
    attention,
    each_step,
    eager_arithmetic,
    float32_rotation,
    model_arithmetic,
    rotate,
    scores,
)
from anchor_context.precision.measure import (
    Case,
    Change,
    TokenChange,
    _Distances,
    measure_layer,
    sample_queries,
)
from anchor_context.precision.model import check_attention, rope_of, scoring_of, visit_layers
from anchor_context.precision.table import Table
from tests.model_coverage import tiny_model

HEAD_DIM = 32
CASES = [
    Case("float32", torch.float32, model_arithmetic(torch.float32)),
    Case("bfloat16", torch.bfloat16, model_arithmetic(torch.bfloat16)),
    Case("bfloat16, rotated in float32", torch.bfloat16, float32_rotation(torch.bfloat16)),
]


def make_model(config_class=LlamaConfig, **settings):
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
        **settings,
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


@pytest.mark.parametrize(
    "config_class, settings",
    [
        (LlamaConfig, {}),
        (MistralConfig, {"sliding_window": 8}),
        (MistralConfig, {"sliding_window": None}),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        (Qwen3Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        (GraniteConfig, {"attention_multiplier": 0.5}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_measured_with_the_layers_own_scale_and_window(config_class, settings, dtype):
    model = make_model(config_class, **settings).to(dtype)
    check_attention(model)
    assert model.config._attn_implementation == "sdpa"
    assert getattr(model.config, "sliding_window", None) == settings.get("sliding_window")
    ids, index = torch.arange(40)[None], torch.arange(40)
    model.set_attn_implementation("eager")
    seen = []
    visit_layers(model, ids, lambda layer, q, k: seen.append((q, k)), queries=index)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    full = arrange("full", 40, 1, torch.device("cpu"))
    for (q, k), scoring, expected in zip(seen, scoring_of(model), attentions, strict=True):
        _, visible = full.seen(index, scoring.window)
        for head in range(4):
            _, weights, _ = attention(
                q[head][None].double(),
                k[head // 2].double(),
                positions=full.positions,
                queries=index,
                visible=visible,
                rope=rope_of(model),
                scale=scoring.scale,
                arithmetic=eager_arithmetic(dtype),
            )
            error = (weights[0] - expected[0, head]).abs().max()
            assert error < (1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("window", [None, 5])
def test_a_query_sees_what_the_pattern_and_the_window_let_it(pattern, window):
    length, documents, index = 32, 3, torch.arange(32)
    layout = make_layout(
        document_starts(length, documents),
        batch_size=1,
        row_length=length,
        pattern=pattern,
        anchor_placement=PATTERNS[pattern].placement("per_document"),
    )
    zero = torch.tensor(0)
    expected = mask_predicate(layout, sliding_window=window)(
        zero, zero, index[:, None], index[None, :]
    )
    starts, visible = arrange(pattern, length, documents, torch.device("cpu")).seen(index, window)
    assert torch.equal(visible, expected)
    assert torch.equal(starts, expected.int().argmax(dim=1)), "not the first token seen"


@pytest.mark.parametrize(
    "family, said",
    [
        ("phi", "weights of layer 0 differ by"),  # rotates a part of each head
        ("cohere", "weights of layer 0 differ by"),  # rotates neighbours, not halves
        ("gpt_oss", "its attention has sinks"),
        ("glm", "rotates a part of its heads"),
        ("gpt_neox", "rotates a part of its heads"),
        ("cohere2", "only 1 of 2 layers rotate"),
        ("lfm2", "layers of the kind conv"),
        ("falcon", "do not say how they scale"),
        ("gemma2", "attn_logit_softcapping"),
        ("gemma3_text", "each kind of layers has RoPE frequencies of its own"),
        ("gpt2", "cannot reach the rotation"),
    ],
)
def test_a_model_with_another_attention_is_refused(family, said):
    model = tiny_model(family, window=4096).float().base_model
    with pytest.raises(ValueError, match=said):
        next(
            laboratory.measure(
                model,
                torch.arange(64) % 64,
                lengths=[64],
                shifts=[16],
                dtypes=["bfloat16"],
                patterns=["full"],
                documents=1,
                queries=4,
                setting={},
            )
        )


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


def test_the_change_in_bfloat16_grows_with_the_rows_length_and_in_float64_does_not():
    # Near position 0 most frequencies have hardly turned, and are hardly rounded; so with the row grow
    # the change of a pair's logit (by little: ×1.08 here) and that of a query's weights (×1.22), which
    # an error alike in all pairs would leave as they are. A query's logits in all grow with its tokens.
    lengths, pair, weights, total = (64, 256, 1024, 4096), [], [], []
    for length in lengths:
        changes = measure(length, "full", [16])
        assert all(c.exact_max < 1e-10 for c in changes if isinstance(c, Change))
        where = {"arithmetic": "bfloat16", "shift": 16}
        pair.append(mean(changes, "rounding_mean", quantity="logit", **where))
        weights.append(mean(changes, "rounding_sum_per_query", quantity="weight", **where))
        total.append(mean(changes, "rounding_sum_per_query", quantity="logit", **where))
    for grown in (pair, weights):
        assert all(short < long for short, long in pairwise(grown)), grown
    assert 1.05 < pair[-1] / pair[0] < 1.15
    assert 1.15 < weights[-1] / weights[0] < 1.4
    assert total[-1] / total[0] > lengths[-1] / lengths[0]


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
    profiles = [row for row in found if isinstance(row, TokenChange)]
    changes = [row for row in found if isinstance(row, Change)]
    assert len(profiles) == len(changes)
    for profile, change in zip(profiles, changes, strict=True):
        for name in ("arithmetic", "pattern", "shift", "layer", "head", "quantity"):
            assert getattr(profile, name) == getattr(change, name)
        means = profile.rounding_mean
        assert list(means)[:4] == ["distance_0", "distance_1", "distance_2_3", "distance_4_7"]
        assert means["distance_0"] == pytest.approx(change.first_rounding_mean)
        assert min(means.values()) <= change.rounding_mean <= max(means.values())
    assert {profile.shift for profile in profiles} == {16, 1024}
    assert {(profile.layer, profile.head) for profile in profiles} == {
        (layer, head) for layer in range(2) for head in range(4)
    }


def test_a_profile_averages_the_pairs_at_each_distance():
    starts, index = torch.tensor([0, 4]), torch.arange(8)
    visible = (index >= starts[:, None]) & (index <= torch.tensor([[5], [6]]))
    rounding = torch.stack((index, 10.0 * index)).where(visible, 0)[None].double()
    (means,) = _Distances(starts, visible).means(rounding)
    assert means == {  # tokens 0 … 5 of the first query, 4 … 6 of the second
        "distance_0": (0 + 40) / 2,
        "distance_1": (1 + 50) / 2,
        "distance_2_3": (2 + 3 + 60) / 3,
        "distance_4_7": (4 + 5) / 2,
    }


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


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_score_step_is_transformers_eager_attention_to_the_bit(head_dim, monkeypatch):
    # Small whole numbers: their products and sums are exact in float32, in any order.
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randint(-60, 61, (4, 96, head_dim), generator=generator).bfloat16() for _ in range(2)
    )
    scale, seen = head_dim**-0.5, []
    softmax = torch.nn.functional.softmax

    def record(scores, **kwargs):
        seen.append(scores)
        return softmax(scores, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "softmax", record)
    layer = SimpleNamespace(num_key_value_groups=1, training=False)
    eager_attention_forward(layer, query[None], key[None], key[None], None, scale)
    arithmetic = replace(EXACT, score=torch.bfloat16)
    found = [
        scores(
            query[head : head + 1].double(), key[head].double(), scale=scale, arithmetic=arithmetic
        )
        for head in range(4)
    ]
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(torch.cat(found), seen[0][0].double())
    exact = query.double() @ key.double().mT * scale
    assert not torch.equal(exact, seen[0][0].double()), "nothing was rounded"


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
        "equal scores round equally",
        "intra_doc_reset",
    ):
        assert said in report
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert len(pictures) == 7 and all(f"({name})" in report for name in pictures)
    with (out / "change.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    # lengths × shifts × patterns × arithmetics × layers × heads × quantities
    assert len(rows) == 2 * 2 * 4 * 5 * 2 * 4 * 2
    still = [row for row in rows if row["shift"] == "0"]
    assert all(float(row["rounding_max"]) == 0 for row in still)
    with (out / "tokens.csv").open() as stream:
        by_token = list(csv.DictReader(stream))
    place = ("length", "arithmetic", "pattern", "shift", "layer", "head", "quantity")
    assert [[row[n] for n in place] for row in by_token] == [
        [row[n] for n in place] for row in rows
    ]
    of_anchor = [row for row in by_token if row["length"] == "128" and row["pattern"] == "anchor"]
    assert all(row["distance_32_63"] and not row["distance_64_127"] for row in of_anchor)
    with (out / "steps.csv").open() as stream:
        steps = list(csv.DictReader(stream))
    # lengths × types × steps alone and so far × patterns × layers × heads × quantities
    assert len(steps) == 2 * 3 * 5 * 2 * 4 * 2 * 4 * 2
    assert {row["pattern"] for row in steps} == set(PATTERNS)


def test_every_pattern_has_its_axes_in_the_pictures(tmp_path, monkeypatch):
    make_model().config.save_pretrained(tmp_path / "model")
    flags = f"precision --model {tmp_path}/model --random-weights --out {tmp_path}/out --queries 4"
    drawn = {}

    def kept(draw):
        def draw_and_keep(found):
            return drawn.setdefault(draw.__name__, draw(found))

        return draw_and_keep

    pictures = {name: kept(draw) for name, draw in plots.PICTURES.items()}
    monkeypatch.setattr(laboratory, "PICTURES", pictures)
    main([*flags.split(), "--lengths", "64,128", "--shifts", "0,16,64", "--dtypes", "bfloat16"])
    for name, figure in drawn.items():
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            low, high = sorted(axis.get_view_interval())
            places = [place for place in axis.get_majorticklocs() if low <= place <= high]
            texts = [text for text in axis.get_major_formatter().format_ticks(places) if text]
            flat = axis.axes.get_label() == "<colorbar>" and axis is axis.axes.xaxis
            assert len(texts) >= 2 or flat, f"{name}: {texts} on {axis}"
    colours = {line.get_label(): line.get_color() for line in drawn["of_first_token"].axes[0].lines}
    assert [colours[name] for name in PATTERNS] == [p.colour for p in PATTERNS.values()]
    assert len(set(colours.values())) == len(PATTERNS) + 1  # and grey for what is no pattern's
    of_all = [drawn.pop("of_first_token"), drawn.pop("by_pattern")]
    assert all(axes.get_ylabel() and axes.has_data() for f in of_all for axes in f.axes)
    for name, figure in drawn.items():
        titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
        assert titles == [f"pattern {pattern}" for pattern in PATTERNS], name
        assert all(axes.get_xlabel() for axes in figure.axes if axes.get_label() != "<colorbar>")
        assert all(axes.has_data() for axes in figure.axes), name
    images = [axes.images[0] for axes in drawn["by_head"].axes if axes.images]
    values = [image.get_array() for image in images]
    ends = min(v.min() for v in values), max(v.max() for v in values)
    assert len(images) == 4 and all(image.get_clim() == ends for image in images)
    for axes in drawn["by_step"].axes:
        curves = {line.get_label(): line.get_ydata() for line in axes.lines}
        lowest, highest = axes.get_ylim()
        assert max(curves["all together"]) < highest <= 10**5 * lowest
        below = [name for name, y in curves.items() if max(y) < lowest]
        told = [f"↓ below: {', '.join(below)}"] if below else []
        assert [text.get_text() for text in axes.texts] == told
        widths = [line.get_linewidth() for line in axes.lines]
        assert widths == sorted(set(widths), reverse=True), "a curve would hide another"
    assert any(axes.texts for axes in drawn["by_step"].axes), "the case shows nothing"


@pytest.mark.parametrize(
    ("config_class", "settings", "flags"),
    [
        (MistralConfig, {"sliding_window": 16}, "--lengths 256,512 --queries 4 --documents 1"),
        (
            Qwen2Config,
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "--lengths 64,128",
        ),
    ],
)
def test_layers_that_see_less_leave_cells_empty(tmp_path, config_class, settings, flags):
    """A window hides the far bins of distances from some rows, patterns or layers."""
    make_model(config_class, **settings).config.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    main(
        f"precision --model {tmp_path}/model --random-weights --out {out} --shifts 16 "
        f"--dtypes bfloat16 {flags}".split()
    )
    assert "by_token.png" in (out / "report.md").read_text()
    with (out / "tokens.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    filled = [sum(v != "" for k, v in row.items() if k.startswith("distance_")) for row in rows]
    assert min(filled) < max(filled)


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


def test_the_report_is_written_after_every_length_and_before_the_pictures(tmp_path, monkeypatch):
    """A run that is stopped, or still draws, has given what it measured; and none falls silent."""
    make_model().config.save_pretrained(tmp_path / "model")
    seen, silent = [], []
    report = tmp_path / "out/report.md"

    def visit_layers(model, input_ids, visit, *, queries):
        seen.append((input_ids.shape[1], report.read_text() if report.exists() else ""))
        return measured(model, input_ids, visit, queries=queries)

    class Bar(laboratory.tqdm):
        def update(self, n=1):
            silent.append(self.desc)
            return super().update(n)

    def time_rotation(*, row_length: int, **what):
        return {"model": 1.0, "float32": float(row_length)}

    measured = laboratory.visit_layers
    monkeypatch.setattr(laboratory, "visit_layers", visit_layers)
    monkeypatch.setattr(laboratory, "time_rotation", time_rotation)
    monkeypatch.setattr(laboratory, "tqdm", Bar)
    monkeypatch.setattr(
        laboratory,
        "PICTURES",
        {"one.png": lambda found: seen.append((0, report.read_text())) or plots.by_head(found)},
    )
    flags = f"precision --model {tmp_path}/model --random-weights --out {tmp_path}/out --queries 4"
    main(
        [
            *flags.split(),
            *[
                "--lengths",
                "64,128",
                "--shifts",
                "16",
                "--dtypes",
                "bfloat16",
                "--patterns",
                "full,anchor",
            ],
        ]
    )
    lengths, reports = zip(*seen, strict=True)
    assert lengths == (64, 128, 0)
    rows = [{n for n in ("64", "128") if f"| full | {n} |" in text} for text in reports]
    assert rows == [set(), {"64"}, {"64", "128"}]
    for length, text in zip((64, 128), reports[1:], strict=True):
        assert f"keys of {length} tokens" in text and f"| {length}.00 |" in text, "another row's"
    assert silent == ["64 tokens"] * 2 + ["128 tokens"] * 2 + ["pictures"]


def test_layers_can_be_chosen(tmp_path):
    make_model().config.save_pretrained(tmp_path / "model")
    flags = f"precision --model {tmp_path}/model --random-weights --out {tmp_path}/out --queries 4"
    only = ["--lengths", "64", "--shifts", "16", "--dtypes", "bfloat16", "--patterns", "anchor"]
    with pytest.raises(ValueError, match="--layers 2: the model has the layers 0 to 1"):
        main([*flags.split(), *only, "--layers", "0,2"])
    main([*flags.split(), *only, "--layers", "1"])
    for name in ("change", "steps", "tokens"):
        with (tmp_path / f"out/{name}.csv").open() as stream:
            assert {row["layer"] for row in csv.DictReader(stream)} == {"1"}
    assert "| layers measured | 1 |" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_is_taken_where_there_is_one(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    needed = ["precision", "--model", "m", "--out", "o"]
    assert laboratory.parse(needed).device == ("cuda" if gpu else "cpu")
    assert laboratory.parse([*needed, "--device", "cpu"]).device == "cpu"


def test_a_table_counts_the_rows_that_are_asked_for():
    table = Table(
        [
            {"pattern": "full", "head": 0, "value": 1.0, "far": 5.0},
            {"pattern": "anchor", "head": 0, "value": 2.0},
            {"pattern": "full", "head": 1, "value": 4.0},
        ]
    )
    assert table.values("pattern") == ["full", "anchor"]
    assert table.mean("value") == 7 / 3 and table.max("value", head=0) == 2
    assert table.mean("value", pattern="full") == 2.5 and table.mean("far", pattern="full") == 5
    assert table.where(pattern="full", head=1).rows == [
        {"pattern": "full", "head": 1, "value": 4.0}
    ]
    for wanted in ({"pattern": "none"}, {"pattern": "anchor"}):
        with pytest.raises(AssertionError, match="no far was measured"):
            table.mean("far", **wanted)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(rope_type):
    model = make_model()
    model.rotary_emb.rope_type = rope_type
    with pytest.raises(ValueError, match=f"{rope_type} RoPE has other frequencies at other length"):
        rope_of(model)


def test_bad_values_are_named(tmp_path):
    for flags, said in (
        (["--shifts", "0"], "--shifts 0 changes nothing"),
        (["--lengths", "4"], "--documents 4"),
        (["--dtypes", "int8"], "['int8'] unknown; choose from float32,bfloat16,float16"),
        (["--patterns", "ful"], "choose from full,intra_doc"),
        (["--lengths", "0,64"], "positive numbers"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            main(["precision", "--model", "m", "--out", "o", *flags])
    train_tokenizer(["a b c"], vocab_size=300).save_pretrained(tmp_path)
    make_model().config.save_pretrained(tmp_path)
    (tmp_path / "short.txt").write_text("a b c")
    with pytest.raises(ValueError, match=r"short.txt has 3 tokens, and --lengths asks for 64"):
        load_tokens(f"{tmp_path}/short.txt", str(tmp_path), 300, 64)
