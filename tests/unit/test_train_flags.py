"""The flags of train.py: each has a reader, upstream's names work, bad ones are refused with a remedy."""

from __future__ import annotations

import ast
import json
import logging
import math
import re
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from transformers import (
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PhimoeConfig,
    SeedOssConfig,
    dynamic_module_utils,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

import train
from anchor_context.attention.kernels import KERNELS
from anchor_context.attention.patterns import PATTERNS
from anchor_context.command_line import one_line_errors
from anchor_context.data.documents import DATA_FORMATS
from anchor_context.data.options import DataFlags, DataOptions
from anchor_context.data.packing import STRATEGIES
from anchor_context.integrations import language_model
from anchor_context.memory.estimate import UNSHARDED, Sharding
from anchor_context.memory.plan import CHECKPOINTING, choose_memory_plan
from anchor_context.parallel.groups import RankGrid
from anchor_context.rope.scaling import SCALING_TYPES
from anchor_context.run.device import EXPECTED_MFU

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
    # The script hands its flags to `prepare_rows` as the options of the data.
    assert (
        "prepare_rows,\n        flags.dataset,\n        flags,\n"
        in Path(train.__file__).read_text()
    )
    reads = reads_of("flags", Path(train.__file__)) | (
        reads_of("options", ROOT / "anchor_context/data/prepare.py")
        & {option.name for option in fields(DataOptions)}
    )

    assert {field.name for field in fields(train.Flags)} - reads == set()


def reads_of(name: str, file: Path) -> set[str]:
    """The attributes that the file reads of what it calls `name`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == name
    }


def test_help_lists_the_flags_under_headings(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    sections = {part.split(":")[0]: part for part in shown.split("\n\n")}
    first = {
        "Model": "--model_name_or_path",
        "Data": "--dataset",
        "Attention": "--attention_pattern",
        "Parallelism": "--parallel_mode",
        "Optimisation": "--batch_size",
        "Memory": "--micro_batch_tokens",
        "Validation": "--eval_dataset",
        "Output": "--output_dir",
    }
    assert [name for name in sections if name in first] == list(first)
    for heading, flag in first.items():
        assert sections[heading].splitlines()[1].strip().startswith(flag)
    for option in (*fields(DataOptions), *fields(DataFlags)):
        assert f"\n  --{option.name}" in sections["Data"]
    for field in fields(train.Flags):
        assert shown.count(f"\n  --{field.name}") == 1 and field.metadata["help"]


@pytest.mark.parametrize(
    ("flag", "choices"),
    [
        ("attention_pattern", PATTERNS),
        ("attn_kernel", KERNELS),
        ("rope_scaling_type", SCALING_TYPES),
        ("packing", STRATEGIES),
        ("data_format", DATA_FORMATS),
        ("gradient_checkpointing", CHECKPOINTING),
    ],
)
def test_choices_are_what_the_rooms_offer(flag, choices):
    for choice in choices:
        assert getattr(parse(f"--model_name_or_path m --{flag} {choice}"), flag) == choice
    listed = ", ".join(map(repr, choices))
    with pytest.raises(ValueError, match=rf"--{flag}.*nonsense.*choose from {listed}\)"):
        parse(f"--model_name_or_path m --{flag} nonsense")


def test_the_reference_is_no_engine_to_train_with():
    with pytest.raises(ValueError, match="choose from 'flash', 'flex'\\)"):
        parse("--model_name_or_path m --attn_engine reference")


def test_bad_options_of_the_data_are_refused_at_the_start():
    with pytest.raises(ValueError, match="--mixture needs --source_column"):
        parse("--model_name_or_path m --mixture a=1")


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
        ({"parallel_mode": "ring_attn", "ring_degree": 0}, "--ring_degree 0 must be positive"),
        ({"parallel_mode": "ulysses_attn", "ulysses_degree": 0}, "--ulysses_degree 0 must be"),
        ({"model_max_position_embeddings": 0}, "--model_max_position_embeddings 0 must be"),
        ({"learning_rate": -1.0}, "--learning_rate -1.0"),
        ({"warmup_steps": 20, "max_train_steps": 10}, "--warmup_steps 20 is more than"),
        ({"attn_engine": "flex", "attn_kernel": "torch_cpu"}, "belongs to --attn_engine flash"),
        ({"anchor_placement": "shared"}, "needs --attn_engine flex"),
        (
            {"anchor_placement": "per_document", "attention_pattern": "full"},
            "'per_document' does not go with the pattern 'full', which has no anchor",
        ),
        (
            {"anchor_placement": "shared", "attention_pattern": "intra_doc", "attn_engine": "flex"},
            "'shared' does not go with the pattern 'intra_doc'",
        ),
        ({"attn_engine": "flex", "parallel_mode": "ring_attn"}, "use --parallel_mode ulysses_attn"),
        (
            {"interleave_chunks": True, "micro_batch_tokens": "row"},
            "needs --attn_engine flex",
        ),
        ({"profile_steps": "4"}, "profile_steps"),
        ({"eval_every": 0, "eval_dataset": "data"}, "--eval_every 0 must be positive"),
        ({"eval_every": 5}, "--eval_every 5 has nothing to validate on: name --eval_dataset"),
        ({"eval_dataset": "data", "eval_documents": 5}, "give one of them"),
        ({"eval_dataset": "data", "keep_best": True}, "--keep_best needs --eval_every"),
        ({"eval_every": 5, "keep_best": True}, "nothing to validate on"),
        ({"min_lr_ratio": 1.5, "lr_scheduler_type": "cosine"}, "--min_lr_ratio 1.5"),
        ({"decay_steps": 0, "lr_scheduler_type": "wsd"}, "--decay_steps 0 must be positive"),
        ({"min_lr_ratio": 0.1}, "of a rate that falls"),
        ({"decay_steps": 5}, "of a rate that falls"),
        ({"context_schedule": "5000:10"}, "--context_schedule 5000:10 must be START:STEPS"),
        ({"context_schedule": "32:10", "micro_batch_tokens": "row"}, "leave one of the two out"),
        ({"lr_scheduler_type": "wsd"}, "wsd needs --decay_steps"),
        (
            {
                "lr_scheduler_type": "wsd",
                "warmup_steps": 4,
                "decay_steps": 7,
                "max_train_steps": 10,
            },
            "--warmup_steps 4 and --decay_steps 7 are together more than the 10 steps",
        ),
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


def test_a_plan_is_for_as_many_ranks_as_are_said(monkeypatch):
    plan = replace(GOOD, plan_only=True, plan_ranks=16, parallel_mode="ulysses_attn")
    launched(monkeypatch)
    with pytest.raises(ValueError, match="--plan_only takes one process, and here are 4"):
        train.plan_grid(plan)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert train.plan_grid(plan) == RankGrid(ulysses_degree=16)
    assert train.plan_grid(replace(plan, plan_ranks=None)) == RankGrid()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"plan_ranks": 2}, "--plan_ranks goes with --plan_only alone"),
        ({"plan_gpu": "H100", "memory_gib": 78}, "--plan_gpu goes with --plan_only alone"),
        ({"plan_only": True, "plan_ranks": 0}, "--plan_ranks 0 must be at least 1"),
        ({"plan_only": True, "plan_gpu": "H100"}, "--plan_gpu H100 needs --memory_gib"),
    ],
)
def test_what_a_plan_needs(change, says):
    with pytest.raises(ValueError, match=says):
        train.check_flags(replace(GOOD, **change))
    train.check_flags(replace(GOOD, plan_only=True, plan_gpu="H100", memory_gib=78))


def test_the_hours_are_the_work_over_what_the_gpus_do():
    plan = replace(GOOD, plan_only=True, plan_gpu="H100")
    an_hour = 3600 * 8 * 989e12 * EXPECTED_MFU  # of eight
    what = {"device": torch.device("cuda"), "ranks": 8, "waiting": 1.25}
    told = train.describe_hours(plan, flops=4 * an_hour, **what)
    assert "5.0 for 5.70e+19 operations on 8 × H100, at 50% of 989 bfloat16 TFLOP/s" in told


def test_an_engine_for_a_gpu_elsewhere_is_described_and_checked():
    grid, cuda = RankGrid(data_degree=8), torch.device("cuda")
    plan = replace(GOOD, plan_only=True, plan_gpu="A100")
    engine = train.planned_engine(plan, LlamaConfig(), grid, cuda)
    assert str(engine) == (
        "flash engine, kernel chosen there (the fastest that runs on the A100), "
        "data 8 × ring 1 × Ulysses 1"
    )
    shared = {"pattern": "anchor", "anchor_placement": "shared"}
    with pytest.raises(ValueError, match="shared"):
        engine.check(**shared)
    forced = replace(plan, attn_kernel="flash_attn")
    assert "kernel flash_attn (--attn_kernel" in str(
        train.planned_engine(forced, LlamaConfig(), grid, cuda)
    )
    flex = train.planned_engine(replace(plan, attn_engine="flex"), LlamaConfig(), grid, cuda)
    flex.check(**shared)


def test_a_plan_refuses_the_scores_that_the_run_s_kernel_cannot_cap():
    with pytest.raises(ValueError, match="with attn_logit_softcapping=50.0"):
        train.planned_engine(GOOD, Gemma2Config(), RankGrid(), torch.device("cpu"))


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
        (
            Gemma2Config(),
            {"attn_kernel": "torch_varlen"},
            RankGrid(),
            "torch_varlen does not cap scores, and the model's attn_logit_softcapping=50.0 .*engine flex",
        ),
        (LlamaConfig(attention_dropout=0.1), {}, RankGrid(), "attention_dropout=0.1"),
        (SeedOssConfig(), {}, RankGrid(), "attention_dropout=0.1, residual_dropout=0.1 would draw"),
        (PhiConfig(resid_pdrop=0.1), {}, RankGrid(), "resid_pdrop=0.1 would draw random numbers"),
        (MixtralConfig(router_jitter_noise=0.01), {}, RankGrid(), "router_jitter_noise=0.01"),
        (
            PhimoeConfig(router_jitter_noise=0.0),
            {},
            RankGrid(),
            "phimoe: its routers draw experts at random",
        ),
    ],
)
def test_models_that_cannot_be_trained_so_are_refused(config, change, grid, says):
    with pytest.raises(ValueError, match=says):
        train.check_model(config, replace(GOOD, **change), grid)


def test_a_dropout_that_is_none_or_a_classifier_s_is_no_reason():
    train.check_model(GPTNeoXConfig(classifier_dropout=0.1), GOOD, RankGrid())
    train.check_model(SeedOssConfig(attention_dropout=0.0, residual_dropout=0), GOOD, RankGrid())


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
    """What train.py loads takes the flag, and what loads the model for it takes what it is given."""
    places = {  # file -> (how many calls, what each of them gets)
        train.__file__: (5, "flags.trust_remote_code"),
        language_model.__file__: (6, "trust_remote_code"),
    }
    loads = (
        *("from_pretrained", "from_config"),
        *("load_tokenizer", "load_language_model", "weightless_model", "check_files"),
    )
    for file, (number, value) in places.items():
        calls = [
            node
            for node in ast.walk(ast.parse(Path(file).read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in loads
        ]
        assert len(calls) == number, "configuration, tokenizer, model, and that without weights"
        for call in calls:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given["trust_remote_code"] == value


def test_checkpoints_need_a_folder_that_all_machines_see():
    assert train.check_shared(GOOD, True) == []
    (told,) = train.check_shared(GOOD, False)
    assert told.startswith("safety ") and "no checkpoint can be saved" in told
    for change in ({"checkpoint_every": 9}, {"save_per_hours": 1.0}, {"resume": "auto"}):
        with pytest.raises(ValueError, match="--output-dir .* not on storage that all machines"):
            train.check_shared(replace(GOOD, **change), False)


def test_models_that_can_be_trained_pass():
    for parallel in ("data_parallel", "ring_attn"):  # a window, and anchors that it hides
        flags = replace(GOOD, parallel_mode=parallel)
        train.check_flags(flags)
        train.check_model(MistralConfig(sliding_window=512), flags, RankGrid(ring_degree=2))


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    assert train.trackers_of(replace(GOOD, tensorboard=True)) == ["tensorboard"]
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        train.trackers_of(replace(GOOD, wandb="project"))


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


def test_back_ends_that_liger_passes_over_are_not_told(caplog, monkeypatch):
    """As Liger 0.8.5 words them; what else it has to say is heard."""
    logger = logging.getLogger("liger_kernel.backends.registry")
    monkeypatch.setattr(logger, "filters", [])
    train.quiet_libraries()
    told = "Backend impl '%s' for op '%s' could not be imported: %s: %s"
    logger.warning(told, "backends._ascend.rope", "rope", "ImportError", ImportError("tanh"))
    logger.warning("_discover(%r): all declared paths imported but no @register_op ran.", "rope")
    (heard,) = caplog.messages
    assert "no @register_op ran" in heard


def rates_of(flags, *, steps, resumed_at=0):
    """(steps left,) the rates over the peak, as the optimiser has them."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.123)
    schedule = train.make_lr_schedule(flags, optimizer, step=resumed_at, max_steps=steps)
    rates = []
    for _ in range(resumed_at, steps):
        rates.append(optimizer.param_groups[0]["lr"] / flags.learning_rate)
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("kind", "more", "rates"),
    [
        ("constant", {}, [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", {}, [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("linear", {"min_lr_ratio": 0.2}, [0, 0.5, *(1 - 0.8 * k / 8 for k in range(8))]),
        ("linear", {"decay_steps": 4}, [0, 0.5, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", {}, [0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(8))]),
        (
            "cosine",
            {"min_lr_ratio": 0.1},
            [0, 0.5, *(0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * k / 8)) for k in range(8))],
        ),
        (
            "wsd",
            {"decay_steps": 4, "min_lr_ratio": 0.5},
            [0, 0.5, 1, 1, 1, 1, *(1 - 0.5 * (k / 4) ** 0.5 for k in range(4))],
        ),
    ],
)
@pytest.mark.parametrize("resumed_at", [0, 1, 5])
def test_the_schedule_is_a_function_of_the_step(kind, more, rates, resumed_at):
    """With its warm-up, whatever the kind, and whatever rate a checkpoint brings."""
    flags = replace(GOOD, lr_scheduler_type=kind, warmup_steps=2, learning_rate=2e-5, **more)
    got = rates_of(flags, steps=10, resumed_at=resumed_at)
    assert got == pytest.approx(rates[resumed_at:])


def test_a_resume_with_more_steps_decays_later_and_stands_where_a_longer_run_would():
    flags = replace(GOOD, lr_scheduler_type="wsd", warmup_steps=2, decay_steps=4)
    longer = rates_of(flags, steps=20)
    assert rates_of(flags, steps=10)[:7] == longer[:7], "a checkpoint before the decay serves both"
    assert rates_of(flags, steps=20, resumed_at=7) == longer[7:]
    assert longer[2:17] == [1.0] * 15 and longer[17] == pytest.approx(0.5)


def test_schedules_are_those_of_transformers():
    """To rounding, where it has them: no minimum for linear, and for WSD no warm-up from 0 to a minimum."""
    flags = replace(GOOD, warmup_steps=3, learning_rate=1.0)
    linear = replace(flags, lr_scheduler_type="linear")
    cosine = replace(flags, lr_scheduler_type="cosine", min_lr_ratio=0.1)
    wsd = replace(flags, lr_scheduler_type="wsd", warmup_steps=0, decay_steps=5, min_lr_ratio=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = {
        "linear": get_linear_schedule_with_warmup(optimizer, 3, 17),
        "cosine": get_cosine_with_min_lr_schedule_with_warmup(optimizer, 3, 17, min_lr_rate=0.1),
        "wsd": get_wsd_schedule(optimizer, 0, 5, 17, decay_type="1-sqrt", min_lr_ratio=0.1),
    }
    for ours in (linear, cosine, wsd):
        of_step = theirs[ours.lr_scheduler_type].lr_lambdas[0]
        for step in range(18):
            got = train.learning_rate_factor(ours, step, max_steps=17)
            assert got == pytest.approx(of_step(step), rel=1e-14, abs=1e-15), (
                ours.lr_scheduler_type,
                step,
            )


def meta_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)


def test_a_gpu_run_says_which_slower_paths_it_takes(monkeypatch):
    monkeypatch.setattr(train, "faster_kernel_hint", lambda device, kernel: "install another")
    cuda, flags = torch.device("cuda"), replace(GOOD, liger="auto")

    def told(flags, *, device=cuda, gib=79.0, sharding=UNSHARDED, **asked):
        memory = choose_memory_plan(
            meta_llama(),
            device=device,
            free_bytes=int(gib * 2**30),
            row_tokens=131_072,
            longest_unit=131_072,
            **{"liger": "no"} | asked,
        )
        settings = {"device": device, "kernel": "flash_attn", "memory": memory}
        return train.slow_paths(flags, **settings, sharding=sharding)

    hint, liger, recomputed = told(flags)
    assert hint == "attention by flash_attn: install another"
    assert liger.startswith("without Liger's kernels: ")
    assert re.match(
        r"every layer recomputed.* in forwards of more than [\d,]+ tokens: ", recomputed
    )
    *_, recomputed = told(flags, gradient_checkpointing="full")
    assert recomputed.startswith("every layer recomputed in all forwards: ")
    chosen = replace(flags, attn_kernel="flash_attn", liger="no", mixed_precision="no")
    assert [line.split(":")[0] for line in told(chosen, gradient_checkpointing="full")] == [
        "float32",
        "every layer recomputed in all forwards",
    ]
    (*_, offloaded) = told(flags, sharding=Sharding(offload_optimizer=True))
    assert offloaded.startswith("the optimiser in host memory")
    assert told(chosen, device=torch.device("cpu")) == [], "a CPU is slow, as everybody knows"


def test_models_are_saved_at_the_interval_itself():
    """Upstream saved ten, twenty, thirty and forty steps before it, and never at it."""
    flags = replace(GOOD, saving_interval=50, min_steps_for_save=100)
    due = [step for step in range(1, 231) if train.model_is_due(flags, step, max_steps=230)]
    assert due == [100, 150, 200, 230]


def test_a_long_run_without_checkpoints_says_what_that_means():
    assert train.without_checkpoints(replace(GOOD), max_steps=199) is None
    told = train.without_checkpoints(replace(GOOD), max_steps=2000)
    assert "--checkpoint_every" in told and "loses all 2,000 steps" in told
    for given in ({"checkpoint_every": 100}, {"save_per_hours": 1.0}):
        assert train.without_checkpoints(replace(GOOD, **given), max_steps=2000) is None


def test_a_bad_end_names_the_last_good_checkpoint_and_what_is_in_doubt(tmp_path):
    progress = train.Progress(step=14, bad_in_a_row=9)
    (tmp_path / "step-5").mkdir()
    told = train.bad_end(tmp_path, progress, last_good=tmp_path / "checkpoint_4_16")
    assert "the last 9 steps in a row" in told and "because step 5 broke the weights" in told
    assert f"checkpoint is {tmp_path}/checkpoint_4_16; {tmp_path}/step-5 is in doubt, too" in told
    (tmp_path / "step-5").rmdir()
    assert train.bad_end(tmp_path, progress, last_good=None).endswith("checkpoint is none")
    progress.bad_in_a_row = progress.step  # from the first on
    assert "the model began with broken" in train.bad_end(tmp_path, progress, last_good=None)


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
    train.check_attention(GOOD, interleaved=False)
    train.check_attention(replace(GOOD, attn_engine="flex"), interleaved=True)
    with pytest.raises(ValueError, match="--attn_engine flex"):
        train.check_attention(GOOD, interleaved=True)
    train.check_flags(replace(GOOD, interleave_chunks=True, micro_batch_tokens="512"))


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
def test_a_float_flag_takes_numbers_only(number):
    """Every one of `train.py`'s. `nan < 0` is false, so no comparison refuses it."""
    types = get_type_hints(train.Flags)
    floats = [f.name for f in fields(train.Flags) if types[f.name] in (float, float | None)]
    assert {"learning_rate", "max_grad_norm", "rope_theta", "save_per_hours"} <= set(floats)
    for name in floats:
        with pytest.raises(ValueError, match=f"--{name}.*{number} is no finite number"):
            train.parse_flags(["--model_name_or_path", "m", f"--{name}={number}"])
