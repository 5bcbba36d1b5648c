"""The flags of train.py: each has a reader, upstream's names work, bad ones are refused with a remedy."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    dynamic_module_utils,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import train
from anchor_context.command_line import one_line_errors
from anchor_context.parallel.groups import RankGrid

ROOT = Path(__file__).parents[2]
GOOD = train.Flags(model_name_or_path="model", dataset="data.jsonl", seq_length=4096)

UPSTREAM_LINE = (
    "--batch-size 1 --gradient-accumulate-every 8 --seed 2023 --output-dir out --wandb project "
    "--max-train-steps 2000 --learning-rate 2e-5 --dataset data --data-format tokenized "
    "--model_name_or_path model --seq-length 4096 --model_max_position_embeddings 4096 "
    "--rope-theta 1000000 --rope_scaling_type default --rope_scaling_factor 16 --max_grad_norm 1 "
    "--parallel_mode ulysses_attn --attn_engine flash --save_per_hours 5 --saving_interval 500 "
    "--min_steps_for_save 100"
)


def parse(line: str) -> train.Flags:
    return train.parse_flags(line.split())


def test_every_flag_has_a_reader():
    """A flag that nothing reads is a promise that nothing keeps."""
    reads = {
        node.attr
        for node in ast.walk(ast.parse(Path(train.__file__).read_text()))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "flags"
    }

    assert {field.name for field in fields(train.Flags)} - reads == set()


@pytest.mark.parametrize("swap", [("-", "-"), ("_", "-"), ("-", "_")])
def test_upstreams_flag_line_parses_with_dashes_and_underscores(swap):
    words = UPSTREAM_LINE.split()
    words = [w[:2] + w[2:].replace(*swap) if w.startswith("--") else w for w in words]
    flags = parse(" ".join(words))
    assert (flags.seq_length, flags.rope_theta, flags.rope_scaling_factor) == (4096, 1e6, 16.0)
    assert (flags.gradient_accumulate_every, flags.wandb, flags.data_format) == (
        8,
        "project",
        "tokenized",
    )
    train.check_flags(flags)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--sequence-length 4096", "unknown: --sequence-length"),
        ("--seq 4096", "unknown: --seq"),
        ("--seq-lenght 4096", "did you mean --seq-length?"),
        ("--attn_engine ring", "--attn_engine.*choose from 'flash', 'flex'"),
        ("--batch-size one", "--batch.size.*invalid int value: 'one'"),
    ],
)
def test_unknown_shortened_and_wrong_flags_are_refused(line, says):
    with pytest.raises(ValueError, match=says):
        parse("--model_name_or_path m " + line)


def test_a_missing_flag_is_named():
    with pytest.raises(ValueError, match="--model_name_or_path"):
        parse("--seq-length 4096")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dataset": ""}, "--dataset is missing"),
        ({"seq_length": 1}, "--seq-length 1"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"max_train_steps": 0}, "--max_train_steps 0"),
        ({"learning_rate": -1.0}, "--learning_rate -1.0"),
        ({"warmup_steps": 20, "max_train_steps": 10}, "--warmup_steps 20 is more than"),
        ({"attn_engine": "flex", "attn_kernel": "torch_cpu"}, "belongs to --attn_engine flash"),
        ({"anchor_placement": "shared"}, "needs --attn_engine flex"),
        ({"attn_engine": "flex", "parallel_mode": "ring_attn"}, "use --parallel_mode ulysses_attn"),
        ({"interleave_chunks": True}, "needs --attn_engine flex"),
        ({"profile_steps": "4"}, "profile_steps"),
    ],
)
def test_bad_values_are_refused(change, says):
    train.check_flags(GOOD)
    with pytest.raises(ValueError, match=says):
        train.check_flags(replace(GOOD, **change))


@pytest.mark.parametrize(
    ("change", "grid"),
    [
        ({}, (4, 1, 1)),
        ({"parallel_mode": "ulysses_attn"}, (1, 1, 4)),
        ({"parallel_mode": "ulysses_attn", "ulysses_degree": 2}, (2, 1, 2)),
        ({"parallel_mode": "ring_attn"}, (1, 4, 1)),
        ({"parallel_mode": "hybrid_attn", "ulysses_degree": 2, "ring_degree": 2}, (1, 2, 2)),
    ],
)
def test_parallel_modes_become_a_grid(change, grid, monkeypatch):
    launched(monkeypatch)
    got = train.plan_grid(replace(GOOD, **change))
    assert (got.data_degree, got.ring_degree, got.ulysses_degree) == grid


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ulysses_degree": 2}, "--ulysses_degree does not go with --parallel_mode data_parallel"),
        (
            {"parallel_mode": "hybrid_attn", "ulysses_degree": 2},
            "needs --ulysses_degree and --ring_degree",
        ),
        ({"parallel_mode": "ulysses_attn", "ulysses_degree": 3}, r"does not divide the 4 ranks"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(change, says, monkeypatch):
    launched(monkeypatch)
    with pytest.raises(ValueError, match=says):
        train.plan_grid(replace(GOOD, **change))


def launched(monkeypatch) -> None:
    """As `accelerate launch` with four processes leaves the environment."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "1", "ACCELERATE_USE_DEEPSPEED": "true"}.items():
        monkeypatch.setenv(name, value)


def test_a_plain_python_start_says_how_to_launch(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="python -m anchor_context.launch"):
        train.plan_grid(GOOD)


@pytest.mark.parametrize(
    ("config", "change", "grid", "says"),
    [
        (
            LlamaConfig(num_attention_heads=6, hidden_size=48),
            {},
            RankGrid(ulysses_degree=4),
            "6 attention heads",
        ),
        (MistralConfig(sliding_window=512), {}, RankGrid(), "sliding_window=512"),
        (Gemma2Config(), {}, RankGrid(), "attn_logit_softcapping"),
        (LlamaConfig(attention_dropout=0.1), {}, RankGrid(), "attention_dropout=0.1"),
    ],
)
def test_models_that_cannot_be_trained_so_are_refused(config, change, grid, says):
    with pytest.raises(ValueError, match=says):
        train.check_model(config, replace(GOOD, **change), grid)


def test_a_model_s_own_code_runs_only_by_the_flag(tmp_path, monkeypatch):
    launched(monkeypatch)
    model = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(model))
    (tmp_path / "foreign.py").write_text("raise LookupError('the foreign code ran')\n")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    output = str(tmp_path / "run")
    flags = replace(GOOD, model_name_or_path=str(tmp_path), output_dir=output)
    with pytest.raises(ValueError, match="trust_remote_code"):
        train.main(flags)
    with pytest.raises(LookupError, match="the foreign code ran"):
        train.main(replace(flags, trust_remote_code=True))


def test_nothing_is_loaded_past_the_flag_for_a_models_own_code():
    calls = [
        node
        for node in ast.walk(ast.parse(Path(train.__file__).read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "from_pretrained"
    ]
    assert len(calls) == 3, "configuration, tokenizer, model"
    for call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given["trust_remote_code"] == "flags.trust_remote_code"


def test_models_that_can_be_trained_pass():
    train.check_model(
        MistralConfig(sliding_window=512), replace(GOOD, attn_engine="flex"), RankGrid()
    )
    train.check_model(MistralConfig(sliding_window=8192), GOOD, RankGrid())
    # Qwen2 carries a window that it does not use.
    train.check_model(Qwen2Config(sliding_window=512, use_sliding_window=False), GOOD, RankGrid())


def test_dynamic_rope_is_refused_where_ranks_share_a_row():
    config = LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    train.check_rope(config, RankGrid(data_degree=4))
    train.check_rope(LlamaConfig(), RankGrid(ulysses_degree=2))
    with pytest.raises(ValueError, match="yarn or linear"):
        train.check_rope(config, RankGrid(ring_degree=2))


def test_an_output_folder_with_another_run_is_refused(tmp_path):
    train.check_output_is_free(tmp_path, GOOD)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(
        ValueError, match=r"holds another run \(metrics.jsonl\); name another folder$"
    ):
        train.check_output_is_free(tmp_path, GOOD)
    train.check_output_is_free(tmp_path, replace(GOOD, resume="auto"))
    (tmp_path / "checkpoints/checkpoint_100_400").mkdir(parents=True)
    with pytest.raises(ValueError, match="folder, or pass --resume auto to continue it$"):
        train.check_output_is_free(tmp_path, GOOD)


def test_a_models_folder_alone_is_another_run(tmp_path):
    (tmp_path / "step-120").mkdir()
    with pytest.raises(ValueError, match=r"holds another run \(step-120\); name another folder$"):
        train.check_output_is_free(tmp_path, GOOD)


def test_another_runs_record_is_not_cut_to_a_checkpoint_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours, theirs = Path("ours"), Path("theirs")
    for run in (ours, theirs):
        (run / "checkpoints/checkpoint_2_8").mkdir(parents=True)
        (run / "args.json").touch()
    for path in (ours / "checkpoints/checkpoint_2_8", tmp_path / "ours/checkpoints/abandoned-1/x"):
        resumed = replace(GOOD, resume=str(path))
        train.check_output_is_free(ours, resumed)
        train.check_output_is_free(tmp_path / "ours", resumed)
        train.check_output_is_free(tmp_path / "new", resumed)
        with pytest.raises(
            ValueError, match=f"theirs holds another run than that of .*{path.name}"
        ):
            train.check_output_is_free(theirs, resumed)


def test_a_finished_run_without_checkpoints_is_not_started_over(tmp_path):
    """`--resume auto` would find nothing to continue, and overwrite it from step 1 on."""
    (tmp_path / "step-120").mkdir()
    with pytest.raises(ValueError, match="models \\(step-120\\) but no checkpoint"):
        train.check_output_is_free(tmp_path, replace(GOOD, resume="auto"))
    (tmp_path / "checkpoints/checkpoint_100_400").mkdir(parents=True)
    train.check_output_is_free(tmp_path, replace(GOOD, resume="auto"))


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    assert train.check_trackers(replace(GOOD, tensorboard=True)) == ["tensorboard"]
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        train.check_trackers(replace(GOOD, wandb="project"))


def test_a_model_that_is_not_there_is_one_error(tmp_path):
    with pytest.raises(ValueError, match=f"--model_name_or_path {tmp_path}/none: no such folder"):
        train.load_config_and_tokenizer(replace(GOOD, model_name_or_path=f"{tmp_path}/none"))


def test_every_rank_can_say_what_is_wrong(monkeypatch, capsys):
    """Another rank's own mistake, as a host that lacks the data; the machine's first speaks first."""
    waits = []
    monkeypatch.setattr(train.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "9")
    for local_rank, expected in (("0", []), ("1", [5])):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit) as end:
            fail(lambda: train.check_flags(replace(GOOD, batch_size=0)))
        assert end.value.code == 2 and "error: --batch_size 0" in capsys.readouterr().err
        assert waits == expected


def test_a_librarys_error_keeps_its_traceback():
    with pytest.raises(ValueError, match="Invalid literal"):
        fail(lambda: Fraction("one"))


def fail(work) -> None:
    with one_line_errors():
        work()


def test_rounded_rotary_frequencies_are_caught():
    rotary = torch.nn.Sequential(LlamaRotaryEmbedding(LlamaConfig()))
    train.check_rotary_precision(rotary)
    with pytest.raises(RuntimeError, match="inv_freq is torch.bfloat16"):
        train.check_rotary_precision(rotary.to(torch.bfloat16))
    with pytest.raises(RuntimeError, match="inv_freq was rounded"):
        train.check_rotary_precision(rotary.to(torch.float32))


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(8))]),
    ],
)
@pytest.mark.parametrize("resumed_at", [0, 1, 5])
def test_the_schedule_is_a_function_of_the_step(kind, rates, resumed_at):
    """With its warm-up, whatever the kind, and whatever rate a checkpoint brings."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.123)
    flags = replace(GOOD, lr_scheduler_type=kind, warmup_steps=2, learning_rate=2e-5)
    schedule = train.make_schedule(flags, optimizer, step=resumed_at, max_steps=10)
    for expected in rates[resumed_at:]:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-5 * expected)
        optimizer.step()
        schedule.step()


def test_models_are_saved_at_the_interval_itself():
    """Upstream saved ten, twenty, thirty and forty steps before it, and never at it."""
    flags = replace(GOOD, saving_interval=50, min_steps_for_save=100)
    due = [step for step in range(1, 231) if train.model_is_due(flags, step, max_steps=230)]
    assert due == [100, 150, 200, 230]


def test_the_run_tells_each_sources_share_before_and_after_sampling():
    shares = {"a": {"before": 0.5, "after": 0.25}, "b": {"before": 0.5, "after": 0.75}}
    assert train.describe_sources(shares) == ["sources  b 50.0% -> 75.0%, a 50.0% -> 25.0%"]
    assert train.describe_sources({"all": {"before": 1.0, "after": 1.0}}) == []
    many = {str(i): {"before": 0.1, "after": 0.1} for i in range(10)}
    assert train.describe_sources(many)[0].endswith("7 10.0% -> 10.0%, 2 more")


def test_matrices_decay_and_vectors_do_not():
    """Also where ZeRO-3 holds a flat part of a matrix, which knows its shape."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    frozen, partitioned = model[1].bias, torch.nn.Parameter(torch.zeros(4))
    frozen.requires_grad_(False)
    partitioned.ds_shape = (2, 2)
    model.register_parameter("partitioned", partitioned)
    matrices, vectors = train.parameter_groups(model, weight_decay=0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    shapes = [[tuple(p.shape) for p in group["params"]] for group in (matrices, vectors)]
    assert shapes == [[(4,), (3, 2)], [(3,), (3,)]]


@pytest.mark.parametrize(
    ("change", "done", "says"),
    [
        ({"warmup_steps": 7}, 0, "--warmup_steps 7 is more than the 6 steps"),
        ({}, 7, "--max-train-steps 6: the run to resume is at step 7"),
    ],
)
def test_steps_that_do_not_fit_the_run_are_refused(change, done, says):
    train.check_steps(replace(GOOD, warmup_steps=6), done=6, max_steps=6)
    with pytest.raises(ValueError, match=says):
        train.check_steps(replace(GOOD, **change), done=done, max_steps=6)


def test_rows_in_several_pieces_need_flex():
    """Also where only the prepared set that is named as the data says so."""
    train.check_chunks(GOOD, interleaved=False)
    train.check_chunks(replace(GOOD, attn_engine="flex"), interleaved=True)
    with pytest.raises(ValueError, match="--attn_engine flex"):
        train.check_chunks(GOOD, interleaved=True)
