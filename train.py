"""Train a Hugging Face LLaMA, Mistral or Qwen model on long rows of packed documents with AnchorAttention.

    python -m anchor_context.launch --config_file accelerate_configs/cpu.yaml --num_processes 2 train.py \\
        --model_name_or_path MODEL --dataset 'data/*.jsonl' --seq-length 4096 --output-dir output/run

Reads straight down: flags, checks, distributed, data, model, optimiser, resume, loop, save. What it computes
is in `anchor_context/attention/patterns.py`; follow a batch from `data/packing.py` over
`data/loader.py` and `models.py` to `loss.py`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from termcolor import colored
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)
from transformers.utils import logging as transformers_logging

from anchor_context.agreement import EXIT_TRY_AGAIN, PreemptionGuard, on_each_machine, on_one_rank
from anchor_context.attention.calls import sliding_window_of
from anchor_context.attention.patterns import PATTERNS, check_pattern
from anchor_context.checkpoint import (
    check_resume,
    disk_errors,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside_abandoned,
    state_of_checkpoint,
)
from anchor_context.command_line import FlagParser, model_errors, one_line_errors
from anchor_context.data.loader import check_same_stream, make_loader, stream_origin
from anchor_context.data.packing import PreparedRows, prepare_rows
from anchor_context.engine import Engine, default_anchor_placement, make_engine
from anchor_context.loss import CausalLMWithLoss, check_head
from anchor_context.memory import MemoryPlan, apply_memory_plan, choose_memory_plan
from anchor_context.metrics import (
    MetricsFile,
    ModelWork,
    StepProfiler,
    parse_profile_steps,
    peak_flops,
    peak_memory_bytes,
    plot_loss,
)
from anchor_context.models import check_scores, set_attention
from anchor_context.parallel.groups import RankGrid, make_grid, make_groups
from anchor_context.parallel.shard import check_row_length, shard_batch
from anchor_context.parallel.ulysses import check_heads
from anchor_context.rope.float32 import rotate_in_float32
from anchor_context.rope.scaling import apply_rope_settings
from anchor_context.summary import summary
from anchor_context.util import setup_debugpy

# --------------------------------------------------------------------------------------------------
# Flags. Dashes and underscores are the same: --seq-length and --seq_length.


@dataclass
class Flags:
    # Model
    model_name_or_path: str = field(
        metadata={"help": "a Hugging Face model: a folder, or a hub name"}
    )
    model_max_position_embeddings: int | None = field(
        default=None,
        metadata={
            "help": "context length to record in the model; default: its own, or the row length"
        },
    )
    rope_theta: float | None = field(
        default=None, metadata={"help": "RoPE base; default: the model's own"}
    )
    rope_scaling_type: Literal["default", "linear", "dynamic", "yarn", "llama3"] | None = field(
        default=None, metadata={"help": "RoPE scaling; default: the model's own"}
    )
    rope_scaling_factor: float | None = field(
        default=None, metadata={"help": "how far the scaling stretches"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run Python code that comes with the model"}
    )

    # Data
    dataset: str = field(
        default="",
        metadata={"help": "files, globs, folders, hub names or prepared rows, with commas between"},
    )
    data_format: Literal["raw_json", "tokenized"] = field(
        default="raw_json", metadata={"help": '{"text": …} lines, or pre-tokenised rows'}
    )
    seq_length: int = field(default=65536, metadata={"help": "tokens per row"})
    packing: Literal["concat", "best_fit"] = field(
        default="concat",
        metadata={"help": "fill rows in order, or cut only documents that must be"},
    )
    upsample_long: str | None = field(
        default=None, metadata={"help": "FACTOR@TOKENS: more of the long documents of each source"}
    )
    mixture: str | None = field(
        default=None, metadata={"help": "source=weight,…: shares of tokens"}
    )
    interleave_chunks: bool = field(
        default=False, metadata={"help": "shuffle the chunks of a row's documents (flex engine)"}
    )
    domain_tag: bool = field(
        default=False, metadata={"help": "the source's name as text before every document"}
    )
    text_column: str = field(default="text", metadata={"help": "the column of the text"})
    source_column: str | None = field(
        default=None, metadata={"help": "the column of the source's name"}
    )
    num_proc: int = field(default=1, metadata={"help": "processes that tokenise"})
    skip_bad_documents: bool = field(
        default=False, metadata={"help": "skip and count faulty documents"}
    )
    cache_dir: str = field(
        default="~/.cache/anchor_context", metadata={"help": "where prepared rows are kept"}
    )

    # Attention
    attention_pattern: Literal["anchor", "intra_doc", "intra_doc_reset", "full"] = field(
        default="anchor", metadata={"help": "who sees whom, see README"}
    )
    anchor_placement: Literal["auto", "per_document", "shared"] = field(
        default="auto", metadata={"help": "auto: what the engine computes best"}
    )
    attn_engine: Literal["flash", "flex"] = field(
        default="flash", metadata={"help": "what computes the pattern"}
    )
    attn_kernel: Literal["flash_attn", "torch_varlen", "torch_cpu"] | None = field(
        default=None,
        metadata={"help": "force a kernel of the flash engine; default: the fastest that runs"},
    )

    # Parallelism
    parallel_mode: Literal["data_parallel", "ulysses_attn", "ring_attn", "hybrid_attn"] = field(
        default="data_parallel", metadata={"help": "how ranks share the work"}
    )
    ulysses_degree: int | None = field(
        default=None, metadata={"help": "ranks that split the heads"}
    )
    ring_degree: int | None = field(default=None, metadata={"help": "ranks that split the row"})

    # Optimisation
    batch_size: int = field(default=1, metadata={"help": "rows in a micro-batch"})
    gradient_accumulate_every: int = field(default=1, metadata={"help": "micro-batches per step"})
    max_train_steps: int | None = field(
        default=None, metadata={"help": "optimiser steps; default: one epoch"}
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate"})
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata={"help": "after the warm-up; linear and cosine end at 0"}
    )
    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's, on matrices only"})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "clip the global gradient norm to this; 0: never"}
    )
    mixed_precision: Literal["no", "bf16"] = field(
        default="bf16", metadata={"help": "no: float32 throughout"}
    )
    rope_precision: Literal["model", "float32"] = field(
        default="model", metadata={"help": "float32: rotate in float32 and round once"}
    )
    gradient_checkpointing: Literal["auto", "none", "full", "offload"] = field(
        default="auto",
        metadata={"help": "recompute layers in backward; offload: keep their inputs in CPU memory"},
    )
    tiled_mlp: Literal["auto", "yes", "no"] = field(
        default="auto", metadata={"help": "compute MLPs a few thousand tokens at a time"}
    )
    liger: Literal["auto", "yes", "no"] = field(
        default="auto", metadata={"help": "Liger's RMSNorm, RoPE, SwiGLU and loss, on CUDA"}
    )
    seed: int = field(default=42, metadata={"help": "of the row order and of everything random"})

    # Output
    output_dir: str = field(
        default="output/run", metadata={"help": "everything that the run writes"}
    )
    resume: str = field(default="never", metadata={"help": "auto, never, or a checkpoint's path"})
    checkpoint_every: int | None = field(
        default=None, metadata={"help": "steps between checkpoints to resume from"}
    )
    save_per_hours: float | None = field(
        default=None, metadata={"help": "hours between checkpoints to resume from"}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "checkpoints to keep"})
    saving_interval: int | None = field(
        default=None, metadata={"help": "steps between models to use"}
    )
    min_steps_for_save: int = field(
        default=0, metadata={"help": "no model to use before this step"}
    )
    max_bad_steps: int = field(
        default=10, metadata={"help": "stop after so many steps in a row without a finite gradient"}
    )
    logging_steps: int = field(default=1, metadata={"help": "steps between lines of the log"})
    profile_steps: str | None = field(
        default=None, metadata={"help": "A:B, write a torch profiler trace of these steps"}
    )
    wandb: str | None = field(
        default=None, metadata={"help": "log to this Weights & Biases project"}
    )
    tensorboard: bool = field(
        default=False, metadata={"help": "log for TensorBoard in the output folder"}
    )


def main(flags: Flags) -> None:
    quiet_libraries()

    # ----------------------------------------------------------------------------------------------
    # Checks: everything that can be known before any heavy work.

    check_flags(flags)
    output = Path(flags.output_dir)
    check_resume(flags.resume)
    check_output_is_free(output, flags)
    grid = plan_grid(flags)
    check_row_length(flags.seq_length, grid)
    placement = flags.anchor_placement
    if placement == "auto" or flags.attention_pattern != "anchor":
        placement = default_anchor_placement(flags.attention_pattern, flags.attn_engine)
    check_pattern(flags.attention_pattern, placement)

    config, tokenizer = load_config_and_tokenizer(flags)
    check_model(config, flags, grid)
    apply_rope_settings(
        config,
        row_length=flags.seq_length,
        rope_theta=flags.rope_theta,
        rope_scaling_type=flags.rope_scaling_type,
        rope_scaling_factor=flags.rope_scaling_factor,
        model_max_position_embeddings=flags.model_max_position_embeddings,
    )
    check_rope(config, grid)
    trackers = check_trackers(flags)

    # ----------------------------------------------------------------------------------------------
    # Distributed: Accelerate starts DeepSpeed; the grid says which rank holds which part of a row.

    if not torch.cuda.is_available():
        # DeepSpeed would compile its shared-memory reductions, which nothing here uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = Accelerator(
        mixed_precision=flags.mixed_precision,
        gradient_accumulation_steps=flags.gradient_accumulate_every,
        log_with=trackers or None,
        project_dir=flags.output_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(
                # Named, because without a GPU Accelerate would take every rank for the only one.
                backend="nccl" if torch.cuda.is_available() else "gloo",
                timeout=timedelta(minutes=30),
            )
        ],
    )
    deepspeed_config = accelerator.state.deepspeed_plugin.deepspeed_config
    deepspeed_config["train_micro_batch_size_per_gpu"] = flags.batch_size
    deepspeed_config["gradient_clipping"] = flags.max_grad_norm
    device, rank, world_size = (
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
    )
    setup_debugpy(accelerator)
    set_seed(flags.seed)  # the same on every rank: the weights of a new model must agree

    ring_group, ulysses_group = make_groups(grid, rank=rank, world_size=world_size)
    dtype = torch.bfloat16 if flags.mixed_precision == "bf16" else torch.float32
    engine = make_engine(
        flags.attn_engine,
        device=device,
        dtype=dtype,
        kernel=flags.attn_kernel,
        grid=grid,
        ring_group=ring_group,
        ulysses_group=ulysses_group,
    )

    # ----------------------------------------------------------------------------------------------
    # Data: documents are packed into rows once; afterwards the rows are memory-mapped. A checkpoint to
    # resume from says how many of them are done, and so how many steps are left.

    prepare = partial(
        prepare_rows,
        flags.dataset,
        data_format=flags.data_format,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        row_length=flags.seq_length,
        anchor_placement=placement,
        cache_dir=Path(flags.cache_dir).expanduser(),
        skip_bad_documents=flags.skip_bad_documents,
        text_column=flags.text_column,
        source_column=flags.source_column,
        strategy=flags.packing,
        upsample_long=flags.upsample_long,
        mixture=flags.mixture,
        interleave_chunks=flags.interleave_chunks,
        domain_tag=flags.domain_tag,
        seed=flags.seed,
        num_proc=flags.num_proc,
    )
    # Where machines share the cache, one prepares and the others wait; then every rank opens it.
    on_each_machine(accelerator, prepare)
    prepared = prepare()
    check_chunks(flags, interleaved=prepared.interleaved)
    window = sliding_window_of(config)
    if window is not None:
        crosses = PATTERNS[flags.attention_pattern].crosses_documents
        longest = flags.seq_length if crosses else prepared.longest_document
        engine.check_window(window, pattern=flags.attention_pattern, longest=longest)
    checkpoint = on_one_rank(accelerator, partial(find_checkpoint, output, flags.resume))
    stream = stream_origin(prepared, seed=flags.seed)
    step = rows = tokens_seen = bad_steps = bad_in_a_row = 0
    if checkpoint is not None:
        state = state_of_checkpoint(checkpoint)
        check_same_stream(stream, state["stream"])
        step, rows, tokens_seen = state["steps"], state["rows"], state["tokens_seen"]
        bad_steps, bad_in_a_row = state["bad_steps"], state["bad_in_a_row"]
    rows_per_step = flags.batch_size * flags.gradient_accumulate_every * grid.data_degree
    steps_left = max(0, -(-(len(prepared) - rows) // rows_per_step))  # of one epoch
    max_steps = flags.max_train_steps or step + steps_left
    check_steps(flags, done=step, max_steps=max_steps)
    one_epoch = None if flags.max_train_steps else len(prepared)

    # ----------------------------------------------------------------------------------------------
    # Model: a Hugging Face model whose attention is the engine's, under a module that returns the loss.

    model = AutoModelForCausalLM.from_pretrained(
        flags.model_name_or_path,
        config=config,
        dtype=dtype,
        trust_remote_code=flags.trust_remote_code,
    )
    set_attention(model, engine.attend)
    memory = choose_memory_plan(
        model,
        device=device,
        row_tokens_per_rank=flags.batch_size * flags.seq_length // grid.sequence_degree,
        gradient_checkpointing=flags.gradient_checkpointing,
        tiled_mlp=flags.tiled_mlp,
        liger=flags.liger,
    )
    apply_memory_plan(model, memory)
    if flags.rope_precision == "float32":
        rotate_in_float32(model)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    work = ModelWork.of(config, parameters=parameters)
    model.train()

    # ----------------------------------------------------------------------------------------------
    # Optimiser: AdamW under DeepSpeed ZeRO.

    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay=flags.weight_decay),
        lr=flags.learning_rate,
        betas=(0.9, 0.95),
    )
    model = CausalLMWithLoss(model, fused=memory.liger)
    model, optimizer = accelerator.prepare(model, optimizer)
    check_rotary_precision(model)

    # ----------------------------------------------------------------------------------------------
    # Resume: the checkpoint restores weights, optimiser and random states. The schedule is a function of the
    # step, whatever the ranks.

    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint)
        on_one_rank(accelerator, partial(set_aside_abandoned, output, checkpoint))
        # A kill may have come between the checkpoint and the model of the same step.
        if model_is_due(flags, step, max_steps) and not (output / f"step-{step}").exists():
            save_model(accelerator, model, tokenizer, output / f"step-{step}", must=True)

    # The optimiser that steps: with offload it is DeepSpeed's CPU Adam.
    scheduler = make_schedule(flags, model.optimizer.optimizer, step=step, max_steps=max_steps)

    # ----------------------------------------------------------------------------------------------
    # The record of the run.

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        record_run(
            output, flags, engine=engine, memory=memory, prepared=prepared, placement=placement
        )
        metrics = MetricsFile(output / "metrics.jsonl", keep_steps=step)
        bad_record = MetricsFile(output / "bad_steps.jsonl", keep_steps=step)
        describe_run(flags, engine, memory, prepared, parameters, max_steps, rows_per_step)
        if checkpoint is not None:
            print(
                colored(f"resumed  {checkpoint}: {step} steps, {rows} rows done", "green"),
                flush=True,
            )
    if trackers:
        accelerator.init_trackers(flags.wandb or "anchor_context", config=asdict(flags))

    # ----------------------------------------------------------------------------------------------
    # The loop. A step's loss is the sum over all its targets on all ranks over their number. DeepSpeed
    # averages gradients over ranks, so each rank's sum is scaled by world_size / targets.

    loader = make_loader(
        prepared,
        pattern=flags.attention_pattern,
        seed=flags.seed,
        batch_size=flags.batch_size,
        accumulation=flags.gradient_accumulate_every,
        data_rank=grid.data_rank,
        data_degree=grid.data_degree,
        first_row=rows,
        total_rows=one_epoch,
        transform=partial(shard_batch, grid=grid),
        pin_memory=device.type == "cuda",
    )
    peak = peak_flops(device)
    profiler = StepProfiler(flags.profile_steps, output / "profile", rank=rank)
    progress = tqdm(
        total=max_steps,
        initial=step,
        desc="training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    unlogged: list[dict] = []  # steps whose tensors nobody has waited for yet
    window_start, data_wait = time.perf_counter(), 0.0
    last_checkpoint_time = time.monotonic()
    first_step, stopped = step, False

    with PreemptionGuard() as guard:
        batches = iter(loader)
        while step < max_steps and not stopped:
            profiler.before(step + 1)
            step_loss = torch.zeros((), dtype=torch.float64, device=device)
            for _ in range(flags.gradient_accumulate_every):
                waiting_since = time.perf_counter()
                batch = next(batches)
                data_wait += time.perf_counter() - waiting_since
                inputs = {
                    key: batch[key].to(device, non_blocking=True)
                    for key in ("input_ids", "position_ids", "labels", "layout")
                }
                with accelerator.accumulate(model):
                    loss_sum, _ = model(**inputs)
                    scale = world_size / max(1, batch["step_targets"])
                    # 0 × inf is NaN: a loss that is not finite has no finite gradient either.
                    scale = scale + 0 * loss_sum.detach()
                    # At the step's last micro-batch this also reduces, clips and updates.
                    accelerator.backward(loss_sum * scale, scale_wrt_gas=False)
                step_loss += loss_sum.detach()
            ring_plan = batch["layout"].schedule if grid.ring_degree > 1 else None
            if ring_plan is not None and step == first_step and accelerator.is_main_process:
                tqdm.write(f"ring     of the first rows: {ring_plan}")
            learning_rate = scheduler.get_last_lr()[0]
            scheduler.step()
            step += 1
            rows += rows_per_step
            if one_epoch is not None:  # the last step may have been filled up with blank rows
                rows = min(rows, one_epoch)
            tokens_seen += batch["step_tokens"]
            profiler.after(step, final=step == max_steps)
            unlogged.append(
                {
                    "step": step,
                    "loss": step_loss,
                    "learning_rate": learning_rate,
                    "grad_norm": model.get_global_grad_norm(),
                    "target_tokens": batch["step_targets"],
                    "tokens_seen": tokens_seen,
                    "tokens": batch["step_tokens"],
                    "pairs": batch["step_pairs"],
                    "comm_bytes": engine.account.take(),
                    "ring_imbalance": None if ring_plan is None else ring_plan.imbalance,
                }
            )
            progress.update()

            # DeepSpeed computes the norm over all ranks, and updates nothing where it is not finite.
            bad_in_a_row = bad_in_a_row + 1 if optimizer.step_was_skipped else 0
            if bad_in_a_row:
                bad_steps += 1
                if accelerator.is_main_process:
                    bad_record.append({"step": step, "rows": batch["step_rows"]})
                    tqdm.write(
                        colored(f"step {step} skipped: its gradient is not finite", "yellow")
                    )
            too_bad = bad_in_a_row >= flags.max_bad_steps

            stopped = guard.requested() or too_bad
            hours = (time.monotonic() - last_checkpoint_time) / 3600
            checkpoint_due = not too_bad and (
                stopped
                or (flags.checkpoint_every is not None and step % flags.checkpoint_every == 0)
                or (
                    flags.save_per_hours is not None
                    and guard.main_decides(hours >= flags.save_per_hours)
                )
            )

            # Saving a model or a checkpoint is no part of a step's time: what came before is logged first.
            saving = checkpoint_due or model_is_due(flags, step, max_steps)
            if step % flags.logging_steps == 0 or stopped or saving:
                # The loop's own only wait for the device. ZeRO-3 waits too: behind its queued gathers and
                # reductions, at the end of every backward, and for the norm in every update; Liger's loss
                # does twice per micro-batch (`loss.py`), RoPE of the type dynamic in every forward.
                losses = accelerator.reduce(
                    torch.stack([s["loss"] for s in unlogged]), "sum"
                ).tolist()
                now = time.perf_counter()
                step_seconds = (now - window_start) / len(unlogged)
                wait_share = data_wait / (now - window_start)
                window_start, data_wait = now, 0.0
                for entry, loss in zip(unlogged, losses, strict=True):
                    record = finish_record(
                        entry,
                        loss=loss,
                        step_seconds=step_seconds,
                        data_wait_share=wait_share,
                        work=work,
                        full_pairs=rows_per_step * flags.seq_length * (flags.seq_length + 1) // 2,
                        peak=None if peak is None else peak * world_size,
                        device=device,
                    )
                    if accelerator.is_main_process:
                        metrics.append(record)
                    numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
                    accelerator.log(numbers, step=record["step"])
                unlogged.clear()
                progress.set_postfix_str(describe_step(record))

            if checkpoint_due:
                state = {
                    "tokens_seen": tokens_seen,
                    "bad_steps": bad_steps,
                    "bad_in_a_row": bad_in_a_row,
                    "stream": stream,
                }
                saved = save_checkpoint(
                    accelerator,
                    output,
                    steps=step,
                    rows=rows,
                    state=state,
                    keep=flags.keep_checkpoints,
                )
                checkpoint = saved or checkpoint
                last_checkpoint_time = time.monotonic()
                window_start = time.perf_counter()  # saving is not training
            if model_is_due(flags, step, max_steps) and not too_bad:
                save_model(
                    accelerator, model, tokenizer, output / f"step-{step}", must=step == max_steps
                )
                window_start = time.perf_counter()

    # ----------------------------------------------------------------------------------------------
    # The end.

    progress.close()
    if accelerator.is_main_process:
        plot_loss(output / "metrics.jsonl", output / "loss.png")
        if step == max_steps:
            print(summary(output), flush=True)
    for (
        tracker
    ) in accelerator.trackers:  # on the main rank they upload: the others must not leave before
        tracker.finish()
    accelerator.trackers.clear()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if bad_in_a_row >= flags.max_bad_steps:
        raise RuntimeError(
            f"{bad_in_a_row} steps in a row had no finite gradient (--max_bad_steps); their rows are in "
            f"{output / 'bad_steps.jsonl'}, the last good checkpoint is {checkpoint or 'none'}"
        )
    if stopped and step < max_steps:
        sys.exit(EXIT_TRY_AGAIN)


# --------------------------------------------------------------------------------------------------
# The parts, in the order of their use.


def quiet_libraries() -> None:
    """Leave the terminal to the run: no notes of libraries about libraries."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()


def check_flags(flags: Flags) -> None:
    """Raise `ValueError` for a flag's value, or a combination, that cannot work."""
    if not flags.dataset:
        raise ValueError("--dataset is missing: name files, globs or folders of JSON lines")
    counts = ("seq_length", "batch_size", "gradient_accumulate_every", "logging_steps", "num_proc")
    for name in (*counts, "keep_checkpoints", "max_bad_steps"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name} {getattr(flags, name)} must be at least 1")
    if flags.seq_length < 2:
        raise ValueError(
            f"--seq-length {flags.seq_length} must be at least 2: an anchor and a token"
        )
    for name in ("max_train_steps", "saving_interval", "checkpoint_every", "save_per_hours"):
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
    if flags.max_train_steps is not None:
        check_steps(flags, done=0, max_steps=flags.max_train_steps)
    if flags.attn_kernel is not None and flags.attn_engine != "flash":
        raise ValueError(f"--attn_kernel {flags.attn_kernel} belongs to --attn_engine flash")
    if flags.profile_steps is not None:
        parse_profile_steps(flags.profile_steps)
    check_chunks(flags, interleaved=flags.interleave_chunks)
    if flags.attn_engine == "flex" and flags.parallel_mode in ("ring_attn", "hybrid_attn"):
        raise ValueError(
            f"--attn_engine flex does not run under --parallel_mode {flags.parallel_mode}; "
            "use --parallel_mode ulysses_attn, or --attn_engine flash"
        )
    if flags.attn_engine == "flash" and flags.anchor_placement == "shared":
        raise ValueError("--anchor_placement shared needs --attn_engine flex")


def check_steps(flags: Flags, *, done: int, max_steps: int) -> None:
    """Raise `ValueError` unless `max_steps` leave room for the warm-up, and for the steps already `done`."""
    if flags.warmup_steps > max_steps:
        raise ValueError(
            f"--warmup_steps {flags.warmup_steps} is more than the {max_steps} steps of the run "
            "(--max-train-steps, or one epoch)"
        )
    if done > max_steps:
        raise ValueError(
            f"--max-train-steps {max_steps}: the run to resume is at step {done} already; ask for more"
        )


def check_chunks(flags: Flags, *, interleaved: bool) -> None:
    """Raise `ValueError` if rows hold documents in several pieces and the engine reads boundaries only."""
    if interleaved and flags.attn_engine == "flash":
        raise ValueError(
            "--interleave_chunks (given, or the rows were prepared with it) needs --attn_engine flex: "
            "documents lie in several pieces"
        )


def check_output_is_free(output: Path, flags: Flags) -> None:
    """Raise `ValueError` if another run lies in the output folder and nobody asked to continue it.

    A run with models but no checkpoint cannot be continued, and to start over would overwrite it.
    """
    models = sorted(path.name for path in output.glob("step-*"))
    has_checkpoint = any(output.glob("checkpoints/checkpoint_*"))
    if flags.resume == "auto":
        if models and not has_checkpoint:
            raise ValueError(
                f"--resume auto: {output} has models ({', '.join(models)}) but no checkpoint to continue "
                "from; name another --output-dir, and pass --checkpoint_every to be able to continue that one"
            )
        return
    named = flags.resume != "never"
    if named and Path(flags.resume).resolve().is_relative_to((output / "checkpoints").resolve()):
        return
    records = [n for n in ("args.json", "metrics.jsonl", "checkpoints") if (output / n).exists()]
    if found := records + models:
        whose = f" than that of --resume {flags.resume}" if named else ""
        continue_it = ", or pass --resume auto to continue it" if has_checkpoint else ""
        raise ValueError(
            f"--output-dir {output} holds another run{whose} ({', '.join(found)}); "
            f"name another folder{continue_it}"
        )


def load_config_and_tokenizer(flags: Flags) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Of the model to train. Raises `ValueError` where there are none."""
    name = flags.model_name_or_path
    with model_errors(name, "--model_name_or_path"):
        return (
            AutoConfig.from_pretrained(name, trust_remote_code=flags.trust_remote_code),
            AutoTokenizer.from_pretrained(name, trust_remote_code=flags.trust_remote_code),
        )


def check_trackers(flags: Flags) -> list[str]:
    """Accelerate's names of the trackers asked for. It would leave out in silence what is not installed."""
    if flags.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs the package: pip install wandb, or use --tensorboard")
    return ["wandb"] * (flags.wandb is not None) + ["tensorboard"] * flags.tensorboard


def plan_grid(flags: Flags) -> RankGrid:
    """This rank's place: data × ring × Ulysses, from the flags and the launcher's ranks."""
    if "WORLD_SIZE" not in os.environ or os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        raise ValueError(
            "train.py runs under Accelerate with DeepSpeed: python -m anchor_context.launch "
            "--config_file accelerate_configs/cpu.yaml --num_processes 1 train.py …"
        )
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    ring, ulysses = flags.ring_degree, flags.ulysses_degree
    allowed = {
        "data_parallel": (),
        "ulysses_attn": ("ulysses_degree",),
        "ring_attn": ("ring_degree",),
        "hybrid_attn": ("ulysses_degree", "ring_degree"),
    }[flags.parallel_mode]
    for name in ("ulysses_degree", "ring_degree"):
        if getattr(flags, name) is not None and name not in allowed:
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


def check_model(config: PretrainedConfig, flags: Flags, grid: RankGrid) -> None:
    """Raise `ValueError` for a model that the flags cannot train."""
    check_scores(config)
    check_head(config)
    if getattr(config, "attention_dropout", 0):
        raise ValueError(
            f"the model's attention_dropout={config.attention_dropout} is not computed by the engines: "
            "set it to 0 in its config.json"
        )
    if grid.ulysses_degree > 1:
        check_heads(config.num_attention_heads, grid.ulysses_degree)
    window = sliding_window_of(config)
    hidden = window is not None and window < flags.seq_length
    if hidden and flags.attn_engine == "flash" and flags.attention_pattern == "anchor":
        raise ValueError(
            f"the model's sliding_window={window} would hide the anchor from tokens further than that "
            "into a document: use --attn_engine flex (not with a ring), or set sliding_window to null in its "
            "config.json"
        )


def check_rope(config: PretrainedConfig, grid: RankGrid) -> None:
    """Raise `ValueError` where ranks would rotate the same token differently."""
    if config.rope_parameters.get("rope_type") == "dynamic" and grid.sequence_degree > 1:
        raise ValueError(
            "RoPE of the type dynamic takes its frequencies from the positions that a rank holds, and the "
            f"{grid.sequence_degree} ranks that share a row hold different ones: use --rope_scaling_type "
            "yarn or linear, or --parallel_mode data_parallel"
        )


def check_rotary_precision(model: torch.nn.Module) -> None:
    """RoPE's frequencies must be float32 whatever the weights are: rounding them to bfloat16 turns far
    positions by many radians (arXiv 2411.13476). DeepSpeed before 0.19.2 did round them."""
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq"):
            continue
        if buffer.dtype != torch.float32:
            raise RuntimeError(f"{name} is {buffer.dtype}, not float32, after accelerator.prepare")
        if len(buffer) > 1 and buffer.equal(buffer.bfloat16().float()):
            raise RuntimeError(f"{name} was rounded to bfloat16 on the way, and cast back")


def parameter_groups(model: torch.nn.Module, *, weight_decay: float) -> list[dict]:
    """Matrices decay, vectors (norms and biases) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    is_matrix = [len(getattr(p, "ds_shape", p.shape)) > 1 for p in parameters]
    matrices = [p for p, matrix in zip(parameters, is_matrix, strict=True) if matrix]
    vectors = [p for p, matrix in zip(parameters, is_matrix, strict=True) if not matrix]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def make_schedule(
    flags: Flags, optimizer: torch.optim.Optimizer, *, step: int, max_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate after `step` steps of `max_steps`, by the flags alone."""
    for group in optimizer.param_groups:  # a checkpoint brought the rate of its last step
        group["lr"] = group["initial_lr"] = flags.learning_rate
    warmup = {"num_warmup_steps": flags.warmup_steps, "last_epoch": step - 1}
    if flags.lr_scheduler_type == "constant":
        return get_constant_schedule_with_warmup(optimizer, **warmup)
    schedules = {
        "linear": get_linear_schedule_with_warmup,
        "cosine": get_cosine_schedule_with_warmup,
    }
    make = schedules[flags.lr_scheduler_type]
    return make(optimizer, num_training_steps=max_steps, **warmup)


def record_run(
    output: Path,
    flags: Flags,
    *,
    engine: Engine,
    memory: MemoryPlan,
    prepared: PreparedRows,
    placement: str,
) -> None:
    """Write `args.json`: all that one needs to know to repeat the run."""
    packages = ("torch", "transformers", "accelerate", "deepspeed", "yunchang", "datasets")
    record = {
        "flags": asdict(flags) | {"anchor_placement": placement},
        "engine": engine.name,
        "kernel": engine.kernel,
        "kernel_reason": engine.reason,
        "layout": engine.layout,
        "memory": asdict(memory),
        "data": prepared.report,
        "versions": {name: metadata.version(name) for name in packages},
        "git_commit": git_commit(),
    }
    (output / "args.json").write_text(json.dumps(record, indent=2) + "\n")


def git_commit() -> str | None:
    """Of this checkout; None without git or outside a checkout."""
    if shutil.which("git") is None:
        return None
    command = ["git", "rev-parse", "HEAD"]
    asked = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return asked.stdout.strip() or None


def describe_run(
    flags: Flags,
    engine: Engine,
    memory: MemoryPlan,
    prepared: PreparedRows,
    parameters: int,
    max_steps: int,
    rows_per_step: int,
) -> None:
    """Print what the run is going to do, in derived numbers."""
    data = prepared.report
    precision = {"no": "float32", "bf16": "bfloat16"}[flags.mixed_precision]
    lines = [
        f"model    {flags.model_name_or_path}: {parameters:,} parameters, {precision}",
        f"engine   {engine}",
        f"memory   {memory}",
        f"pattern  {flags.attention_pattern}, anchors {prepared.anchor_placement}",
        f"data     {data['documents']:,} documents, {data['document_tokens']:,} tokens -> "
        f"{data['rows']:,} rows of {flags.seq_length:,} (+{data['anchors_added']:,} anchors, "
        f"+{data['pad_tokens']:,} padding, {data['skipped_documents']:,} bad documents skipped)",
        *describe_sources(data["source_shares"]),
        f"steps    {max_steps:,} of {rows_per_step} rows, "
        f"{rows_per_step * flags.seq_length:,} tokens each "
        f"({max_steps * rows_per_step / data['rows']:.2f} epochs)",
    ]
    print(colored("\n".join(lines), "green"), flush=True)


def describe_sources(shares: dict[str, dict[str, float]]) -> list[str]:
    """A line with each source's share of the tokens, as read and as laid; none for a single source."""
    largest = sorted(shares, key=lambda name: -shares[name]["after"])[:8]
    told = [f"{n} {shares[n]['before']:.1%} -> {shares[n]['after']:.1%}" for n in largest]
    more = [f"{len(shares) - 8:,} more"] * (len(shares) > 8)
    return [f"sources  {', '.join(told + more)}"] * (len(shares) > 1)


def finish_record(
    entry: dict,
    *,
    loss: float,
    step_seconds: float,
    data_wait_share: float,
    work: ModelWork,
    full_pairs: int,
    peak: float | None,
    device: torch.device,
) -> dict:
    """One line of `metrics.jsonl`; a figure that is not finite, or not known, is null.

    Args:
        loss: the sum over the step's targets on all ranks.
        full_pairs: the attention pairs of the step's rows if every token saw all before it.
        peak: bfloat16 operations per second of all GPUs together.
    """
    entry = dict(entry)
    tokens, pairs = entry.pop("tokens"), entry.pop("pairs")
    mean_loss, norm = loss / max(1, entry["target_tokens"]), float(entry["grad_norm"])
    mfu = mfu_if_full = None
    if peak is not None:
        mfu = work.flops(tokens=tokens, pairs=pairs) / (peak * step_seconds)
        mfu_if_full = work.flops(tokens=tokens, pairs=full_pairs) / (peak * step_seconds)
    return entry | {
        "loss": mean_loss if math.isfinite(mean_loss) else None,
        "grad_norm": norm if math.isfinite(norm) else None,
        "step_seconds": step_seconds,
        "tokens_per_second": tokens / step_seconds,
        "peak_memory_bytes": peak_memory_bytes(device),
        "mfu": mfu,
        "mfu_if_full_causal": mfu_if_full,
        "data_wait_share": data_wait_share,
    }


def describe_step(record: dict) -> str:
    """What the progress bar shows."""
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
    mfu = "" if record["mfu"] is None else f", MFU {record['mfu']:.1%}"
    return (
        f"loss {loss}, lr {record['learning_rate']:.2e}, {record['tokens_per_second']:,.0f} tokens/s{mfu}, "
        f"{record['peak_memory_bytes'] / 2**30:.1f} GiB, data wait {record['data_wait_share']:.0%}"
    )


def model_is_due(flags: Flags, step: int, max_steps: int) -> bool:
    """Whether to save a model to use: at the interval itself, and at the end."""
    if step == max_steps:
        return True
    due = flags.saving_interval is not None and step % flags.saving_interval == 0
    return due and step >= flags.min_steps_for_save


def save_model(
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    must: bool,
) -> None:
    """Write a plain Hugging Face model and tokenizer. Collective: ZeRO-3 gathers the weights.

    Where the disk refuses, training goes on with a message, unless the model `must` be saved.
    """
    weights = accelerator.get_state_dict(model)  # None off the main process

    def write() -> None:
        unfinished = folder.with_name(f".unfinished-{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        plain = {name.removeprefix("model."): weight for name, weight in weights.items()}
        try:
            with disk_errors(unfinished):
                accelerator.unwrap_model(model).model.save_pretrained(unfinished, state_dict=plain)
                tokenizer.save_pretrained(unfinished)
            if folder.exists():  # from before a resume
                shutil.rmtree(folder)
            unfinished.rename(folder)
        finally:  # half a model would only keep the disk full
            shutil.rmtree(unfinished, ignore_errors=True)

    try:
        on_one_rank(accelerator, write)
    except OSError as error:
        if must:
            raise
        if accelerator.is_main_process:
            tqdm.write(
                colored(
                    f"the model of {folder.name} was not saved: {error}; training goes on", "red"
                )
            )


# --------------------------------------------------------------------------------------------------
# The command line.


def parse_flags(arguments: list[str]) -> Flags:
    """Raises `ValueError` for an unknown flag, a missing one, or a value that is not among the choices."""
    parser = FlagParser(Flags, prog="python train.py", description=__doc__.splitlines()[0])
    (flags,) = parser.parse_args_into_dataclasses(arguments)
    return flags


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(sys.argv[1:]))
