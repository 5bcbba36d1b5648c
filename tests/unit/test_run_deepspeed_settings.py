"""What YAML, JSON and environment say about DeepSpeed: the flags win and say so, or the run is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from anchor_context.run.deepspeed_settings import decided_entries, settle_deepspeed

ROOT = Path(__file__).parents[2]
FLAGS = {
    "mixed_precision": "bf16",
    "max_grad_norm": 1.0,
    "batch_size": 2,
    "accumulation": 4,
    "data_ranks": 8,
}
SETTLED = {
    "gradient_accumulation_steps": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "torch_autocast": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}
"""What DeepSpeed gets under `FLAGS`, whatever else was said."""


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    # As tests and function under test take variables out, monkeypatch must know all of them to put them back.
    for name in (
        "GRADIENT_ACCUMULATION_STEPS",
        "GRADIENT_CLIPPING",
        "MIXED_PRECISION",
        "FP8_BACKEND",
    ):
        monkeypatch.setenv(f"ACCELERATE_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_{name}")


@pytest.fixture
def in_json(tmp_path, monkeypatch):
    """in_json(**entries): a DeepSpeed file of stage 3 with these entries, where the launcher names it."""

    def write(zero: dict | None = None, **entries) -> Path:
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3, **(zero or {})}, **entries}))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
        return path

    return write


@pytest.fixture
def in_yaml(tmp_path, monkeypatch):
    """in_yaml(deepspeed_config, **entries): the environment in which `accelerate launch` starts a rank."""

    def launch(deepspeed_config: dict, *flags: str, **entries) -> None:
        path = tmp_path / "accelerate.yaml"
        content = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": deepspeed_config,
            "num_machines": 1,
            "num_processes": 2,
            "use_cpu": False,
            **entries,
        }
        path.write_text(json.dumps(content))  # JSON is YAML
        command = ["--config_file", str(path), "--main_process_port", "0", *flags, "train.py"]
        args, defaults, from_yaml = _validate_launch_command(
            launch_command_parser().parse_args(command)
        )
        fields = [*defaults.deepspeed_config, *["mixed_precision"] * from_yaml]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(args)
        for name, value in environment.items():
            if name.startswith("ACCELERATE_"):
                monkeypatch.setenv(name, value)

    return launch


def settle(**changes) -> tuple[dict, list[str]]:
    plugin, overridden = settle_deepspeed(**(FLAGS | changes))
    return plugin.deepspeed_config, overridden


# --------------------------------------------------------------------------------------------------
# The flags win.


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_our_own_files_contradict_nothing(name, monkeypatch):
    path = f"accelerate_configs/{name}.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", path)
    config, overridden = settle()
    assert overridden == []
    assert config.items() >= SETTLED.items()
    assert config["zero_optimization"]["stage"] == int(name[4])


IN_JSON = [
    (
        {"gradient_accumulation_steps": 1},
        "gradient_accumulation_steps 1",
        "--gradient-accumulate-every 4",
    ),
    (
        {"managed_gradient_accumulation": False},
        "managed_gradient_accumulation false",
        "--gradient-acc",
    ),
    ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu 8", "--batch_size 2"),
    ({"train_batch_size": 32}, "train_batch_size 32", "the flags' 64 rows a step"),
    ({"gradient_clipping": 0.5}, "gradient_clipping 0.5", "--max_grad_norm 1.0"),
    ({"bf16": {"enabled": False}}, "bf16.enabled false", "--mixed_precision bf16"),
    ({"bfloat16": {"enabled": False}}, "bfloat16.enabled false", "--mixed_precision bf16"),
    ({"fp16": {"enabled": True}}, "fp16.enabled true", "--mixed_precision bf16"),
    (
        {"torch_autocast": {"enabled": True, "dtype": "fp16"}},
        "torch_autocast.enabled true",
        "--mixed_",
    ),
    (
        {"bf16": {"check_grad_overflow": False}},
        "bf16.check_grad_overflow false",
        "a step whose gradient is not finite",
    ),
    (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "bf16.bf16_master_weights_and_grads true",
        "gradients add up in float32",
    ),
    (
        {"data_types": {"grad_accum_dtype": "bf16"}},
        'data_types.grad_accum_dtype "bf16"',
        "gradients add up in float32",
    ),
    ({"data_types": {"buffer_dtype": "bf16"}}, 'data_types.buffer_dtype "bf16"', "RoPE's freq"),
    (
        {"communication_data_type": "bf16"},
        'communication_data_type "bf16"',
        "gradients add up in float32",
    ),
    ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op "sum"', "the gradient is the mean"),
    ({"prescale_gradients": True}, "prescale_gradients true", "the gradient is the mean"),
    (
        {"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}},
        "optimizer Lion",
        "AdamW with --learning-rate",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {}}},
        "scheduler WarmupLR",
        "--lr_scheduler_type",
    ),
    (
        {"activation_checkpointing": {"cpu_checkpointing": True}},
        "activation_ch",
        "--gradient_checkpo",
    ),
    ({"checkpoint": {"load_universal": True}}, "checkpoint {…}", "--resume"),
    (
        {"zero": {"stage3_gather_16bit_weights_on_model_save": False}},
        "stage3_gather_16bit_weights_on_model_save false",
        "models to use are saved whole",
    ),
]


@pytest.mark.parametrize(("entries", "said", "flag"), IN_JSON, ids=[case[1] for case in IN_JSON])
def test_what_the_json_file_says_otherwise_is_not_used_and_named(entries, said, flag, in_json):
    path = in_json(**entries)
    config, (line,) = settle()
    assert line.startswith(f"{path}: ") and said in line and f" is not used: {flag}" in line
    assert config.items() >= SETTLED.items()
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    assert config == SETTLED | {"zero_optimization": zero, "steps_per_print": float("inf")}


def test_what_says_the_same_or_nothing_is_not_named(in_json):
    in_json(
        gradient_accumulation_steps=4,
        train_batch_size="auto",
        gradient_clipping=1,
        bf16={"enabled": True, "check_grad_overflow": True},
        fp16={"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
        data_types={"grad_accum_dtype": "float32"},
        zero={"stage3_prefetch_bucket_size": "auto", "reduce_bucket_size": "auto"},
    )
    config, overridden = settle()
    assert overridden == [] and config.items() >= SETTLED.items()
    # Nobody could fill these in: Accelerate looks for a model's `config`, which the module under it has.
    assert "reduce_bucket_size" not in config["zero_optimization"]


def test_float32_throughout(in_json):
    in_json(bf16={"enabled": True})
    config, (line,) = settle(mixed_precision="no")
    assert config["bf16"] == {"enabled": False} and "--mixed_precision no" in line


ENVIRONMENT = [
    ("GRADIENT_ACCUMULATION_STEPS", "1", "--gradient-accumulate-every 4"),
    ("GRADIENT_CLIPPING", "0.5", "--max_grad_norm 1.0"),
    ("MIXED_PRECISION", "fp16", "--mixed_precision bf16"),
    ("FP8_BACKEND", "te", "--mixed_precision bf16"),
    ("DYNAMO_BACKEND", "inductor", "no flag asks for torch.compile"),
]


@pytest.mark.parametrize(("name", "value", "flag"), ENVIRONMENT)
@pytest.mark.parametrize("with_json", [True, False])
def test_what_the_environment_says_otherwise_is_not_used(
    name, value, flag, with_json, in_json, monkeypatch
):
    if with_json:
        in_json(gradient_accumulation_steps="auto", gradient_clipping="auto")
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    config, (line,) = settle()
    assert line.startswith(f"ACCELERATE_{name}={value} (") and line.endswith(f"is not used: {flag}")
    assert config.items() >= SETTLED.items()
    assert f"ACCELERATE_{name}" not in os.environ, "Accelerate reads it once more, later"


def test_tf32_from_the_environment_is_not_float32():
    """TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 has this effect when torch is imported."""
    try:
        torch.set_float32_matmul_precision("high")
        assert settle()[1] == [] and torch.get_float32_matmul_precision() == "high"
        _, (line,) = settle(mixed_precision="no")
        assert "TF32" in line and "--mixed_precision no" in line
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_yaml_as_accelerate_config_writes_it(in_yaml):
    written = {"gradient_accumulation_steps": 1, "zero_stage": 3, "zero3_init_flag": True}
    asked = {"gradient_clipping": 0.5, "zero3_save_16bit_model": False}
    cpu = {"offload_optimizer_device": "none", "offload_param_device": "none"}
    in_yaml(written | asked | cpu, mixed_precision="fp16")
    config, overridden = settle()
    assert [line.partition(" ")[0] for line in overridden] == [
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=1",
        "ACCELERATE_GRADIENT_CLIPPING=0.5",
        "ACCELERATE_MIXED_PRECISION=fp16",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL=false",
    ]
    assert config.items() >= SETTLED.items()
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_a_yaml_with_a_file_and_settings_beside_it(in_yaml, in_json):
    """Accelerate alone would refuse this, with advice to start over."""
    path = in_json()
    beside = {"gradient_accumulation_steps": 1, "deepspeed_config_file": str(path)}
    in_yaml(beside, mixed_precision="no")
    _, overridden = settle()
    assert [line.partition(" ")[0] for line in overridden] == [
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=1",
        "ACCELERATE_MIXED_PRECISION=no",
    ]


def test_a_launcher_that_says_nothing_of_precision_is_silent(in_yaml):
    in_yaml({"deepspeed_config_file": str(ROOT / "accelerate_configs/zero3.json")})
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no", "what the launcher says of itself"
    assert settle()[1] == []


def test_the_launchers_flag_chooses_among_our_files(in_yaml, recwarn):
    """As README says: a YAML of ours, and another stage on the command line."""
    ours = {"deepspeed_config_file": "accelerate_configs/zero3.json", "zero3_init_flag": True}
    in_yaml(ours, "--deepspeed_config_file", "accelerate_configs/zero1.json")
    plugin, overridden = settle_deepspeed(**FLAGS)
    assert overridden == [] and plugin.zero_stage == 1 and not plugin.zero3_init_flag
    assert not [w for w in recwarn if "Zero3 Init" in str(w.message)]


# --------------------------------------------------------------------------------------------------
# What cannot be overridden.


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"zero": {"stage": 0}}, "ZeRO stage 0, but train.py needs 1, 2 or 3"),
        ({"zero": {"stage": 4}}, "ZeRO stage 4, but train.py needs 1, 2 or 3"),
        (
            {"zero": {"zero_quantized_gradients": True}},
            "zero_optimization.zero_quantized_gradients may",
        ),
        ({"zero": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow may change"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel may change what is trained"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size may change"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency may change"),
        ({"compile": {"deepcompile": True}}, "compile may change"),
        ({"gradient_acumulation_steps": 4}, "gradient_acumulation_steps may change"),
        ({"zero": {"reduce_buckets": 1}}, "DeepSpeed refuses it: .*reduce_buckets"),
        ({"zero": {"reduce_bucket_size": "many"}}, "DeepSpeed refuses it: .*reduce_bucket_size"),
    ],
)
def test_what_no_flag_overrides_is_refused_by_name(entries, says, in_json):
    path = in_json(**entries)
    with pytest.raises(ValueError, match=f"^{path}: {says}"):
        settle()


def test_two_answers_of_the_launcher_are_refused(in_json, monkeypatch):
    path = in_json()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    settle()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(
        ValueError, match=f"STAGE=2 .* contradicts {path}.*stage is 3: take one out"
    ):
        settle()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    settle()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    with pytest.raises(ValueError, match="OFFLOAD_OPTIMIZER_DEVICE=cpu .* contradicts"):
        settle()


@pytest.mark.parametrize(
    "name", ["USE_FSDP", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG", "USE_CPU"]
)
def test_another_way_to_run_is_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_{name}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_{name} is set .*: unset it"):
        settle()


def test_a_stage_of_the_launcher_alone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    with pytest.raises(ValueError, match="the launcher's settings: ZeRO stage 0"):
        settle()


# --------------------------------------------------------------------------------------------------
# The file.


def test_the_files_relative_path_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "accelerate_configs/zero2.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", name)
    assert settle()[0]["zero_optimization"]["stage"] == 2
    # One that lies where the command was started comes first.
    (tmp_path / "accelerate_configs").mkdir()
    (tmp_path / name).write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", name)
    assert settle()[0]["zero_optimization"]["stage"] == 1


def test_a_file_that_is_nowhere_is_named_with_the_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "mine/zero.json")
    both = f"{tmp_path}/mine/zero.json and {ROOT}/mine/zero.json"
    with pytest.raises(ValueError, match=f"deepspeed_config_file mine/zero.json .* {both}$"):
        settle()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"zero_optimization": {"stage": 3},}', "cannot be read as JSON: .*line 1 column"),
        ('{"bf16": {"enabled": true}}', "says nothing about ZeRO"),
        ('{"zero_optimization": true}', "says nothing about ZeRO"),
        ("[]", "says nothing about ZeRO"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text, says, tmp_path, monkeypatch):
    path = tmp_path / "zero.json"
    path.write_text(text)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(ValueError, match=f"^{path} {says}"):
        settle()


# --------------------------------------------------------------------------------------------------
# The README.


def test_the_readme_tells_what_happens_to_every_setting():
    told = re.findall(r"`([\w.]+)`", (ROOT / "accelerate_configs/README.md").read_text())
    decided = [entry.key for entry in decided_entries(**FLAGS)]
    variables = [f"ACCELERATE_{name}" for name, _, _ in ENVIRONMENT]
    assert set(decided + variables) <= set(told)
