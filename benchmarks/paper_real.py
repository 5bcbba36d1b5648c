"""The paper's claims on a real model and real text (`paper.py --size real`).

    python benchmarks/paper.py --size real --minutes 7 --out output/paper_real   # a GPU; again to go on
    python benchmarks/paper.py --size real --out output/paper_real   # CPU: ten minutes

On a GPU, SmolLM2-135M goes on from its 8,192 tokens to rows of 32,768, its RoPE base raised from 100,000 to
1,000,000; on the CPU a small LLaMA that `--size cpu` trained on rows of 256 goes on to 1,024. Six variants:
the four patterns in bfloat16, and `full` and `anchor` with a rotation in float32. All start from the same
weights and read the same rows in the same order, at one constant learning rate after a short warm-up, so
that a model may be compared at any step.

They take turns of some seconds. Whenever a variant has done so many steps (equal tokens) or has trained for
so many seconds (equal time), it is evaluated, as plain causal attention behind a BOS: the loss by position
in whole held-out documents of a long row's length, needle and passkey by length and depth, and the loss on
short documents. `start` is the model with its own base, `raised` the same weights with the raised one: what
all variants start from. Seconds are those of the steps alone; a variant's first batch warms kernels up,
uncounted.

Guarantees: what is measured is in OUT/results.jsonl at once, one line each, complete by itself. A variant's
state is in OUT/checkpoints when a mark is reached and when the call's minutes are over; another call with
the same flags goes on from there, and repeats nothing that was measured. A call that is killed loses at
most what a variant did since its last mark.

Reported: what was measured at the last step mark and at the last mark of seconds, each with its standard
error over documents, and every claim as a difference of two variants on the same documents, with twice the
standard error of the paired differences; also where the paper's ordering does not show.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import hardware, heading, print_json, print_table, synchronize  # isort: skip
import torch
from paper_real_data import Material, RealData, small_material, smollm2_material
from paper_real_report import compare, picture, retrieval_picture, table
from paper_train import Variant, inputs_of, mean_by
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from anchor_context.attention.patterns import find_anchor_id
from anchor_context.data.loader import Dealing, MicroBatches, one_step
from anchor_context.data.rows import PreparedRows
from anchor_context.data.stream import RowOrder
from anchor_context.evaluate.generation import greedy
from anchor_context.evaluate.perplexity import position_ranges, token_losses
from anchor_context.evaluate.retrieval import answer_prompts
from anchor_context.files import whole
from anchor_context.rope.float32 import rotate_in_float32
from anchor_context.rope.scaling import apply_rope_settings

BF16, ROTATED = "bf16", "bf16, rotated in float32"
VARIANTS = [(pattern, BF16) for pattern in ("full", "intra_doc", "intra_doc_reset", "anchor")]
VARIANTS += [("full", ROTATED), ("anchor", ROTATED)]


@dataclass(frozen=True)
class RealSize:
    """What is extended, and when it is measured."""

    data: RealData
    theta: float
    """The raised base."""
    rows_per_step: int
    step_marks: tuple[int, ...]
    second_marks: tuple[float, ...]
    turn_seconds: float
    rate: float
    warmup_steps: int
    material: Callable[..., Material]


SIZES = {
    "cuda": RealSize(
        RealData(
            short=8192,
            long=32_768,
            lengths=(8192, 16_384, 32_768),
            depths=(0.0, 25.0, 50.0, 75.0, 100.0),
            trials=2,
            long_documents=12,
            short_documents=32,
            short_tokens=2048,
        ),
        theta=1_000_000.0,  # what the paper's own launch command sets
        rows_per_step=2,
        step_marks=(16, 32),
        second_marks=(15.0, 30.0),
        turn_seconds=10.0,
        rate=1e-4,
        warmup_steps=5,
        material=smollm2_material,
    ),
    "cpu": RealSize(
        RealData(
            short=256,
            long=1024,
            lengths=(256, 512, 1024),
            depths=(0.0, 25.0, 50.0, 75.0, 100.0),
            trials=4,
            long_documents=12,
            short_documents=12,
            short_tokens=256,
            digits=2,
        ),
        theta=40_000.0,
        rows_per_step=1,
        step_marks=(50, 100),
        second_marks=(4.0, 8.0),
        turn_seconds=2.0,
        rate=1e-3,
        warmup_steps=5,
        material=small_material,
    ),
}


class Clock:
    """The minutes of this call."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def has(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self.end


def run(flags: argparse.Namespace, device: torch.device) -> None:
    """Measure for at most `flags.minutes`, and report all that was measured in this call and those before."""
    clock, out, seed, size = Clock(flags.minutes), flags.out, flags.seeds[0], SIZES[device.type]
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    check_same_setting(flags, size, out)
    material = size.material(size.data, out, model=flags.model, texts=flags.texts)
    results = Results(out / "results.jsonl", device)
    finished = measure(seed, material, size, device, clock, results)
    report(results.lines, size, out, device, vocabulary=len(material.tokenizer))
    if not finished:
        print(f"not all is measured; the same command goes on (everything is in {out})")


def check_same_setting(flags: argparse.Namespace, size: RealSize, out: Path) -> None:
    """Raise `ValueError` where `out` has measurements of something else."""
    setting = json.loads(
        json.dumps(
            {
                "--seeds": flags.seeds[:1],
                "--model": str(flags.model),
                "--texts": str(flags.texts),
                "size": asdict(replace(size, material=size.material.__name__)),
            }
        )
    )
    kept = out / "setting.json"
    if not kept.exists():
        kept.write_text(json.dumps(setting, indent=2) + "\n")
        return
    before = json.loads(kept.read_text())
    different = [name for name in setting if setting[name] != before.get(name)]
    if different:
        raise ValueError(
            f"--out {out} holds measurements with another {', '.join(different)}; give another folder, or "
            "the same flags to go on"
        )


class Results:
    """What was measured: a JSON line each, appended the moment it is known."""

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device = path, device
        self.lines = []
        if path.exists():
            # A call that was killed may have left half a line.
            complete = path.read_text().split("\n")[:-1]
            self.lines = [json.loads(line) for line in complete]
            path.write_text("".join(line + "\n" for line in complete))

    def has(self, pattern: str, precision: str, mark: str) -> bool:
        wanted = (pattern, precision, mark)
        return any((r["pattern"], r["precision"], r["mark"]) == wanted for r in self.lines)

    def add(self, result: dict) -> None:
        self.lines.append(heading("paper_real", self.device) | result)
        with self.path.open("a") as stream:
            stream.write(json.dumps(self.lines[-1]) + "\n")
        positions = result["positions"]
        print(
            f"{result['pattern']:16} {result['precision']:24} {result['mark']:10} {result['steps']:4} steps "
            f"{result['seconds']:6.1f} s: loss at {positions[-1]['first']:,}–{positions[-1]['last']:,} "
            f"{statistics.fmean(positions[-1]['losses']):.3f}, short {statistics.fmean(result['short']):.3f}",
            flush=True,
        )


# --- training -------------------------------------------------------------------------------------


class Contestant:
    """A variant with its place in the rows, its marks, and the file that it goes on from."""

    def __init__(
        self,
        pattern: str,
        precision: str,
        material: Material,
        size: RealSize,
        device: torch.device,
        *,
        seed: int,
        path: Path,
    ):
        self.size, self.seed, self.path, self.rows = size, seed, path, material.rows
        model = model_of(material, device, theta=size.theta, long=size.data.long)
        if precision == ROTATED:
            rotate_in_float32(model)
        self.variant = Variant(
            pattern,
            precision,
            model,
            material.weights(),
            rate=lambda done: size.rate * min((done + 1) / size.warmup_steps, 1.0),
        )
        self.due: list[str] = []
        """Marks that are reached, and not evaluated yet."""
        self.passed: set[str] = set()
        self.saved_steps = 0
        if path.exists():
            self._load()
        self.batches = iter(micro_batches(self.rows, size, seed, first_step=self.steps))
        self.warm = False

    @property
    def name(self) -> tuple[str, str]:
        return self.variant.pattern, self.variant.precision

    def standing(self) -> dict:
        """What a result says of the variant's training so far."""
        return {
            "pattern": self.variant.pattern,
            "precision": self.variant.precision,
            "seed": self.seed,
            "steps": self.steps,
            "tokens": self.steps * self.size.rows_per_step * self.size.data.long,
            "seconds": self.seconds,
            "step_s": statistics.median(self.variant.seconds),
            "loss": statistics.fmean(self.variant.losses[-10:]),
            "engine": self.variant.engine,
        }

    @property
    def steps(self) -> int:
        return len(self.variant.losses)

    @property
    def seconds(self) -> float:
        return math.fsum(self.variant.seconds)

    @property
    def done(self) -> bool:
        return len(self.passed) == len(self.size.step_marks) + len(self.size.second_marks)

    def take_turn(self) -> None:
        """Train for a turn's seconds, or up to the next mark."""
        self._warm_up()
        until = self.seconds + self.size.turn_seconds
        while self.seconds < until and not self.due:
            self.variant.step(list(one_step(self.batches)))
            reached = {f"{n} steps": self.steps >= n for n in self.size.step_marks}
            reached |= {f"{s:g} seconds": self.seconds >= s for s in self.size.second_marks}
            self.due = [mark for mark in reached if reached[mark] and mark not in self.passed]
            self.passed.update(self.due)

    def _warm_up(self) -> None:
        """Kernels compile and allocators grow at the first batch: on one that is thrown away."""
        if self.warm:
            return
        batch = next(iter(micro_batches(self.rows, self.size, self.seed, first_step=0)))
        self.variant.gradients([inputs_of(batch, self.variant.pattern, self.variant.device)])
        self.variant.optimizer.zero_grad(set_to_none=True)
        synchronize(self.variant.device)
        self.warm = True

    def save(self) -> None:
        state = {
            "masters": self.variant.masters,
            "optimizer": self.variant.optimizer.state_dict(),
            "losses": self.variant.losses,
            "seconds": self.variant.seconds,
            "due": self.due,
            "passed": sorted(self.passed),
        }
        with whole(self.path) as unfinished:
            torch.save(state, unfinished)
        self.saved_steps = self.steps

    def _load(self) -> None:
        # On the CPU first: AdamW counts its steps there, and waits for the device where it does not.
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for master, saved in zip(self.variant.masters, state["masters"], strict=True):
            master.copy_(saved)
        self.variant.optimizer.load_state_dict(state["optimizer"])
        self.variant.copy_masters()
        self.variant.losses, self.variant.seconds = state["losses"], state["seconds"]
        self.due, self.passed = state["due"], set(state["passed"])
        self.saved_steps = self.steps


def micro_batches(
    rows: PreparedRows, size: RealSize, seed: int, *, first_step: int
) -> MicroBatches:
    """A row each, the same for every variant, endlessly from a step on."""
    return MicroBatches(
        rows,
        RowOrder(len(rows), seed, size.rows_per_step, total_rows=None),
        pattern="anchor",
        batch_size=1,
        data_rank=0,
        data_degree=1,
        first_row=first_step * size.rows_per_step,
        first_step=first_step,
        context=None,
        dealing=Dealing(),
        transform=None,
    )


def model_of(material: Material, device: torch.device, *, theta: float | None, long: int):
    """The start's model in bfloat16, with its own RoPE base or a raised one."""
    config = AutoConfig.from_pretrained(material.model)
    apply_rope_settings(config, row_length=long, rope_theta=theta)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model.load_state_dict(material.weights())
    return model.to(device)


def measure(
    seed: int,
    material: Material,
    size: RealSize,
    device: torch.device,
    clock: Clock,
    results: Results,
) -> bool:
    """Evaluate and train in turns while there is time; whether all is measured."""
    for name, theta in (("start", None), ("raised", size.theta)):
        if not results.has(name, BF16, "before"):
            model = model_of(material, device, theta=theta, long=size.data.long).eval()
            nothing = {"steps": 0, "seconds": 0.0, "tokens": 0, "step_s": None, "loss": None}
            at = {"pattern": name, "precision": BF16, "mark": "before", "seed": seed} | nothing
            results.add(at | evaluate(model, material))
            del model

    folder = results.path.parent / "checkpoints"
    contestants = [
        Contestant(
            pattern,
            precision,
            material,
            size,
            device,
            seed=seed,
            path=folder / f"{pattern}-{'rotated' if precision == ROTATED else precision}.pt",
        )
        for pattern, precision in VARIANTS
    ]
    for contestant in contestants:  # a call may have been killed between the measurement and here
        contestant.due = [m for m in contestant.due if not results.has(*contestant.name, m)]
    turns = Turns(contestants, material, size, clock, results)
    for number in itertools.count():
        waiting = [c for c in contestants if c.due or not c.done]
        if not waiting:
            return True
        # In a new order each round, so that nobody is always the first to meet a busy machine.
        for contestant in random.Random(f"{seed} {number}").sample(waiting, len(waiting)):
            if not turns.take(contestant):
                turns.save()
                return False


class Turns:
    """Lets variants train and evaluates them, and stops before the call's minutes are over."""

    def __init__(
        self,
        contestants: list[Contestant],
        material: Material,
        size: RealSize,
        clock: Clock,
        results: Results,
    ):
        self.contestants, self.material, self.size = contestants, material, size
        self.clock, self.results = clock, results
        self.evaluation_seconds, self.saving_seconds = 0.0, 0.0
        """Of the last one."""

    def take(self, contestant: Contestant) -> bool:
        """A turn of one variant, and its evaluation if that ends at a mark; False where time is short."""
        reserve = self.saving_seconds * len(self.contestants)
        if not contestant.due:
            if not self.clock.has(self.size.turn_seconds + reserve):
                return False
            contestant.take_turn()
            if not contestant.due:
                return True
            self._timed("saving_seconds", contestant.save)
        if not self.clock.has(self.evaluation_seconds + reserve):
            return False
        self._timed("evaluation_seconds", lambda: self._evaluate(contestant))
        return True

    def _evaluate(self, contestant: Contestant) -> None:
        with contestant.variant.evaluated() as model:
            measured = evaluate(model, self.material)
        for mark in contestant.due:
            self.results.add(contestant.standing() | {"mark": mark} | measured)
        contestant.due = []

    def _timed(self, name: str, work: Callable[[], None]) -> None:
        start = time.monotonic()
        work()
        setattr(self, name, time.monotonic() - start)

    def save(self) -> None:
        """What was trained since the last marks."""
        for contestant in self.contestants:
            if contestant.steps != contestant.saved_steps:
                contestant.save()


# --- evaluation -----------------------------------------------------------------------------------


def evaluate(model: PreTrainedModel, material: Material) -> dict:
    """Losses (nats) of every document by position and on short ones; what is found by length and depth."""
    generate = greedy(model, pad_id=find_anchor_id(material.tokenizer))
    retrieval = []
    for task, prompts in material.prompts.items():
        # All of a length at once: what a step on the cache costs hardly depends on their number.
        answers = answer_prompts(generate, prompts, material.tokenizer, batch_size=len(prompts))
        found = mean_by(((a.length, a.depth), float(a.correct)) for a in answers)
        retrieval += [
            {"task": task, "length": length, "depth": depth, "found": share}
            for (length, depth), share in sorted(found.items())
        ]
    losses = [token_losses(model, document) for document in material.long_documents]
    return {
        "positions": [
            {
                "first": first,
                "last": last - 1,
                "losses": [loss[first - 1 : last - 1].mean().item() for loss in losses],
            }
            for first, last in position_ranges(len(losses[0]) + 1)
        ],
        "short": [
            token_losses(model, document).mean().item() for document in material.short_documents
        ],
        "retrieval": retrieval,
    }


# --- the report -----------------------------------------------------------------------------------


def report(
    lines: list[dict], size: RealSize, out: Path, device: torch.device, *, vocabulary: int
) -> None:
    """Tables of what was measured at equal tokens and at equal time, the claims, pictures, one JSON line."""
    short, claims = size.data.short, []
    order = [("start", BF16), ("raised", BF16), *VARIANTS]
    lines = sorted(lines, key=lambda r: order.index((r["pattern"], r["precision"])))
    equal = [
        ("equal tokens", [f"{steps} steps" for steps in size.step_marks]),
        ("equal time", [f"{seconds:g} seconds" for seconds in size.second_marks]),
    ]
    for title, marks in equal:
        at_mark = [r for r in lines if r["mark"] in ("before", marks[-1])]
        print(f"\n{title}: after {marks[-1]} (loss: nats, ± standard error over documents)")
        print_table(table(at_mark, short=short))
        for claim in compare(at_mark, short=short):
            claims.append({"mark": marks[-1]} | claim)
            print(f"  {claim['said']}")
    title = f"from {short:,} to {size.data.long:,} tokens, {hardware(device)}"
    pictures = {
        "paper_real.png": picture(lines, short=short, equal=equal, title=title),
        "paper_real_retrieval.png": retrieval_picture(lines, equal[0][1][-1]),
    }
    for name, figure in pictures.items():
        figure.savefig(out / name, dpi=70)
        print(f"-> {out / name}")
    ceiling = {"uniform_loss": math.log(vocabulary)}
    print_json("paper_real", device=device, ceiling=ceiling, results=lines, claims=claims)
