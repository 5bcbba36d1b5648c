"""Train a Hugging Face LLaMA, Mistral or Qwen model on long rows of packed documents with AnchorAttention.

    python -m anchor_context.launch --config_file accelerate_configs/cpu.yaml --num_processes 2 train.py \\
        --model_name_or_path MODEL --dataset 'data/*.jsonl' --seq-length 4096 --output-dir output/run

Reads straight down: flags, checks, distributed, data, where the run stands, model, optimiser, resume, record,
loop, end. What it computes is in `anchor_context/attention/patterns.py`; follow a batch from
`data/prepare.py` over `data/loader.py` and `integrations/models.py` to `loss.py`.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, gather_object, set_seed
from deepspeed.runtime import bf16_optimizer
from termcolor import colored
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from anchor_context.attention.kernels import KERNELS, faster_kernel_hint
from anchor_context.attention.patterns import ANCHOR_PLACEMENTS, PATTERNS, attended_length
from anchor_context.command_line import (
    FlagParser,
    flag,
    model_errors,
    one_line_errors,
)
from anchor_context.data.context_schedule import ContextSchedule, parse_context_schedule
from anchor_context.data.fingerprint import laid_as
from anchor_context.data.held_out import HELD_OUT
from anchor_context.data.loader import Dealing, make_loader, one_step
from anchor_context.data.options import DataFlags, DataOptions
from anchor_context.data.prepare import check_targets, prepare_rows
from anchor_context.data.rows import BLANK_ROW, PreparedRows, is_prepared, open_rows
from anchor_context.data.stream import check_machines_agree, check_same_stream, stream_origin
from anchor_context.data.tokenizer import load_tokenizer
from anchor_context.engine import (
    ENGINES,
    Engine,
    check_combination,
    choose_anchor_placement,
    engine_elsewhere,
    make_engine,
)
from anchor_context.evaluate.validation import (
    Validation,
    View,
    files_trained_on,
    open_views,
    plot_positions,
    prepare_held_out_views,
    prepare_views,
)
from anchor_context.files import keep_talking, warn
from anchor_context.integrations.adapters import (
    Lora,
    adapter_origin,
    add_adapters,
    describe_adapters,
    frozen_checksum,
    write_merged_model,
)
from anchor_context.integrations.calls import layer_windows, sliding_window_of, softcap_of
from anchor_context.integrations.language_model import (
    check_files,
    language_model_config,
    load_language_model,
    weightless_model,
)
from anchor_context.integrations.models import attention_heads, check_layers, set_attention
from anchor_context.integrations.random_weights import random_weights
from anchor_context.integrations.rehearsal import check_trainable, rehearse
from anchor_context.loss import (
    CausalLMWithLoss,
    liger_loss,
    logit_settings,
    settle_router_loss,
    tiled_loss,
)
from anchor_context.memory.estimate import Sharding, as_text
from anchor_context.memory.plan import (
    CHECKPOINTING,
    SWITCH,
    MemoryPlan,
    apply_memory_plan,
    choose_memory_plan,
    free_memory,
    keep_recorded,
    parse_micro_batch_tokens,
)
from anchor_context.parallel.groups import RankGrid, make_grid, make_groups
from anchor_context.parallel.shard import (
    check_row_length,
    shard_batch,
    token_multiple,
    tokens_per_rank,
)
from anchor_context.parallel.ulysses import check_heads
from anchor_context.rope.float32 import rotate_in_float32
from anchor_context.rope.frequencies import keep_rotary_frequencies
from anchor_context.rope.length import fix_frequencies
from anchor_context.rope.scaling import SCALING_TYPES, apply_rope_settings
from anchor_context.run.agreement import on_each_machine, on_one_rank
from anchor_context.run.checkpoint import (
    Progress,
    RunCheckpoints,
    check_resume,
    find_checkpoint,
    load_checkpoint,
    set_aside_abandoned,
    state_of_checkpoint,
)
from anchor_context.run.deepspeed_settings import check_engine, settle_deepspeed
from anchor_context.run.determinism import compute_deterministically
from anchor_context.run.device import EXPECTED_MFU, PEAK_BF16_FLOPS, peak_flops, peak_memory_bytes
from anchor_context.run.folder import (
    check_nobody_writes,
    check_output_is_free,
    claim_output,
    record_run,
    recorded_memory_plan,
    save_model,
    sees_claim,
    summary,
)
from anchor_context.run.lifeline import end_with_launcher
from anchor_context.run.metrics import StepLog
from anchor_context.run.origin import (
    changed_flags,
    check_same_base,
    check_same_training,
    training_origin,
)
from anchor_context.run.patience import BETWEEN_STEPS, Patience
from anchor_context.run.plot import plot_loss
from anchor_context.run.preemption import PreemptionGuard
from anchor_context.run.profiler import StepProfiler, parse_profile_steps
from anchor_context.run.saved_model import Source, read_source, write_model
from anchor_context.run.signals import EXIT_TRY_AGAIN
from anchor_context.run.versions import check_versions
from anchor_context.run.work import ModelWork, whole_size
from anchor_context.util import setup_debugpy

# --------------------------------------------------------------------------------------------------
# Flags, under the headings of `--help`. Dashes and underscores are the same: --seq-length and --seq_length.

PARALLEL_MODES = {  # mode -> the degrees that may be given with it
    "data_parallel": (),
    "ulysses_attn": ("ulysses_degree",),
    "ring_attn": ("ring_degree",),
    "hybrid_attn": ("ulysses_degree", "ring_degree"),
}
LONG_RUN_STEPS = 200
LR_SCHEDULES = {  # name -> how the rate falls, by the share of the decay that is done, 0 to 1
    "constant": None,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    # Warm-up, stable, decay. Of the forms of decay this one did best in arXiv 2405.18392.
    "wsd": lambda done: 1.0 - math.sqrt(done),
}
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}  # by --mixed_precision
FAST_ENGINES = tuple(name for name in ENGINES if name != "reference")  # which is for the tests


@dataclass(kw_only=True)
class ModelFlags:
    heading = "Model"

    model_name_or_path: str = flag(help="a Hugging Face model: a folder, or a hub name")
    from_scratch: bool = flag(
        False, "begin with random weights, by --seed; of the model only configuration and tokenizer"
    )
    model_max_position_embeddings: int | None = flag(
        None, "context length to record in the model; default: its own, or the row length"
    )
    rope_theta: float | None = flag(None, "RoPE base; default: the model's own")
    rope_scaling_type: str | None = flag(None, "default: the model's own", SCALING_TYPES)
    rope_scaling_factor: float | None = flag(None, "how far the scaling stretches")
    rope_precision: str = flag("model", "float32: rotate in it, round once", ("model", "float32"))
    trust_remote_code: bool = flag(False, "run Python code that comes with the model")


@dataclass(kw_only=True)
class AttentionFlags:
    heading = "Attention"

    attention_pattern: str = flag("anchor", "who sees whom, see README", PATTERNS)
    anchor_placement: str = flag(
        "auto", "auto: what the engine computes best", ("auto", *ANCHOR_PLACEMENTS)
    )
    attn_engine: str = flag("flash", "what computes the pattern", FAST_ENGINES)
    attn_kernel: str | None = flag(None, "of flash; default: the fastest that runs", KERNELS)
    context_schedule: str | None = flag(
        None, "START:STEPS, cut documents at START tokens, at more in each of so many steps"
    )


@dataclass(kw_only=True)
class ParallelismFlags:
    heading = "Parallelism"

    parallel_mode: str = flag("data_parallel", "how ranks share the work", PARALLEL_MODES)
    ulysses_degree: int | None = flag(None, "ranks that split the heads")
    ring_degree: int | None = flag(None, "ranks that split the row")


@dataclass(kw_only=True)
class OptimisationFlags:
    heading = "Optimisation"

    batch_size: int = flag(1, "rows of a data rank, times")
    gradient_accumulate_every: int = flag(
        1, "so many: with the number of data ranks, those of a step"
    )
    max_train_steps: int | None = flag(None, "optimiser steps; default: one epoch")
    learning_rate: float = flag(2e-5, "peak learning rate")
    lr_scheduler_type: str = flag(
        "constant", "how the rate falls; wsd: stable, then 1 - sqrt", LR_SCHEDULES
    )
    warmup_steps: int = flag(0, "steps of linear warm-up")
    decay_steps: int | None = flag(
        None, "steps at the end in which the rate falls; default: all after the warm-up"
    )
    min_lr_ratio: float = flag(0.0, "what it falls to, over the peak")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only")
    max_grad_norm: float = flag(1.0, "clip the global gradient norm to this; 0: never")
    max_bad_steps: int = flag(10, "stop after so many steps in a row without a finite gradient")
    leave_out_router_loss: bool = flag(False, "train experts without their balancing loss")
    mixed_precision: str = flag("bf16", "no: float32 throughout", DTYPES)
    deterministic: bool = flag(False, "the same bits in every run; slower on a GPU")


@dataclass(kw_only=True)
class AdapterFlags:
    heading = "Adapters"

    lora_rank: int = flag(0, "train LoRA adapters of this rank, not the weights; 0: none")
    lora_alpha: float | None = flag(None, "B·A counts alpha / rank times; default: twice the rank")
    lora_targets: str = flag("all-linear", "or names of linear layers: q_proj,v_proj")
    lora_embeddings_and_norms: bool = flag(False, "train these whole beside, as LongLoRA does")


@dataclass(kw_only=True)
class MemoryFlags:
    heading = "Memory"

    micro_batch_tokens: str = flag(
        "auto", "of one forward on a rank: a number, auto, row (whole rows)"
    )
    memory_gib: float | None = flag(None, "memory of a rank to plan for; default: what is free")
    gradient_checkpointing: str = flag(
        "auto", "recompute layers in backward; offload: inputs to the CPU", CHECKPOINTING
    )
    tiled_mlp: str = flag("auto", "compute MLPs a few thousand tokens at a time", SWITCH)
    liger: str = flag("auto", "Liger's RMSNorm, RoPE, SwiGLU and loss, on CUDA", SWITCH)


@dataclass(kw_only=True)
class ValidationFlags:
    heading = "Validation"

    eval_dataset: str | None = flag(None, "documents to validate on, as --dataset names them")
    eval_every: int | None = flag(None, "steps between validations; one more comes at the end")
    keep_best: bool = flag(False, "keep the model of the lowest loss there as best/")


@dataclass(kw_only=True)
class OutputFlags:
    heading = "Output"

    output_dir: str = flag("output/run", "everything that the run writes")
    resume: str = flag("never", "auto, never, or a checkpoint's path")
    checkpoint_every: int | None = flag(None, "steps between checkpoints to resume from")
    save_per_hours: float | None = flag(None, "hours between checkpoints to resume from")
    keep_checkpoints: int = flag(2, "checkpoints to keep")
    saving_interval: int | None = flag(None, "steps between models to use")
    min_steps_for_save: int = flag(0, "no model to use before this step")
    logging_steps: int = flag(1, "steps between lines of the log")
    profile_steps: str | None = flag(None, "A:B, write a torch profiler trace of these steps")
    wandb: str | None = flag(None, "log to this Weights & Biases project")
    tensorboard: bool = flag(False, "log for TensorBoard in the output folder")


@dataclass(kw_only=True)
class PlanFlags:
    heading = "Plan"

    plan_only: bool = flag(False, "print what the run would be, and stop before its weights")
    plan_ranks: int | None = flag(None, "with --plan_only: its ranks; default: as many as launched")
    plan_gpu: str | None = flag(
        None, "with --plan_only: theirs, if not this machine's", PEAK_BF16_FLOPS
    )


@dataclass(kw_only=True)
class Flags(
    # A dataclass takes the fields of its last base first.
    PlanFlags,
    OutputFlags,
    ValidationFlags,
    MemoryFlags,
    AdapterFlags,
    OptimisationFlags,
    ParallelismFlags,
    AttentionFlags,
    DataOptions,
    DataFlags,
    ModelFlags,
):
    """All of them. Those of the data are in `anchor_context/data/options.py`."""


def main(flags: Flags) -> None:
    end_with_launcher()
    check_versions()
    quiet_libraries()

    # ----------------------------------------------------------------------------------------------
    # Checks: everything that can be known before any heavy work.

    check_flags(flags)
    lora = lora_of(flags)
    output = Path(flags.output_dir)
    if not flags.plan_only:  # which neither reads nor writes there
        check_resume(flags.resume)
        check_nobody_writes(output)
        check_output_is_free(output, resume=flags.resume)
    if flags.deterministic:
        compute_deterministically()
    grid = plan_grid(flags)
    check_row_length(flags.seq_length, grid)
    placement = anchor_placement_of(flags)
    deepspeed_plugin, overridden = settle_deepspeed(
        mixed_precision=flags.mixed_precision,
        max_grad_norm=flags.max_grad_norm,
        batch_size=flags.batch_size,
        accumulation=flags.gradient_accumulate_every,
        data_ranks=grid.data_degree,
    )

    config, tokenizer, source = load_config_and_tokenizer(flags)
    check_model(config, flags, grid)
    notes = apply_rope_settings(
        config,
        row_length=flags.seq_length,
        rope_theta=flags.rope_theta,
        rope_scaling_type=flags.rope_scaling_type,
        rope_scaling_factor=flags.rope_scaling_factor,
        model_max_position_embeddings=flags.model_max_position_embeddings,
    )
    notes += fix_frequencies(config, row_length=flags.seq_length)
    notes = [f"rope     {note}" for note in notes]
    if config.model_type != (whole := source.config.get("model_type")):
        notes += [f"trains   the language model inside {whole}, which the saved models are alone"]
    model_class = rehearse(
        flags.model_name_or_path,
        config,
        source,
        trust_remote_code=flags.trust_remote_code,
        lora=lora,
    )
    if flags.from_scratch:
        notes += ["weights  random (--from_scratch)"]
    elif not flags.plan_only:
        check_files(
            flags.model_name_or_path, config=config, trust_remote_code=flags.trust_remote_code
        )
    if (context := context_schedule_of(flags)) is not None:
        notes += [
            f"context  documents are cut at {context.start:,} tokens, at more in each step, and not at all "
            f"after {context.steps:,} steps"
        ]
    trackers = trackers_of(flags)
    prepare = partial(
        prepare_rows,
        flags.dataset,
        flags,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        anchor_placement=placement,
        cache_dir=flags.cache_dir,
        num_proc=flags.num_proc,
    )
    if flags.plan_only:
        prepared, views = lay_data(flags, prepare, once=lambda make: make())
        print_plan(
            flags, config, grid, deepspeed_plugin, prepared=prepared, views=views, notes=notes
        )
        return

    # ----------------------------------------------------------------------------------------------
    # Distributed: Accelerate starts DeepSpeed; the grid says which rank holds which part of a row.

    if not torch.cuda.is_available():
        # DeepSpeed would compile its shared-memory reductions, which nothing here uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = Accelerator(
        mixed_precision=flags.mixed_precision,
        deepspeed_plugin=deepspeed_plugin,
        log_with=trackers or None,
        project_dir=flags.output_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(
                # Named, because without a GPU Accelerate would take every rank for the only one.
                backend="nccl" if torch.cuda.is_available() else "gloo",
                timeout=BETWEEN_STEPS,
            )
        ],
    )
    for line in overridden:
        accelerator.print(colored(line, "yellow"), flush=True)
    device, rank, world_size = (
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
    )
    setup_debugpy(accelerator)
    set_seed(flags.seed)  # the same on every rank: the weights of a new model must agree

    ring_group, ulysses_group = make_groups(grid, rank=rank, world_size=world_size)
    dtype, heads = DTYPES[flags.mixed_precision], attention_heads(config)
    engine = make_engine(
        flags.attn_engine,
        device=device,
        dtype=dtype,
        head_dim=heads["head_dim"],
        kernel=flags.attn_kernel,
        deterministic=flags.deterministic,
        softcap=softcap_of(config),
        grid=grid,
        ring_group=ring_group,
        ulysses_group=ulysses_group,
    )

    # ----------------------------------------------------------------------------------------------
    # Data: documents are packed into rows once; afterwards the rows are memory-mapped.

    # Where machines share the cache, one prepares and the others wait. All ranks of a machine open what its
    # first one says, whatever becomes of the data meanwhile.
    prepared, views = lay_data(flags, prepare, once=partial(on_each_machine, accelerator))
    for file in files_trained_on(views, prepared):
        notes += [f"valid    {file} is trained on, too: its loss there tells nothing of other text"]
    stream = stream_origin(prepared, seed=flags.seed)
    check_machines_agree(gather_object([stream]))
    check_rows(flags, engine, prepared)
    for rows, pattern in views.values():
        check_machines_agree(gather_object([stream_origin(rows, seed=flags.seed)]))
        check_rows(flags, engine, rows, pattern=pattern)

    # ----------------------------------------------------------------------------------------------
    # Where the run stands: a checkpoint to resume from says how many rows are done, and so how many steps
    # are left. From here on the output folder is this run's alone.

    claim = on_one_rank(accelerator, partial(claim_output, output, resume=flags.resume))
    seen = gather_object([on_each_machine(accelerator, partial(sees_claim, output, claim))])
    notes += check_shared(flags, all(seen))
    checkpoint = on_one_rank(accelerator, partial(find_checkpoint, output, flags.resume))
    training = training_origin(
        flags.model_name_or_path,
        config,
        mixed_precision=flags.mixed_precision,
        zero_stage=deepspeed_plugin.zero_stage,
        adapter=adapter_origin(lora),
    )
    progress = Progress()
    if checkpoint is not None:
        state = state_of_checkpoint(checkpoint)
        check_same_stream(stream, state["stream"])
        told = check_same_training(training, state.get("training", training))
        for line in told + changed_flags(steering(flags), state.get("flags", {})):
            accelerator.print(colored(line, "yellow"), flush=True)
        progress = Progress.of(state)
    rows_per_step, max_steps = count_steps(flags, grid, prepared, progress)

    # ----------------------------------------------------------------------------------------------
    # Model: a Hugging Face model whose attention is the engine's, under a module that returns the loss.

    free_bytes = free_memory(device, memory_gib=flags.memory_gib)  # before the model is there
    with (
        random_weights(
            accelerator,
            output,
            model_class,
            config=config,
            source=source,
            dtype=dtype,
            seed=flags.seed,
        )
        if flags.from_scratch
        else nullcontext(flags.model_name_or_path)
    ) as folder_or_name:
        model = load_language_model(
            folder_or_name,
            config=config,
            dtype=dtype,
            trust_remote_code=flags.trust_remote_code,
        )
    write = write_model
    if lora is not None:
        add_adapters(model, lora, seed=flags.seed)
        notes.append(describe_adapters(model, lora))
        write = partial(write_merged_model, lora=lora, base=flags.model_name_or_path)
        base = frozen_checksum(model)  # checkpoints leave these weights out
        if checkpoint is not None:
            before = state.get("training", {}).get("base")
            check_same_base(base, before, name=flags.model_name_or_path)
        training["base"] = base
    set_attention(model, engine.attend)
    sharding = Sharding.of(deepspeed_plugin.deepspeed_config, ranks=world_size)
    memory = plan_memory(
        flags,
        model,
        prepared,
        grid,
        device=device,
        free_bytes=min(gather_object([free_bytes])),
        host_bytes=min(gather_object([free_memory(torch.device("cpu"))])),
        sharding=sharding,
    )
    if checkpoint is not None:
        recorded = on_one_rank(accelerator, partial(recorded_memory_plan, checkpoint))
        memory, why_anew = keep_recorded(memory, recorded)
        notes += [why_anew] if why_anew else []
    treat = apply_memory_plan(model, memory)
    if flags.rope_precision == "float32":
        rotate_in_float32(model)
    parameters = count_parameters(model)
    work = ModelWork.of(model)
    model.train()

    # ----------------------------------------------------------------------------------------------
    # Optimiser: AdamW under DeepSpeed ZeRO.

    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay=flags.weight_decay),
        lr=flags.learning_rate,
        betas=(0.9, 0.95),
    )
    model = CausalLMWithLoss(model, liger_loss if memory.liger.value else tiled_loss)
    restore_rotary_frequencies = keep_rotary_frequencies(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    restore_rotary_frequencies()  # float32, also where a library rounded them with the weights

    # ----------------------------------------------------------------------------------------------
    # Resume: the checkpoint restores weights, optimiser and random states. The schedule is a function of the
    # step, whatever the ranks.

    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint)
        on_one_rank(accelerator, partial(set_aside_abandoned, output, checkpoint))
        # A kill may have come between the checkpoint and the model of the same step.
        folder = output / f"step-{progress.step}"
        due = not progress.bad_in_a_row and model_is_due(flags, progress.step, max_steps)
        if due and not folder.exists():
            save_model(accelerator, model, source, folder, must=True, write=write)
    check_engine(model, mixed_precision=flags.mixed_precision, max_grad_norm=flags.max_grad_norm)

    # The optimiser that steps: with offload it is DeepSpeed's CPU Adam.
    scheduler = make_lr_schedule(
        flags, model.optimizer.optimizer, step=progress.step, max_steps=max_steps
    )

    # ----------------------------------------------------------------------------------------------
    # The record of the run.

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        record_run(
            output,
            flags=asdict(flags) | {"anchor_placement": placement},
            engine=engine.name,
            kernel=engine.kernel,
            kernel_reason=engine.reason,
            layout=str(engine.grid),
            memory=asdict(memory),
            data=prepared.report,
            validation={name: rows.report for name, (rows, _) in views.items()},
        )
        describe_run(
            flags,
            engine=engine,
            memory=memory,
            prepared=prepared,
            validation=views["packed"].rows.report if views else None,
            parameters=parameters,
            max_steps=max_steps,
            rows_per_step=rows_per_step,
            notes=notes,
        )
        for line in slow_paths(
            flags, device=device, kernel=engine.kernel, memory=memory, sharding=sharding
        ):
            print(colored(f"slow     {line}", "yellow", attrs=["bold"]), flush=True)
        if checkpoint is not None:
            done = f"{progress.step} steps, {progress.rows} rows done"
            print(colored(f"resumed  {checkpoint}: {done}", "green"), flush=True)
    engine.warm_up(**heads, window=sliding_window_of(config), tell=accelerator.print)
    if trackers:
        accelerator.init_trackers(flags.wandb or "anchor_context", config=asdict(flags))

    # ----------------------------------------------------------------------------------------------
    # The loop. A step's loss is the sum over all its targets on all ranks over their number. DeepSpeed
    # averages gradients over ranks, so each rank's sum is scaled by world_size / targets.

    batches_of = partial(
        loader_of,
        flags,
        config,
        grid=grid,
        micro_batch_tokens=memory.micro_batch_tokens,
        zero_stage=deepspeed_plugin.zero_stage,
        pair_price=work.pair_price,
        pin_memory=device.type == "cuda",
    )
    loader = batches_of(prepared, first_row=progress.rows, first_step=progress.step)
    profiler = StepProfiler(flags.profile_steps, output / "profile", rank=rank)
    log = StepLog(
        accelerator,
        output,
        work=work,
        full_pairs=rows_per_step * flags.seq_length * (flags.seq_length + 1) // 2,
        first_step=progress.step,
        last_step=max_steps,
        logging_steps=flags.logging_steps,
    )
    validation = Validation(
        accelerator,
        views,
        log,
        model,
        metrics=output / "metrics.jsonl",
        batches=partial(batches_of, context=None),  # whole documents
        share=share_of(config, grid),
        treat=lambda tokens: treat(tokens // grid.sequence_degree),
        traffic=engine.traffic,
        every=flags.eval_every,
        first_step=progress.step,
        last_step=max_steps,
        best=output / "best" if flags.keep_best else None,
        save=partial(save_model, accelerator, model, source, must=False, write=write),
    )
    checkpoints = RunCheckpoints(
        accelerator, output, keep=flags.keep_checkpoints, resumed=checkpoint
    )

    def save_checkpoint() -> None:
        with log.pause():
            checkpoints.save(
                steps=progress.step,
                rows=progress.rows,
                state=asdict(progress)
                | {"stream": stream, "training": training, "flags": steering(flags)},
            )

    patience = Patience()
    checkpoint_due, last_checkpoint_time = False, time.monotonic()
    first_step, stopping, too_bad = progress.step + 1, False, False

    with PreemptionGuard() as guard:
        batches = log.timed(loader)
        # A resumed run may have been stopped before the validation of its last step.
        if progress.step < max_steps:
            stopping = not validation.at(progress.step, stop=guard.requested)
        while progress.step < max_steps and not stopping:
            # ---- A training step: forward and backward of its micro-batches, then the update.
            patience.step_begins()
            profiler.before(progress.step + 1)
            step_loss = torch.zeros((), dtype=torch.float64, device=device)
            ring_imbalances = []
            for batch in one_step(batches):
                inputs = {
                    key: batch[key].to(device, non_blocking=True)
                    for key in ("input_ids", "position_ids", "labels", "layout")
                }
                # What is recomputed, by the most tokens that any rank has here: the same on all of them.
                treat(batch["planned_tokens"] // grid.sequence_degree)
                loss_sum, _ = model(**inputs)
                scale = world_size / max(1, batch["step_targets"])
                # Makes the gradient NaN where the loss is not finite, so that DeepSpeed skips the step on all
                # ranks.
                scale = scale + 0 * loss_sum.detach()
                # At the step's last micro-batch, and there alone, this also reduces, clips and updates.
                accelerator.sync_gradients = batch["is_last"]
                accelerator.backward(loss_sum * scale, scale_wrt_gas=False)
                step_loss += loss_sum.detach()
                if grid.ring_degree > 1:
                    ring_imbalances.append(batch["layout"].imbalance)
            learning_rate = scheduler.get_last_lr()[0]
            scheduler.step()
            # DeepSpeed computes the norm over all ranks, and updates nothing where it is not finite.
            skipped = bool(optimizer.step_was_skipped)
            progress.advance(
                # The last step of an epoch may have been filled up with blank rows.
                rows=sum(row != BLANK_ROW for row in batch["step_rows"]),
                tokens=batch["step_tokens"],
                skipped=skipped,
            )
            profiler.after(progress.step, final=progress.step == max_steps)

            # ---- Its figures. Tensors among them are read later, because reading waits for the device.
            log.step(
                step=progress.step,
                loss=step_loss,
                learning_rate=learning_rate,
                grad_norm=model.get_global_grad_norm(),
                target_tokens=batch["step_targets"],
                tokens_seen=progress.tokens_seen,
                tokens=batch["step_tokens"],
                pairs=batch["step_pairs"],
                context_length=batch["context_length"],
                comm_bytes=engine.traffic.take(),
                ring_imbalance=fmean(ring_imbalances) if ring_imbalances else None,
                micro_batches=batch["micro_batches"],
                work_imbalance=batch["work_imbalance"],
            )
            if progress.step == first_step and accelerator.is_main_process:
                describe_first_step(batch)
            # On the CPU the libraries' own memory would be in the figure.
            if (
                progress.step == first_step + 2
                and device.type == "cuda"
                and accelerator.is_main_process
            ):
                tqdm.write(f"memory   {memory.beside(peak_memory_bytes(device))}")
            if skipped:
                log.bad_step(progress.step, rows=batch["step_rows"])

            # ---- Reasons to stop: somebody asks for it, or the gradients stay bad.
            too_bad = progress.bad_in_a_row >= flags.max_bad_steps
            stopping = guard.requested() or too_bad
            patience.step_ends()
            if progress.step == first_step:
                # What is there by now stays to the end. Python's collector need not look through it again:
                # half a million objects, 0.4 s on one rank while the others waited. It is not switched off,
                # for a tensor in a cycle would keep its memory.
                with log.pause():
                    gc.collect()
                    gc.freeze()

            # ---- Validation, before a checkpoint of this step: what a kill cuts off is done again with it.
            # The last one comes when everything is saved.
            if progress.step < max_steps and not stopping:
                stopping = not validation.at(progress.step, stop=guard.requested)

            # ---- Reasons to save: the run stops, or it is time to, by its steps or by the main rank's clock.
            # Never after a skipped step: a checkpoint then waits for the next good one.
            hours = (time.monotonic() - last_checkpoint_time) / 3600
            checkpoint_due = (
                checkpoint_due
                or stopping
                or (flags.checkpoint_every and progress.step % flags.checkpoint_every == 0)
                or (flags.save_per_hours and guard.main_decides(hours >= flags.save_per_hours))
            )
            model_due = not skipped and model_is_due(flags, progress.step, max_steps)

            # ---- Once in a while. The clock of the log stands still meanwhile. A checkpoint is good once the
            # step after it was finite.
            if checkpoints.unproven:
                with log.pause():
                    checkpoints.judge(finite=not skipped)
            if checkpoint_due and not skipped:
                save_checkpoint()
                checkpoint_due, last_checkpoint_time = False, time.monotonic()
            if model_due:
                with log.pause():
                    folder, last = output / f"step-{progress.step}", progress.step == max_steps
                    save_model(accelerator, model, source, folder, must=last, write=write)

        if progress.step == max_steps and not stopping and not progress.bad_in_a_row:
            stopping = not validation.at(progress.step, stop=guard.requested)
            if stopping:  # or the resumed run would have to train steps again to validate
                save_checkpoint()
            if validation.broken:
                checkpoints.judge(finite=False)

    # ----------------------------------------------------------------------------------------------
    # The end.

    log.close()
    if accelerator.is_main_process:
        plot_loss(output / "metrics.jsonl", output / "loss.png")
        plot_positions(output / "metrics.jsonl", output / "loss_by_position.png")
        if progress.step == max_steps and not progress.bad_in_a_row:
            print(summary(output), flush=True)
    # On the main rank trackers upload what they have: the others must not leave before.
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    last_good = checkpoints.last_good()
    if progress.bad_in_a_row and (too_bad or progress.step == max_steps):
        raise RuntimeError(bad_end(output, progress, last_good=last_good))
    if validation.broken and progress.step == max_steps:
        raise RuntimeError(
            "the trained model has no finite loss on the evaluation data, perhaps because the last step "
            f"broke the weights: {output / f'step-{max_steps}'} is in doubt, the last good checkpoint is "
            f"{last_good or 'none'}"
        )
    if stopping and (progress.step < max_steps or validation.owes(progress.step)):
        if progress.bad_in_a_row and accelerator.is_main_process:
            warn(
                f"stopped in a series of bad steps: nothing was saved after {last_good or 'the start'}"
            )
        sys.exit(EXIT_TRY_AGAIN)


# --------------------------------------------------------------------------------------------------
# Checks. All but the last need no more than flags and a configuration.


def check_flags(flags: Flags) -> None:
    """Raise `ValueError` for a flag's value, or a combination, that cannot work."""
    if not flags.dataset:
        raise ValueError("--dataset is missing: name files, globs or folders of JSON lines")
    counts = ("batch_size", "gradient_accumulate_every", "logging_steps", "num_proc")
    for name in (*counts, "keep_checkpoints", "max_bad_steps"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name} {getattr(flags, name)} must be at least 1")
    for name in (
        "max_train_steps",
        "saving_interval",
        "checkpoint_every",
        "save_per_hours",
        "eval_every",
        "memory_gib",
        "decay_steps",
        "ulysses_degree",
        "ring_degree",
        "model_max_position_embeddings",
    ):
        if getattr(flags, name) is not None and getattr(flags, name) <= 0:
            raise ValueError(f"--{name} {getattr(flags, name)} must be positive, or left out")
    for name in (
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "warmup_steps",
        "min_steps_for_save",
    ):
        if getattr(flags, name) < 0:
            raise ValueError(f"--{name} {getattr(flags, name)} must not be negative")
    check_validation(flags)
    check_lr_schedule(flags)
    if flags.max_train_steps is not None:
        check_steps(flags, done=0, max_steps=flags.max_train_steps)
    if flags.profile_steps is not None:
        parse_profile_steps(flags.profile_steps)
    parse_micro_batch_tokens(flags.micro_batch_tokens)
    check_plan_flags(flags)
    if flags.from_scratch and lora_of(flags) is not None:
        raise ValueError(
            "--lora_rank adapts trained weights, and --from_scratch has none: leave one of the two out"
        )
    if context_schedule_of(flags) is not None and computes_whole_rows(flags):
        raise ValueError(
            "--context_schedule cuts documents, and --micro_batch_tokens row computes whole rows as they "
            "were prepared: leave one of the two out"
        )
    check_attention(flags, interleaved=flags.interleave_chunks and computes_whole_rows(flags))


def check_validation(flags: Flags) -> None:
    """Raise `ValueError` where the flags of validation do not go together."""
    if flags.eval_dataset is not None and flags.eval_documents is not None:
        raise ValueError(
            "--eval_dataset and --eval_documents both say what to validate on: give one of them"
        )
    if flags.eval_every is not None and not (flags.eval_dataset or flags.eval_documents):
        raise ValueError(
            f"--eval_every {flags.eval_every} has nothing to validate on: name --eval_dataset, or hold "
            "documents of --dataset out by --eval_documents N"
        )
    if flags.keep_best and flags.eval_every is None:
        raise ValueError(
            "--keep_best needs --eval_every: with no validation but that at the end there is no best model "
            "to choose"
        )


def check_attention(flags: Flags, **what) -> None:
    """`check_combination` of the flags, with `what` else is known."""
    check_combination(
        flags.attn_engine,
        kernel=flags.attn_kernel,
        ring="ring_degree" in PARALLEL_MODES[flags.parallel_mode],
        pattern=flags.attention_pattern,
        anchor_placement=anchor_placement_of(flags),
        **what,
    )


def check_lr_schedule(flags: Flags) -> None:
    """Raise `ValueError` for a schedule whose flags do not go together."""
    kind = flags.lr_scheduler_type
    if not 0 <= flags.min_lr_ratio <= 1:
        raise ValueError(f"--min_lr_ratio {flags.min_lr_ratio} must be between 0 and 1")
    if kind == "constant" and (flags.decay_steps or flags.min_lr_ratio):
        raise ValueError(
            "--decay_steps and --min_lr_ratio are of a rate that falls: choose another --lr_scheduler_type "
            "than constant"
        )
    if kind == "wsd" and flags.decay_steps is None:
        raise ValueError(
            "--lr_scheduler_type wsd needs --decay_steps: in how many steps at the end the rate falls"
        )


def check_plan_flags(flags: Flags) -> None:
    """Raise `ValueError` for what does not go with `--plan_only`, or without it."""
    for name in ("plan_ranks", "plan_gpu"):
        if getattr(flags, name) is not None and not flags.plan_only:
            raise ValueError(f"--{name} goes with --plan_only alone: take it out, or add that")
    if flags.plan_ranks is not None and flags.plan_ranks < 1:
        raise ValueError(f"--plan_ranks {flags.plan_ranks} must be at least 1")
    if flags.plan_gpu is not None and flags.memory_gib is None:
        raise ValueError(
            f"--plan_gpu {flags.plan_gpu} needs --memory_gib, what is free on such a GPU before the run: of "
            "the 80 GB of an H100 some 78"
        )


def check_steps(flags: Flags, *, done: int, max_steps: int) -> None:
    """Raise `ValueError` unless `max_steps` leave room for the warm-up, and for the steps already `done`."""
    if flags.warmup_steps > max_steps:
        raise ValueError(
            f"--warmup_steps {flags.warmup_steps} is more than the {max_steps} steps of the run "
            "(--max-train-steps, or one epoch)"
        )
    if flags.warmup_steps + (flags.decay_steps or 0) > max_steps:
        raise ValueError(
            f"--warmup_steps {flags.warmup_steps} and --decay_steps {flags.decay_steps} are together more "
            f"than the {max_steps} steps of the run (--max-train-steps, or one epoch)"
        )
    if done > max_steps:
        raise ValueError(
            f"--max-train-steps {max_steps}: the run to resume is at step {done} already; ask for more"
        )


def check_model(config: PretrainedConfig, flags: Flags, grid: RankGrid) -> None:
    """Raise `ValueError` for a model that the flags cannot train."""
    check_trainable(config)
    check_layers(config)
    logit_settings(config)
    settle_router_loss(
        config, leave_out=flags.leave_out_router_loss, remedy="--leave_out_router_loss"
    )
    if grid.ulysses_degree > 1:
        check_heads(config.num_attention_heads, grid.ulysses_degree)
    check_attention(flags, softcap=softcap_of(config))


def check_shared(flags: Flags, shared: bool) -> list[str]:
    """What to say of an output folder that not all machines see. Raises `ValueError` if checkpoints are asked
    for: every rank writes a part of them."""
    if shared:
        return []
    told = f"--output-dir {flags.output_dir} is not on storage that all machines share"
    if flags.checkpoint_every or flags.save_per_hours or flags.resume != "never":
        raise ValueError(f"{told}, and checkpoints are written there, and read, by all of them")
    return [f"safety   {told}: no checkpoint can be saved, not even when the run is stopped"]


def check_rows(
    flags: Flags, engine: Engine, prepared: PreparedRows, *, pattern: str | None = None
) -> None:
    """Raise `ValueError` for rows that the engine cannot take, in the pattern of training or another one."""
    check_targets(prepared)
    engine.check(
        pattern=pattern or flags.attention_pattern,
        anchor_placement=prepared.anchor_placement,
        interleaved=prepared.interleaved and computes_whole_rows(flags),
    )


# --------------------------------------------------------------------------------------------------
# What flags come to.


def load_config_and_tokenizer(
    flags: Flags,
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, Source]:
    """Of the model to train, and what its folder holds. Raises `ValueError` where there are none."""
    name = flags.model_name_or_path
    with model_errors(name, "--model_name_or_path"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=flags.trust_remote_code)
        tokenizer = load_tokenizer(name, trust_remote_code=flags.trust_remote_code)
        source = read_source(name, config=config, tokenizer=tokenizer)
    return language_model_config(config), tokenizer, source


def trackers_of(flags: Flags) -> list[str]:
    """Accelerate's names of the trackers asked for. It would leave out in silence what is not installed."""
    if flags.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs the package: pip install wandb, or use --tensorboard")
    return ["wandb"] * (flags.wandb is not None) + ["tensorboard"] * flags.tensorboard


def steering(flags: Flags) -> dict[str, object]:
    """The flags that steer the training, of which a checkpoint's run may have had others."""
    steer = (ModelFlags, AttentionFlags, OptimisationFlags)
    # The model's name and the precision are checked by `check_same_training`.
    own = {field.name for group in steer for field in fields(group)}
    own -= {"model_name_or_path", "mixed_precision"}
    return {name: value for name, value in asdict(flags).items() if name in own}


def lora_of(flags: Flags) -> Lora | None:
    """The adapters that are asked for, if any. Raises `ValueError` for values that cannot work."""
    return Lora.of(
        rank=flags.lora_rank,
        alpha=flags.lora_alpha,
        targets=flags.lora_targets,
        embeddings_and_norms=flags.lora_embeddings_and_norms,
    )


def context_schedule_of(flags: Flags) -> ContextSchedule | None:
    """How the context grows; None: it does not. Raises `ValueError` for a value that cannot be."""
    if flags.context_schedule is None:
        return None
    return parse_context_schedule(flags.context_schedule, row_length=flags.seq_length)


def anchor_placement_of(flags: Flags) -> str:
    """Where the rows have their anchors, whatever `--anchor_placement auto` comes to."""
    return choose_anchor_placement(
        flags.attention_pattern, flags.attn_engine, wanted=flags.anchor_placement
    )


def plan_grid(flags: Flags) -> RankGrid:
    """This rank's place: data × ring × Ulysses, from the flags and the launcher's ranks."""
    if "WORLD_SIZE" not in os.environ or os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        raise ValueError(
            "train.py runs under Accelerate with DeepSpeed: python -m anchor_context.launch "
            "--config_file accelerate_configs/cpu.yaml --num_processes 1 train.py …"
        )
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if flags.plan_only:
        if world_size > 1:
            raise ValueError(
                f"--plan_only takes one process, and here are {world_size}: launch it by "
                "anchor_context.launch, or with --num_processes 1 and --plan_ranks"
            )
        world_size = flags.plan_ranks or 1
    ring, ulysses = flags.ring_degree, flags.ulysses_degree
    for name in ("ulysses_degree", "ring_degree"):
        if getattr(flags, name) is not None and name not in PARALLEL_MODES[flags.parallel_mode]:
            raise ValueError(f"--{name} does not go with --parallel_mode {flags.parallel_mode}")
    if flags.parallel_mode == "hybrid_attn" and (ring is None or ulysses is None):
        raise ValueError("--parallel_mode hybrid_attn needs --ulysses_degree and --ring_degree")
    if flags.parallel_mode == "ulysses_attn":
        ulysses = ulysses or world_size
    if flags.parallel_mode == "ring_attn":
        ring = ring or world_size
    return make_grid(
        rank=rank, world_size=world_size, ring_degree=ring or 1, ulysses_degree=ulysses or 1
    )


def computes_whole_rows(flags: Flags) -> bool:
    """Whether micro-batches are rows as they were prepared, and not units, whose chunks are back in order."""
    return flags.micro_batch_tokens == "row"


def lay_data(
    flags: Flags, prepare: partial[PreparedRows], *, once: Callable
) -> tuple[PreparedRows, dict[str, View]]:
    """The rows of training, and both views of what validation measures.

    Args:
        prepare: `prepare_rows` of the rows of training.
        once: what a function without arguments returns, called by one rank for all that share its disk.
    """
    folders, options = {}, flags
    if is_prepared(Path(flags.dataset)):
        options = laid_as(open_rows(flags.dataset).fingerprint, flags)
    if flags.eval_dataset is not None:
        # First, because they are few, and their mistakes show at once.
        folders = once(partial(prepare_views, flags.eval_dataset, options, **prepare.keywords))
    prepared = open_rows(once(lambda: prepare().directory))
    if flags.eval_documents is not None:
        folders = once(partial(prepare_held_out_views, prepared, options, **prepare.keywords))
    return prepared, open_views(folders, pattern=flags.attention_pattern)


def count_steps(
    flags: Flags, grid: RankGrid, prepared: PreparedRows, progress: Progress
) -> tuple[int, int]:
    """Rows of a step, and steps of the whole run, those done included. Raises as `check_steps`."""
    rows_per_step = flags.batch_size * flags.gradient_accumulate_every * grid.data_degree
    steps_left = max(0, -(-(len(prepared) - progress.rows) // rows_per_step))  # of one epoch
    max_steps = flags.max_train_steps or progress.step + steps_left
    check_steps(flags, done=progress.step, max_steps=max_steps)
    return rows_per_step, max_steps


def plan_memory(
    flags: Flags,
    model: torch.nn.Module,
    prepared: PreparedRows,
    grid: RankGrid,
    *,
    device: torch.device,
    **known,
) -> MemoryPlan:
    """`choose_memory_plan` by the flags and the rows, with what else is `known`."""
    longest_unit = attended_length(
        flags.attention_pattern,
        longest_document=prepared.longest_document,
        row_length=flags.seq_length,
    )
    window = sliding_window_of(model.config)
    per_document = anchor_placement_of(flags) == "per_document"
    return choose_memory_plan(
        model,
        device=device,
        row_tokens=flags.batch_size * flags.seq_length // grid.sequence_degree,
        longest_unit=tokens_per_rank(longest_unit, grid),
        ring_degree=grid.ring_degree,
        ulysses_degree=grid.ulysses_degree,
        dense_mask=flags.attn_engine == "flex" and device.type == "cpu",
        hidden_anchors=per_document and window is not None and window < longest_unit,
        micro_batch_tokens=parse_micro_batch_tokens(flags.micro_batch_tokens),
        gradient_checkpointing=flags.gradient_checkpointing,
        tiled_mlp=flags.tiled_mlp,
        liger=flags.liger,
        **known,
    )


def count_parameters(model: torch.nn.Module) -> int:
    """Distinct ones, also where ZeRO-3 left a part of each here."""
    return sum(whole_size(p) for p in model.parameters())


def share_of(config: PretrainedConfig, grid: RankGrid) -> Callable[[dict], dict]:
    """What makes of a micro-batch the part that this rank computes."""
    return partial(shard_batch, grid=grid, windows=layer_windows(config))


def loader_of(
    flags: Flags,
    config: PretrainedConfig,
    prepared: PreparedRows,
    grid: RankGrid,
    *,
    micro_batch_tokens: int,
    zero_stage: int,
    pair_price: float,
    **how,
) -> DataLoader:
    """The micro-batches of this rank, of at most so many tokens each: by the flags, and `how`."""
    most_tokens = micro_batch_tokens * grid.sequence_degree
    training = {
        "pattern": flags.attention_pattern,
        "total_rows": None if flags.max_train_steps else len(prepared),  # one epoch
        "transform": share_of(config, grid),
        "context": context_schedule_of(flags),
    }
    return make_loader(
        prepared,
        seed=flags.seed,
        batch_size=flags.batch_size,
        accumulation=flags.gradient_accumulate_every,
        data_rank=grid.data_rank,
        data_degree=grid.data_degree,
        dealing=Dealing(
            micro_batch_tokens=None if computes_whole_rows(flags) else most_tokens,
            zero_stage=zero_stage,
            pair_price=pair_price,
            windows=layer_windows(config),
            divisible_by=token_multiple(grid),
        ),
        **training | how,
    )


def parameter_groups(model: torch.nn.Module, *, weight_decay: float) -> list[dict]:
    """Matrices decay, vectors (norms and biases) do not. Of what is trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    is_matrix = [len(getattr(p, "ds_shape", p.shape)) > 1 for p in parameters]
    matrices = [p for p, matrix in zip(parameters, is_matrix, strict=True) if matrix]
    vectors = [p for p, matrix in zip(parameters, is_matrix, strict=True) if not matrix]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # adapters are matrices alone


def make_lr_schedule(
    flags: Flags, optimizer: torch.optim.Optimizer, *, step: int, max_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate after `step` steps of `max_steps`, by the flags alone."""
    for group in optimizer.param_groups:  # a checkpoint brought the rate of its last step
        group["lr"] = group["initial_lr"] = flags.learning_rate
    factor = partial(learning_rate_factor, flags, max_steps=max_steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=step - 1)


def learning_rate_factor(flags: Flags, step: int, *, max_steps: int) -> float:
    """The learning rate after `step` steps over its peak: up from 0, stable, down to the minimum.

    A run that is resumed with more steps than were planned decays later, at the end of those. transformers'
    schedules give the same numbers, but its linear one has no minimum, and its WSD warms up from there.
    """
    if step < flags.warmup_steps:
        return step / flags.warmup_steps
    falls = LR_SCHEDULES[flags.lr_scheduler_type]
    decay_steps = flags.decay_steps or max(1, max_steps - flags.warmup_steps)
    done = min(1.0, (step - (max_steps - decay_steps)) / decay_steps)
    if falls is None or done <= 0:
        return 1.0
    return flags.min_lr_ratio + (1.0 - flags.min_lr_ratio) * falls(done)


def model_is_due(flags: Flags, step: int, max_steps: int) -> bool:
    """Whether to save a model to use: at the interval itself, and at the end."""
    if step == max_steps:
        return True
    due = flags.saving_interval is not None and step % flags.saving_interval == 0
    return due and step >= flags.min_steps_for_save


# --------------------------------------------------------------------------------------------------
# What the run prints.


def describe_run(
    flags: Flags,
    *,
    engine: Engine,
    memory: MemoryPlan,
    prepared: PreparedRows,
    parameters: int,
    max_steps: int,
    rows_per_step: int,
    notes: list[str],
    validation: dict | None = None,
) -> None:
    """Print what the run is going to do, in derived numbers, and what there is to note of it."""
    data = prepared.report
    precision = str(DTYPES[flags.mixed_precision]).removeprefix("torch.")
    lines = [
        f"model    {flags.model_name_or_path}: {parameters:,} parameters, {precision}",
        f"engine   {engine}",
        f"memory   {memory}",
        f"pattern  {flags.attention_pattern}, anchors {prepared.anchor_placement}",
        f"data     {data['documents']:,} documents, {data['document_tokens']:,} tokens -> "
        f"{data['rows']:,} rows of {flags.seq_length:,} (+{data['anchors_added']:,} anchors, "
        f"+{data['pad_tokens']:,} padding, {data['skipped_documents']:,} bad documents skipped"
        + (f", {files:,} files broke off" if (files := data.get("skipped_files")) else "")
        + ")"
        + describe_held_out(prepared),
        *describe_special_tokens(data),
        *describe_sources(data["source_shares"]),
        *describe_validation(flags, validation),
        f"steps    {max_steps:,} × {rows_per_step} {'row' if rows_per_step == 1 else 'rows'} × "
        f"{flags.seq_length:,} tokens ({max_steps * rows_per_step / data['rows']:.2f} epochs)",
    ]
    print(colored("\n".join(lines), "green"), flush=True)
    if at_risk := without_checkpoints(flags, max_steps=max_steps):
        print(colored(f"safety   {at_risk}", "yellow"), flush=True)
    for note in notes:
        print(colored(note, "green"), flush=True)


def describe_held_out(prepared: PreparedRows) -> str:
    """What to say of documents that are kept out of training, behind the account of the data."""
    data = prepared.report
    if not data.get("held_out_documents"):
        return ""
    copies = data["held_out_copies"]
    return (
        f"; {data['held_out_documents']:,} documents, {data['held_out_tokens']:,} tokens held out "
        f"({prepared.directory / HELD_OUT})"
        + f", and {copies:,} that are equal to one of them"
        * (copies > 0)
    )


def describe_special_tokens(data: dict) -> list[str]:
    """A line where texts have special tokens written in them, as `<s>` in a page about HTML."""
    told = []
    if count := data.get("special_tokens_as_text"):
        told = [
            f"special  {count:,} special tokens written in texts are text (--parse_special_tokens)"
        ]
    if count := data.get("special_tokens_parsed"):
        told = [f"special  {count:,} special tokens written in texts were taken for the tokens"]
    return told


def describe_sources(shares: dict[str, dict[str, float]]) -> list[str]:
    """A line with each source's share of the tokens, as read and as laid; none for a single source."""
    largest = sorted(shares, key=lambda name: -shares[name]["after"])[:8]
    told = [f"{n} {shares[n]['before']:.1%} -> {shares[n]['after']:.1%}" for n in largest]
    more = [f"{len(shares) - 8:,} more"] * (len(shares) > 8)
    return [f"sources  {', '.join(told + more)}"] * (len(shares) > 1)


def describe_validation(flags: Flags, data: dict | None) -> list[str]:
    """A line with the data to validate on, and when; none without."""
    if data is None:
        return []
    every = f"every {flags.eval_every:,} steps and " if flags.eval_every else ""
    return [
        f"valid    {data['documents']:,} documents, {data['targets']:,} targets in {data['rows']:,} rows, "
        f"{every}at the end"
    ]


def without_checkpoints(flags: Flags, *, max_steps: int) -> str | None:
    """What it means that a long run saves no checkpoints on its way; None where it does, or is short."""
    if flags.checkpoint_every or flags.save_per_hours or max_steps < LONG_RUN_STEPS:
        return None
    return (
        "without --checkpoint_every or --save_per_hours a crash, a kill or a power cut loses all "
        f"{max_steps:,} steps; SIGTERM and SIGINT save a checkpoint"
    )


def slow_paths(
    flags: Flags, *, device: torch.device, kernel: str, memory: MemoryPlan, sharding: Sharding
) -> list[str]:
    """Which slower ways a run on a GPU takes, and what would spare them. On the CPU none is news."""
    if device.type != "cuda":
        return []
    found = []
    hint = None if flags.attn_kernel else faster_kernel_hint(device, kernel)
    if hint is not None:
        found.append(f"attention by {kernel}: {hint}")
    if flags.mixed_precision == "no":
        found.append("float32: --mixed_precision bf16 computes on the tensor cores")
    if flags.liger == "auto" and not memory.liger.value:
        found.append(f"without Liger's kernels: {memory.liger.reason}")
    last = memory.ladder[-1].treatment
    if last.checkpoint_every == 1:
        others = [rung.capacity for rung in memory.ladder[:-1]]
        where = f"forwards of more than {others[-1]:,} tokens" if others else "all forwards"
        found.append(
            f"{last} in {where}: more memory, more ranks for the sequence, or shorter documents spare it"
        )
    if sharding.offload_optimizer or sharding.offload_weights:
        what = "optimiser and weights" if sharding.offload_weights else "the optimiser"
        found.append(f"{what} in host memory (DeepSpeed's offload): more GPUs spare it")
    return found


def describe_first_step(batch: dict) -> None:
    """Print what a step looks like: how its rows were cut, and how evenly ranks share the work."""
    count, schedules = batch["micro_batches"], getattr(batch["layout"], "schedules", {})
    tqdm.write(
        f"work     the first step: {count} micro-batch{'es' * (count > 1)} a rank, the work that ranks wait "
        f"for {batch['work_imbalance']:.3f} of the mean"
    )
    for window, ring in schedules.items():
        where = "" if window is None else f", in layers with a window of {window:,} tokens"
        tqdm.write(f"ring     of its last micro-batch{where}: {ring}")


def bad_end(output: Path, progress: Progress, *, last_good: Path | None) -> str:
    """What to say of a run that ends in a series of steps without a finite gradient."""
    count, before = progress.bad_in_a_row, progress.step - progress.bad_in_a_row
    model = output / f"step-{before}"
    doubt = f"; {model} is in doubt, too" if model.exists() else ""
    broke = f"step {before} broke the" if before else "the model began with broken"
    return (
        f"the last {count} steps in a row had no finite gradient (--max_bad_steps), perhaps because {broke} "
        f"weights: no model is saved. Their rows are in {output / 'bad_steps.jsonl'}, "
        f"the last good checkpoint is {last_good or 'none'}{doubt}"
    )


# --------------------------------------------------------------------------------------------------
# `--plan_only`: the run as it would be.


def print_plan(
    flags: Flags,
    config: PretrainedConfig,
    grid: RankGrid,
    deepspeed_plugin: DeepSpeedPlugin,
    *,
    prepared: PreparedRows,
    views: dict[str, View],
    notes: list[str],
) -> None:
    """`--plan_only`: what the run prints until its first step, found without weights and without other ranks;
    then what it keeps in the host's memory, and its hours."""
    ranks = grid.data_degree * grid.sequence_degree
    device = torch.device("cuda" if flags.plan_gpu or torch.cuda.is_available() else "cpu")
    engine = planned_engine(flags, config, grid, device)
    check_rows(flags, engine, prepared)
    for rows, pattern in views.values():
        check_rows(flags, engine, rows, pattern=pattern)
    rows_per_step, max_steps = count_steps(flags, grid, prepared, Progress())
    model = weightless_model(
        flags.model_name_or_path,
        config=config,
        dtype=DTYPES[flags.mixed_precision],
        trust_remote_code=flags.trust_remote_code,
    )
    if (lora := lora_of(flags)) is not None:
        add_adapters(model, lora, seed=flags.seed)
        notes.append(describe_adapters(model, lora))
    host = free_memory(
        torch.device("cpu"), local_ranks=min(ranks, torch.cuda.device_count() or ranks)
    )
    memory = plan_memory(
        flags,
        model,
        prepared,
        grid,
        device=device,
        free_bytes=free_memory(device, memory_gib=flags.memory_gib, local_ranks=ranks),
        host_bytes=None if flags.plan_gpu else host,  # elsewhere there may be as much as it takes
        sharding=Sharding.of(deepspeed_plugin.deepspeed_config, ranks=ranks),
    )
    parameters = count_parameters(model)
    work = ModelWork.of(model)
    describe_run(
        flags,
        engine=engine,
        memory=memory,
        prepared=prepared,
        validation=views["packed"].rows.report if views else None,
        parameters=parameters,
        max_steps=max_steps,
        rows_per_step=rows_per_step,
        notes=notes,
    )
    batches = loader_of(
        flags,
        config,
        prepared,
        grid,
        micro_batch_tokens=memory.micro_batch_tokens,
        zero_stage=deepspeed_plugin.zero_stage,
        pair_price=work.pair_price,
    ).dataset
    *_, batch = one_step(iter(batches))
    describe_first_step(batch)
    if memory.host_bytes:
        print(f"host     {as_text(memory.host_bytes)} of its memory for each rank")
    tokens, pairs = batches.totals(max_steps)
    waiting = batch["work_imbalance"] * getattr(batch["layout"], "imbalance", 1.0)  # a ring's
    flops = work.flops(tokens=tokens, pairs=pairs)
    print(describe_hours(flags, device=device, ranks=ranks, waiting=waiting, flops=flops))


def planned_engine(
    flags: Flags, config: PretrainedConfig, grid: RankGrid, device: torch.device
) -> Engine:
    """The run's, as far as it is known without its GPU and its other ranks."""
    if flags.plan_gpu:
        where = f"the {flags.plan_gpu}"
        return engine_elsewhere(flags.attn_engine, kernel=flags.attn_kernel, grid=grid, where=where)
    alone = make_engine(
        flags.attn_engine,
        device=device,
        dtype=DTYPES[flags.mixed_precision],
        head_dim=attention_heads(config)["head_dim"],
        kernel=flags.attn_kernel,
        deterministic=flags.deterministic,
        softcap=softcap_of(config),
    )
    return replace(alone, grid=grid)


def describe_hours(
    flags: Flags, *, device: torch.device, ranks: int, waiting: float, flops: float
) -> str:
    """How long so many operations take, if ranks wait for each other by the factor `waiting`."""
    peak = PEAK_BF16_FLOPS[flags.plan_gpu] if flags.plan_gpu else peak_flops(device)
    if peak is None:
        return "hours    not known: no data sheet says what this machine computes (--plan_gpu)"
    gpu = flags.plan_gpu or torch.cuda.get_device_name(device)
    hours = flops * waiting / (ranks * EXPECTED_MFU * peak) / 3600
    return (
        f"hours    {hours:,.1f} for {flops:.2e} operations on {ranks} × {gpu}, at {EXPECTED_MFU:.0%} of "
        f"{peak / 1e12:,.0f} bfloat16 TFLOP/s each, waiting as in the first step"
    )


# --------------------------------------------------------------------------------------------------
# The start.


def parse_flags(arguments: list[str]) -> Flags:
    """Raises `ValueError` for an unknown flag, a missing one, or a value that is not among the choices."""
    parser = FlagParser(Flags, prog="python train.py", description=__doc__.splitlines()[0])
    (flags,) = parser.parse_args_into_dataclasses(arguments)
    return flags


def quiet_libraries() -> None:
    """Leave the terminal to the run: no notes of libraries about libraries."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed prints the memory at every parameter group of a bfloat16 optimiser.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # FlashAttention-4 hands its compiler an argument that is told in vain.
    warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)
    # Liger names, at every start, the back ends for other hardware and libraries that it passes over.
    logging.getLogger("liger_kernel.backends.registry").addFilter(
        lambda record: "could not be imported" not in record.msg
    )
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    keep_talking()
    with one_line_errors():
        main(parse_flags(sys.argv[1:]))
