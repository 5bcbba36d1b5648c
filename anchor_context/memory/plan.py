"""The memory plan: how many tokens a forward sees, and what is recomputed, tiled or offloaded in which one.

A forward sees a micro-batch: whole units of at most so many tokens, or one longer unit alone. The plan is a
ladder of treatments, from the fastest, each with the tokens that fit with it (`estimate.py` counts):

    nothing recomputed              up to  50,432 tokens      most micro-batches
    every 4th layer recomputed      up to  65,536
    …
    every layer recomputed          up to 403,456             the one with the longest document

Guarantees: a pure function of its arguments, so that ranks which were given the same numbers (the smallest
free memory of all) find the same plan. A micro-batch is treated by the number of tokens that is handed over,
the most of any rank, so all ranks treat it alike. Flags are honoured; what cannot work, or cannot fit, is an
error that says what would.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import psutil
import torch
from transformers import PreTrainedModel

from anchor_context.memory.estimate import (
    UNSHARDED,
    ModelSizes,
    Peak,
    Setup,
    Sharding,
    as_text,
    bytes_on_host,
    expected_peak,
)
from anchor_context.memory.liger import NOT_INSTALLED, apply_liger, why_no_liger
from anchor_context.memory.treatments import TreatedModel, Treatment, is_swiglu_mlp

USABLE = 0.9
"""Of the free memory: the rest is for what no tensor of ours holds, such as NCCL's buffers and the gaps
between blocks of the allocator. Where the model alone takes nearly all, half of what it leaves."""
SAME = 1.02
"""A resumed run finds the same memory a little larger or smaller: up to so much over what is usable now, it
keeps its plan."""
GRAIN = 256
"""Tokens: capacities are multiples of it."""
ENOUGH = 8_192
"""Tokens per rank in a forward that keep a GPU busy, and make up for ZeRO-3's gathering of all weights. To
have so many, layers are recomputed; to have more, they are not: a step of 131,072 tokens of a 1B model
took 2.2 s in four forwards with nothing recomputed, 2.7 s in one that recomputes (H100, bfloat16)."""


CHECKPOINTING = ("auto", "none", "full", "offload")
SWITCH = ("auto", "yes", "no")
"""What the flags may be: `--gradient_checkpointing`, and the others."""


@dataclass(frozen=True)
class Choice:
    """A setting, and why."""

    value: Any
    reason: str

    def __str__(self) -> str:
        value = self.value
        if isinstance(value, bool):
            value = "yes" if value else "no"
        return f"{value} ({self.reason})"


@dataclass(frozen=True)
class Rung:
    """A rung of the ladder: a treatment, and how far it goes."""

    treatment: Treatment
    capacity: int
    """The most tokens per rank that fit with it."""
    peak: Peak
    """What a rank is expected to hold with as many tokens, or as the longest forward has if that is less."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a run's forwards fit into memory. `asdict` and `from_record` are inverse, through JSON too."""

    micro_batch: Choice
    """Tokens per rank that a forward sees at most; a longer unit is a forward by itself."""
    gradient_checkpointing: Choice
    """"auto", "none", "full" or "offload": what the ladder may recompute."""
    tiled_mlp: Choice
    """"auto", "yes" or "no": whether the ladder has tiles."""
    liger: Choice
    """Whether Liger's RMSNorm, RoPE, SwiGLU and loss are used."""
    ladder: tuple[Rung, ...]
    """From the fastest treatment; each next one takes more tokens."""
    most_tokens: int
    """The longest forward, in tokens per rank."""
    usable_bytes: int
    """What the plan was made for."""
    made_for: dict[str, Any]
    """All else that it follows from: with the same, a resumed run keeps its plan."""

    @property
    def micro_batch_tokens(self) -> int:
        return self.micro_batch.value

    @property
    def peak(self) -> Peak:
        """What a rank is expected to hold at most, and when."""
        return max((rung.peak for rung in self.ladder), key=lambda peak: peak.total)

    @property
    def host_bytes(self) -> int:
        """What a rank keeps at most in the host's memory, for what is offloaded."""
        setup = self.made_for["setup"]
        sizes, sharding = ModelSizes(**setup["sizes"]), Sharding(**setup["sharding"])
        setup = Setup(**setup | {"sizes": sizes, "sharding": sharding})
        return max(
            bytes_on_host(setup, rung.treatment, min(rung.capacity, self.most_tokens))
            for rung in self.ladder
        )

    def treatment(self, tokens: int) -> Treatment:
        """Of a micro-batch of which no rank holds more than `tokens` tokens."""
        fitting = (rung.treatment for rung in self.ladder if tokens <= rung.capacity)
        return next(fitting, self.ladder[-1].treatment)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> MemoryPlan:
        """From what `asdict` made of it."""
        choices = ("micro_batch", "gradient_checkpointing", "tiled_mlp", "liger")
        ladder = tuple(
            Rung(Treatment(**rung["treatment"]), rung["capacity"], Peak(**rung["peak"]))
            for rung in record["ladder"]
        )
        restored = {name: Choice(**record[name]) for name in choices} | {"ladder": ladder}
        return cls(**record | restored)

    def beside(self, measured: int) -> str:
        """The expected peak beside the bytes that were measured, for people."""
        return (
            f"expected peak {as_text(self.peak.total)}, {as_text(measured)} measured: "
            f"{self.peak.total / measured:.2f} times"
        )

    def __str__(self) -> str:
        """For people: the ladder as a table, what is held at the peak, and the other choices."""
        return "\n".join(
            [
                f"forwards of up to {self.micro_batch_tokens:,} tokens per rank "
                f"({self.micro_batch.reason}), the longest {self.most_tokens:,}",
                *(
                    f"  {rung.treatment!s:<64} up to {min(rung.capacity, self.most_tokens):>9,} tokens, "
                    f"{as_text(rung.peak.total)}"
                    for rung in self.ladder
                ),
                f"  of {as_text(self.usable_bytes)} expected at most {self.peak}",
                f"  checkpointing {self.gradient_checkpointing}, tiled MLP {self.tiled_mlp}, "
                f"Liger {self.liger}",
            ]
        )


# --- choosing -------------------------------------------------------------------------------------


def parse_micro_batch_tokens(value: str) -> int | str:
    """`--micro_batch_tokens`: "auto", "row", or a number of tokens.

    Raises:
        ValueError: it is something else.
    """
    if value in ("auto", "row"):
        return value
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(
            f"--micro_batch_tokens {value} must be a number of tokens, at least 1; or auto; or row, for "
            "whole rows"
        )
    return int(value)


def choose_memory_plan(
    model: PreTrainedModel,
    *,
    device: torch.device,
    free_bytes: int,
    row_tokens: int,
    longest_unit: int,
    host_bytes: int | None = None,
    sharding: Sharding = UNSHARDED,
    ring_degree: int = 1,
    ulysses_degree: int = 1,
    dense_mask: bool = False,
    hidden_anchors: bool = False,
    micro_batch_tokens: int | Literal["auto", "row"] = "auto",
    gradient_checkpointing: Literal["auto", "none", "full", "offload"] = "auto",
    tiled_mlp: Literal["auto", "yes", "no"] = "auto",
    liger: Literal["auto", "yes", "no"] = "auto",
) -> MemoryPlan:
    """The fastest plan that fits.

    Args:
        free_bytes: what a rank may use, its model included: the smallest of all ranks (`free_memory`).
        row_tokens: tokens per rank of the rows of one batch, in one forward: no micro-batch need be larger.
        longest_unit: tokens per rank of the longest unit, which is never cut.
        host_bytes: what a rank may use of the host's memory, for what is offloaded; None: what it takes.
        dense_mask: whether attention reads a (tokens × tokens) mask: the flex engine on the CPU.
        hidden_anchors: whether a window hides anchors from the flash engine's kernel.

    Raises:
        ValueError: a flag's value that cannot work with this model on this device, or no plan fits.
    """
    checkpointing = _choose_checkpointing(gradient_checkpointing, model, device)
    tiles = _choose_tiles(tiled_mlp, model)
    use_liger = _choose_liger(liger, model, device)
    setup = Setup(
        sizes=ModelSizes.of(model),
        element_bytes=model.dtype.itemsize,
        device=device.type,
        liger=use_liger.value,
        dense_mask=dense_mask,
        hidden_anchors=hidden_anchors,
        sharding=sharding,
        ring_degree=ring_degree,
        ulysses_degree=ulysses_degree,
    )
    too_much_for_host = _too_much_for_host(
        setup, row_tokens if micro_batch_tokens == "row" else longest_unit, host_bytes=host_bytes
    )
    if checkpointing.value == "offload" and too_much_for_host:
        raise ValueError(
            f"--gradient_checkpointing offload cannot work here: {too_much_for_host}; use auto"
        )
    can_offload = device.type == "cuda" and not too_much_for_host
    treatments = _treatments(checkpointing.value, tiles.value, can_offload=can_offload)
    # Whatever is done: what the leanest treatment holds with the fewest tokens.
    least = expected_peak(setup, treatments[-1], GRAIN).total
    usable = max(int(USABLE * free_bytes), (least + free_bytes) // 2)
    capacities = _capacities(setup, treatments, usable=usable)
    micro_batch = _choose_micro_batch(micro_batch_tokens, capacities, row_tokens=row_tokens)
    most_tokens = micro_batch.value
    if micro_batch_tokens != "row":
        most_tokens = max(most_tokens, longest_unit)
    ladder = _ladder(setup, capacities, most_tokens=most_tokens)
    asked = {
        "row_tokens": row_tokens,
        "longest_unit": longest_unit,
        "micro_batch_tokens": micro_batch_tokens,
        "gradient_checkpointing": gradient_checkpointing,
        "tiled_mlp": tiled_mlp,
        "liger": liger,
    }
    if ladder[-1].peak.total > free_bytes:
        leanest = ladder[-1].peak
        raise ValueError(
            _does_not_fit(setup, leanest, most_tokens, free_bytes=free_bytes, asked=asked)
        )
    return MemoryPlan(
        micro_batch=micro_batch,
        gradient_checkpointing=checkpointing,
        tiled_mlp=tiles,
        liger=use_liger,
        ladder=ladder,
        most_tokens=most_tokens,
        usable_bytes=usable,
        made_for={"setup": asdict(setup)} | asked,
    )


def keep_recorded(plan: MemoryPlan, record: dict[str, Any] | None) -> tuple[MemoryPlan, str | None]:
    """The plan of the run that is resumed, if it was made for the same; else the new one, and a word why.

    Args:
        record: the earlier run's `asdict(plan)`, or None if there is none.
    """
    if record is None:
        return plan, None
    made_for = record.get("made_for", {})  # not there in plans of older versions
    changed = [key for key, value in plan.made_for.items() if made_for.get(key) != value]
    if changed:
        return plan, f"a new memory plan: {', '.join(changed)} changed since the checkpoint"
    before = MemoryPlan.from_record(record)
    if before.peak.total > SAME * plan.usable_bytes:
        return plan, "a new memory plan: there is less free memory than before"
    return before, None


def _choose_checkpointing(asked: str, model: PreTrainedModel, device: torch.device) -> Choice:
    if not model.supports_gradient_checkpointing:
        why_not = f"transformers cannot checkpoint {model.config.model_type}"
        if asked in ("full", "offload"):
            raise ValueError(
                f"--gradient_checkpointing {asked} cannot work here: {why_not}; use auto"
            )
        return Choice("none", why_not)
    if asked == "offload" and device.type != "cuda":
        return Choice(
            "full", f"offload asked for; on the {device.type} there is nowhere else to keep them"
        )
    return Choice(asked, "as far as needed" if asked == "auto" else "--gradient_checkpointing")


def _choose_tiles(asked: str, model: PreTrainedModel) -> Choice:
    if asked == "no" or any(map(is_swiglu_mlp, model.modules())):
        return Choice(asked, "where needed" if asked == "auto" else "--tiled_mlp")
    why_not = (
        f"{model.config.model_type} has no MLP with gate_proj, up_proj and down_proj, as LLaMA, Mistral "
        "and Qwen have"
    )
    if asked == "yes":
        raise ValueError(f"--tiled_mlp yes cannot work here: {why_not}; use --tiled_mlp auto")
    return Choice("no", why_not)


def _choose_liger(asked: str, model: PreTrainedModel, device: torch.device) -> Choice:
    if asked == "no":
        return Choice(False, "--liger")
    why_not = why_no_liger(model, device)
    if why_not == NOT_INSTALLED and asked == "yes" and not torch.cuda.is_available():
        return Choice(True, "--liger, for a GPU elsewhere")  # --plan_only: there it is installed
    if why_not and asked == "yes":
        raise ValueError(f"--liger yes cannot work here: {why_not}; use --liger auto")
    if why_not:
        return Choice(False, why_not)
    return Choice(True, "--liger" if asked == "yes" else f"{device.type}, and installed")


def _treatments(checkpointing: str, tiles: str, *, can_offload: bool) -> list[Treatment]:
    """What the flags allow, from the fastest."""
    steps = {"auto": (0, 4, 2, 1), "none": (0,), "full": (1,), "offload": (1,)}[checkpointing]
    offload = checkpointing == "offload"
    found = [Treatment(every, offload=offload, tiled_mlp=tiles == "yes") for every in steps]
    # Before tiles: it costs next to nothing, and they a fifth (H100).
    if checkpointing == "auto" and can_offload:
        found.append(replace(found[-1], offload=True))
    if tiles == "auto":
        found.append(replace(found[-1], tiled_mlp=True))
    return found


def _too_much_for_host(setup: Setup, tokens: int, *, host_bytes: int | None) -> str | None:
    """Why the host cannot keep the checkpoints of a forward of `tokens` tokens; None if it can."""
    needed = bytes_on_host(setup, Treatment(checkpoint_every=1, offload=True), tokens)
    if host_bytes is None or needed <= USABLE * host_bytes:
        return None
    return (
        f"for {tokens:,} tokens a rank would keep {as_text(needed)} in the host's memory, of which its share "
        f"is {as_text(host_bytes)}"
    )


def _capacities(
    setup: Setup, treatments: Sequence[Treatment], *, usable: int
) -> dict[Treatment, int]:
    """What fits with each treatment, without those that take no more tokens than a faster one."""
    capacities: dict[Treatment, int] = {}
    most = -1
    for treatment in treatments:
        capacity = _capacity(setup, treatment, usable=usable)
        if most == 0:  # nothing fits with the ones before
            capacities.clear()
        if capacity > most or not capacities:
            capacities[treatment] = most = capacity
    return capacities


def _ladder(
    setup: Setup, capacities: dict[Treatment, int], *, most_tokens: int
) -> tuple[Rung, ...]:
    """As many rungs as the longest forward needs. It may go beyond the last one's capacity."""
    needed = 1 + sum(capacity < most_tokens for capacity in capacities.values())
    rungs = list(capacities.items())[:needed]
    tokens = [min(capacity, most_tokens) for _, capacity in rungs[:-1]] + [most_tokens]
    return tuple(
        Rung(treatment, capacity, expected_peak(setup, treatment, longest))
        for (treatment, capacity), longest in zip(rungs, tokens, strict=True)
    )


def _capacity(setup: Setup, treatment: Treatment, *, usable: int) -> int:
    """The most tokens whose expected peak is at most `usable` bytes; 0 if none fit."""

    def fits(grains: int) -> bool:
        return expected_peak(setup, treatment, grains * GRAIN).total <= usable

    if not fits(1):
        return 0
    fitting, failing = 1, 2
    while fits(failing):
        fitting, failing = failing, 2 * failing
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting * GRAIN


def _choose_micro_batch(
    asked: int | str, capacities: dict[Treatment, int], *, row_tokens: int
) -> Choice:
    if asked == "row":
        return Choice(row_tokens, "whole rows, --micro_batch_tokens row")
    if asked != "auto":
        return Choice(int(asked), "--micro_batch_tokens")
    enough = min(ENOUGH, row_tokens)
    fast_enough = (item for item in capacities.items() if item[1] >= enough)
    treatment, capacity = next(fast_enough, list(capacities.items())[-1])
    if capacity >= row_tokens:
        return Choice(row_tokens, f"whole rows fit, {treatment}")
    return Choice(max(capacity, GRAIN), f"as many as fit, {treatment}")


def _does_not_fit(
    setup: Setup, peak: Peak, tokens: int, *, free_bytes: int, asked: dict[str, Any]
) -> str:
    """By how much the leanest plan exceeds the memory, and what would help."""
    zero = setup.sharding
    for_tokens = ("activations", "layer at work", "loss")
    too_many_tokens = sum(peak.parts.get(part, 0) for part in for_tokens) > peak.total / 2
    remedies = []
    if asked["gradient_checkpointing"] != "auto" or asked["tiled_mlp"] == "no":
        remedies.append("--gradient_checkpointing auto --tiled_mlp auto")
    wanted = asked["micro_batch_tokens"]
    if too_many_tokens and wanted != "auto" and tokens > asked["longest_unit"]:
        remedies.append(f"--micro_batch_tokens auto instead of {wanted}")
    elif too_many_tokens:
        remedies.append(
            "more ranks on the sequence (--parallel_mode ring_attn or ulysses_attn: each rank then holds a "
            "part of the longest unit)"
        )
        remedies.append("shorter rows (--seq-length)")
    elif zero.stage == 3:
        remedies.append("more ranks")
    if zero.stage < 3 and zero.ranks > 1:
        remedies.append(
            f"ZeRO stage 3 in place of {zero.stage}, which shards weights and gradients"
        )
    if setup.device == "cuda" and not (zero.offload_optimizer and zero.offload_weights):
        remedies.append(
            "accelerate_configs/zero3_offload.json (weights and optimiser in host memory)"
        )
    remedies.append("--memory_gib, if there is more memory than was found")
    return (
        f"a forward of {tokens:,} tokens per rank does not fit: with the leanest treatment that the flags "
        f"allow a rank would hold {peak}, {as_text(peak.total - free_bytes)} more than the "
        f"{as_text(free_bytes)} that are free. What would help: {'; or '.join(remedies)}"
    )


# --- the device -----------------------------------------------------------------------------------


def free_memory(
    device: torch.device, *, memory_gib: float | None = None, local_ranks: int | None = None
) -> int:
    """Bytes that this rank may fill; ask before the model is loaded. `memory_gib` overrides what is found.

    On the CPU the ranks of a machine share what it has free: `local_ranks`, or as many as launchers say
    (`LOCAL_WORLD_SIZE`).
    """
    if memory_gib is not None:
        return int(memory_gib * 2**30)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator holds already is the plan's as well.
        return free + torch.cuda.memory_reserved(device)
    local_ranks = local_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return psutil.virtual_memory().available // local_ranks


# --- applying -------------------------------------------------------------------------------------


def apply_memory_plan(model: PreTrainedModel, plan: MemoryPlan) -> Callable[[int], Treatment]:
    """Make `model` ready; before `CausalLMWithLoss` and `accelerator.prepare`.

    Returns:
        `treat(tokens)`, to call before each forward: gives it the plan's treatment for a micro-batch of
        which no rank holds more than `tokens` tokens. All ranks hand over the same number.
    """
    if plan.liger.value:
        apply_liger(model)
    treatments = [rung.treatment for rung in plan.ladder]
    treated = TreatedModel(  # after Liger, so that each tile is computed by its SwiGLU
        model,
        tiles=any(treatment.tiled_mlp for treatment in treatments),
        offload_tokens=plan.most_tokens if any(t.offload for t in treatments) else 0,
    )

    def treat(tokens: int) -> Treatment:
        treatment = plan.treatment(tokens)
        treated(treatment, tokens)
        return treatment

    return treat
