"""What launcher and environment say about DeepSpeed, put in order with the flags before anything heavy.

Accelerate takes DeepSpeed's settings from a JSON file, from the launcher's YAML and flags (which reach the
ranks as environment variables), and from variables that were left in the environment; DeepSpeed adds
defaults. All of them may decide what a flag of `train.py` decides, too. Here

    what a flag decides                          is as the flag says; what said otherwise is named in a line
    stage, offload, buckets, logs                stay as they are: they change no value
    everything else, and what contradicts itself is refused by its name

`settle_deepspeed` does so before `Accelerator` is made, and `check_engine` asks the prepared engine whether
it took all of it.

Guarantees: gradients add up in float32 under every stage, over micro-batches and over ranks. DeepSpeed
counts no micro-batches: its own accumulation is 1, and it updates after a backward with
`accelerator.sync_gradients` set, so the caller alone says how many micro-batches a step has.
Costs: gradients travel between ranks in float32, under bfloat16 twice the bytes of their own type.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import DeepSpeedPlugin
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.engine import DeepSpeedEngine

REPOSITORY = Path(__file__).parents[2]
FILE_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
LAUNCHER = "the launcher's YAML or flags, or left in the environment"
STAGES = (1, 2, 3)
FLOAT32 = ("fp32", "float32", "float", "torch.float32")

FREE = {
    "zero_optimization",
    "aio",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "timers",
    "log_level",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
}
"""Entries of DeepSpeed's configuration that change no value. Within the first, but for these:"""

NOT_IN_ZERO = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "zenflow",
    "elastic_checkpoint",
    "legacy_stage1",
    "offload_optimizer.super_offload",
)
"""They round, update late, or change what a checkpoint holds."""

REPLACED = ("bf16", "bfloat16", "fp16", "torch_autocast", "data_types")
"""Sections that are decided as a whole."""


@dataclass(frozen=True)
class Decided:
    """An entry of DeepSpeed's configuration that is not the launcher's to decide."""

    key: str
    """Its path, with dots."""
    instead: str
    """What decides it: a flag with its value, or what holds for every run."""
    agrees: tuple
    """The values that say the same. "auto" and null say nothing."""
    given: object = None
    """What DeepSpeed gets; None: no such entry."""


def decided_entries(
    *,
    mixed_precision: str,
    max_grad_norm: float,
    batch_size: int,
    accumulation: int,
    data_ranks: int,
) -> list[Decided]:
    """All of them. The arguments are those of `settle_deepspeed`."""
    bf16 = mixed_precision == "bf16"
    precision = f"--mixed_precision {mixed_precision}"
    rows = batch_size * accumulation * data_ranks
    accumulate = f"--gradient-accumulate-every {accumulation}"
    batch = f"--batch_size {batch_size}"
    in_float32 = "gradients add up in float32"
    float32_frequencies = "RoPE's frequencies are float32"
    a_mean = "the gradient is the mean over a step's targets"
    bad_steps = "a step whose gradient is not finite is skipped (--max_bad_steps)"
    optimizer = "AdamW with --learning-rate and --weight_decay"
    return [
        Decided("gradient_accumulation_steps", accumulate, (accumulation,), 1),
        Decided("managed_gradient_accumulation", accumulate, (True,)),
        Decided("train_micro_batch_size_per_gpu", batch, (batch_size,), 1),
        Decided("train_batch_size", f"the flags' {rows} rows a step", (rows,)),
        Decided(
            "gradient_clipping", f"--max_grad_norm {max_grad_norm}", (max_grad_norm,), max_grad_norm
        ),
        Decided("bf16.enabled", precision, (bf16,), bf16),
        Decided("bf16.check_grad_overflow", bad_steps, (True,)),
        Decided("bf16.immediate_grad_update", in_float32, (False,)),
        Decided("bf16.bf16_master_weights_and_grads", in_float32, (False,)),
        Decided("bf16.bf16_optimizer_states", in_float32, (False,)),
        Decided("bfloat16.enabled", precision, (bf16,)),
        Decided("fp16.enabled", precision, (False,), False),
        Decided("torch_autocast.enabled", precision, (False,), False),
        Decided("data_types.param_dtype", precision, ("bf16",) if bf16 else FLOAT32),
        Decided("data_types.buffer_dtype", float32_frequencies, FLOAT32),
        Decided("data_types.keep_in_fp32_modules", float32_frequencies, ()),
        Decided("data_types.grad_accum_dtype", in_float32, FLOAT32, "fp32"),
        Decided("communication_data_type", in_float32, FLOAT32, "fp32"),
        Decided("gradient_allreduce_op", a_mean, ("mean",)),
        Decided("prescale_gradients", a_mean, (False,)),
        Decided("gradient_predivide_factor", a_mean, (1.0,)),
        Decided("optimizer", optimizer, ()),
        Decided("scheduler", "--lr_scheduler_type and --warmup_steps decide", ()),
        Decided("activation_checkpointing", "--gradient_checkpointing decides", ()),
        Decided("checkpoint", "--resume and --checkpoint_every decide", ()),
        Decided("zero_optimization.compute_grad_norm", bad_steps, (True,)),
        Decided(
            "zero_optimization.load_from_fp32_weights", "--resume continues in float32", (True,)
        ),
        Decided(
            "zero_optimization.stage3_gather_16bit_weights_on_model_save",
            "models to use are saved whole",
            (True,),
            True,
        ),
    ]


# --------------------------------------------------------------------------------------------------
# Before the Accelerator is made.


def settle_deepspeed(
    *,
    mixed_precision: str,
    max_grad_norm: float,
    batch_size: int,
    accumulation: int,
    data_ranks: int,
) -> tuple[DeepSpeedPlugin, list[str]]:
    """The plugin for `Accelerator(deepspeed_plugin=…)`, and a line for each setting that is not used.

    Reads the environment as `accelerate launch` left it, and takes out what Accelerate would heed later.

    Args:
        mixed_precision: `no` or `bf16`.
        max_grad_norm: 0: never clip.
        batch_size, accumulation: rows in a rank's forward, and such forwards in a step.
        data_ranks: ranks that hold different rows.

    Raises:
        ValueError: a file that cannot be read, or a setting that no flag overrides.
    """
    values = {"mixed_precision": mixed_precision, "max_grad_norm": max_grad_norm}
    values |= {"accumulation": accumulation}
    overridden = list(_settle_environment(**values))
    decided = decided_entries(**values, batch_size=batch_size, data_ranks=data_ranks)

    path = _file()
    said = {} if path is None else _read(path)
    where = str(path or "the launcher's settings")
    stage = _stage(said, where)
    _refuse_others(said, {entry.key.partition(".")[0] for entry in decided}, where)
    for entry in decided:
        value = _find(said, entry.key)
        if value not in (None, "auto", *entry.agrees):
            overridden.append(f"{where}: {entry.key} {_short(value)} is not used: {entry.instead}")

    # The launcher's zero3_init_flag is heeded where there is something to load in parts.
    plugin = DeepSpeedPlugin(enable_msamp=False, zero3_init_flag=None if stage == 3 else False)
    config = plugin.deepspeed_config
    for section in REPLACED:
        config.pop(section, None)
    for entry in decided:
        _put(config, entry.key, entry.given)
    _drop_auto(config)
    _ask_deepspeed(config, where)
    return plugin, overridden


def _settle_environment(
    *, mixed_precision: str, max_grad_norm: float, accumulation: int
) -> Iterator[str]:
    """Take what a flag decides out of the environment; a line for each variable that said otherwise."""
    for name in ("USE_FSDP", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG", "USE_CPU"):
        if os.environ.get(f"ACCELERATE_{name}", "false").lower() in ("true", "yes", "1"):
            raise ValueError(
                f"ACCELERATE_{name} is set (by {LAUNCHER}), but train.py runs under DeepSpeed alone: unset "
                "it, and launch with a YAML of accelerate_configs/"
            )
    # Of itself the launcher says "no"; with an entry of its YAML it lists this one.
    fields = os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    no = ("no",) * ("mixed_precision" not in fields)
    precision = f"--mixed_precision {mixed_precision}"
    decided = [
        Decided(
            "GRADIENT_ACCUMULATION_STEPS",
            f"--gradient-accumulate-every {accumulation}",
            (accumulation,),
        ),
        Decided("GRADIENT_CLIPPING", f"--max_grad_norm {max_grad_norm}", (max_grad_norm,)),
        Decided("MIXED_PRECISION", precision, (mixed_precision, *no)),
        Decided("FP8_BACKEND", precision, ("no",)),
        Decided("DYNAMO_BACKEND", "no flag asks for torch.compile", ("no",)),
        Decided("DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "models to use are saved whole", ("true",)),
    ]
    for entry in decided:
        value = os.environ.pop(f"ACCELERATE_{entry.key}", "none").lower()
        if value not in ("", "none", "auto") and not any(_same(value, v) for v in entry.agrees):
            yield f"ACCELERATE_{entry.key}={value} (from {LAUNCHER}) is not used: {entry.instead}"
    if mixed_precision == "no" and torch.get_float32_matmul_precision() != "highest":
        torch.set_float32_matmul_precision("highest")
        yield f"TF32 (from TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) is not used: {precision}"


def _same(text: str, value: object) -> bool:
    try:
        return float(text) == value
    except ValueError:
        return text == value


def _file() -> Path | None:
    """DeepSpeed's JSON file, if there is one; the environment gets the path at which it was found.

    A relative path is looked for where the command was started, then in this repository.
    """
    name = os.environ.get(FILE_VARIABLE, "none")
    if name == "none":
        return None
    places = [Path(name), REPOSITORY / name]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise ValueError(
            f"deepspeed_config_file {name} (from {LAUNCHER}) is no file: looked for "
            f"{' and '.join(str(path.absolute()) for path in dict.fromkeys(places))}"
        )
    os.environ[FILE_VARIABLE] = str(found)
    return found


def _read(path: Path) -> dict:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(said, dict) or not isinstance(said.get("zero_optimization"), dict):
        raise ValueError(
            f'{path} says nothing about ZeRO: it needs "zero_optimization": {{"stage": 1}}, 2 or 3, as '
            "accelerate_configs/zero1.json has it"
        )
    return said


def _stage(said: dict, where: str) -> int:
    """ZeRO's. Raises `ValueError` for one that train.py does not run, and for two answers."""
    launcher = {  # what the YAML may say, too, and which key of the file that is
        "ZERO_STAGE": "zero_optimization.stage",
        "OFFLOAD_OPTIMIZER_DEVICE": "zero_optimization.offload_optimizer.device",
        "OFFLOAD_PARAM_DEVICE": "zero_optimization.offload_param.device",
    }
    for name, key in launcher.items():
        value, in_file = os.environ.get(f"ACCELERATE_DEEPSPEED_{name}"), _find(said, key)
        if said and value is not None and in_file != "auto" and value != str(in_file).lower():
            raise ValueError(
                f"ACCELERATE_DEEPSPEED_{name}={value} (from {LAUNCHER}) contradicts {where}, where {key} is "
                f"{json.dumps(in_file)}: take one out"
            )
    stage = _find(said, "zero_optimization.stage") if said else "auto"
    if stage == "auto":
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))  # Accelerate's default
    if stage not in STAGES:
        raise ValueError(
            f"{where}: ZeRO stage {json.dumps(stage)}, but train.py needs 1, 2 or 3 (without them DeepSpeed "
            "keeps neither weights nor sums of gradients in float32 under bfloat16): "
            "use accelerate_configs/zero1.json"
        )
    return stage


def _refuse_others(said: dict, decided: set[str], where: str) -> None:
    """Raise `ValueError` for what is neither decided here nor free."""
    others = sorted(said.keys() - FREE - decided)
    others += [name for key in NOT_IN_ZERO if _find(said, name := f"zero_optimization.{key}")]
    if others:
        raise ValueError(
            f"{where}: {', '.join(others)} may change what is trained, and no flag of train.py knows of it: "
            "take it out"
        )


def _ask_deepspeed(config: dict, where: str) -> None:
    """Raise `ValueError` for what DeepSpeed itself would refuse, later: misspelt keys, wrong types, …"""
    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except (DeepSpeedConfigError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{where}: DeepSpeed refuses it: {' '.join(str(error).split())}"
        ) from error


def _find(config: dict, key: str) -> object:
    """The value at a path with dots; None where there is none."""
    value: object = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _put(config: dict, key: str, value: object) -> None:
    """Set the value at a path with dots; None removes it."""
    *sections, name = key.split(".")
    for section in sections:
        config = config.get(section, {}) if value is None else config.setdefault(section, {})
    config.pop(name, None)
    if value is not None:
        config[name] = value


def _drop_auto(config: dict) -> None:
    """An "auto" that nobody has filled in is DeepSpeed's default."""
    for key, value in list(config.items()):
        if value == "auto":
            del config[key]
        elif isinstance(value, dict):
            _drop_auto(value)


def _short(value: object) -> str:
    return str(value.get("type", "{…}")) if isinstance(value, dict) else json.dumps(value)


# --------------------------------------------------------------------------------------------------
# After `accelerator.prepare`.


def check_engine(engine: DeepSpeedEngine, *, mixed_precision: str, max_grad_norm: float) -> None:
    """Ask the engine that `accelerator.prepare` returned, or a checkpoint was loaded into.

    Raises:
        RuntimeError: it does not train what the flags say. Nothing a user could mend: a library has changed.
    """
    optimizer = engine.optimizer
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    sums = getattr(optimizer, "gradient_accumulation_dtype", None) or optimizer.grad_acc_dtype
    answers = {
        "ZeRO's stage": (int(engine.zero_optimization_stage()) in STAGES, True),
        "its own accumulation": (engine.gradient_accumulation_steps(), 1),
        "the type of its parameters": ({p.dtype for p in engine.module.parameters()}, {dtype}),
        "the type in which gradients add up": (sums, torch.float32),
        "the type in which gradients travel": (engine.communication_data_type, torch.float32),
        "the norm to which it clips": (optimizer.clip_grad, max_grad_norm),
        "ranks that it averages over": (engine.dp_world_size, torch.distributed.get_world_size()),
        "its own schedule": (engine.lr_scheduler, None),
        "its own optimiser": (engine._config.optimizer_name, None),
        "autocast": (engine.torch_autocast_enabled(), False),
    }
    wrong = [f"{name} is {got}, not {want}" for name, (got, want) in answers.items() if got != want]
    if wrong:
        raise RuntimeError(f"DeepSpeed does not do what the flags say: {'; '.join(wrong)}")
