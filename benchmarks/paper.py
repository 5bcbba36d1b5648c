"""The paper's ablation in small (arXiv 2411.13476): four patterns, two precisions, one longer context.

    python benchmarks/paper.py                        # CPU: ten minutes of one core
    python benchmarks/paper.py --size gpu --seeds 0 1 # one GPU
    python benchmarks/paper.py --size real            # a real model, in minutes: see paper_real.py

Per seed, a small LLaMA is trained from random weights on short rows, in float32, every document as if it
stood alone (`intra_doc_reset`), as all are evaluated; so only `full` meets something new in the extension.
From these weights every variant goes on with long rows, a RoPE base raised by the same factor, its own mask
and positions, and the same AdamW:

    patterns     full, intra_doc, intra_doc_reset, anchor
    precisions   bf16     weights, forward and backward in bfloat16, RoPE's tables rounded to it as
                          transformers does, frequencies float32; AdamW on float32 master weights (what
                          DeepSpeed's bf16 does)
                 float32  everything

Guarantees: all variants of a seed read the same rows, byte for byte, in the same order. They take turns step
by step, so that whatever else the machine does meets their times alike. `start` is the model before the
extension, with its own base. Every model is evaluated in its own precision as plain causal attention
behind a BOS, on prompts and held-out files that are the same for all (`paper_data.py` says what is in the
text, and that a share of it asks for numbers that it hid).

Reported, as mean and sample standard deviation over seeds: by length, how many hidden numbers are found
(`needle`: all digits, greedily) and how many nats the number costs (`needle_nats`: 0 is certainty;
guessing is in the `ceiling`); perplexity by position; the median of all steps' seconds, with the engine
that took them (the flash kernels of CUDA take no float32, so there the float32 variants run `flex`, and
their seconds differ by more than the precision). And, as the paper's direct sign of what bfloat16 does to
RoPE, `reset_gap`: how far the training losses of `intra_doc` and `intra_doc_reset` lie apart (mean over
steps, nats). They are one computation in exact arithmetic. What is found is reported, whatever the order of
the patterns.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from pathlib import Path

from common import hardware, mask_share, matmul_rate, print_json, print_table  # isort: skip
import paper_real
import torch
from matplotlib.figure import Figure
from paper_data import TASK, Data, make_data
from paper_small import SIZES, Size, extended, model_config, short_phase, train
from paper_train import COLOURS, PRECISIONS, Variant, mean_by
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from anchor_context.attention.patterns import find_anchor_id
from anchor_context.evaluate.generation import greedy
from anchor_context.evaluate.perplexity import perplexity_rows, token_losses
from anchor_context.evaluate.prompts import Prompt
from anchor_context.evaluate.retrieval import answer_prompts

MEASURES = ("needle", "needle_nats", "perplexity")
GUESSING_NATS = math.log(9 * 10 ** (TASK.digits - 1))
"""The cost of a number of which only the digits' count is known."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_cuda = torch.cuda.is_available()
    sizes = [*SIZES, "real"]
    parser.add_argument("--size", choices=sizes, default="gpu" if on_cuda else "cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", type=Path, help="PNG; default: benchmarks/results/paper_SIZE.png")
    real = parser.add_argument_group("--size real (paper_real.py), with the first seed")
    real.add_argument("--minutes", type=float, default=10, help="of this call; another goes on")
    real.add_argument("--out", type=Path, default=Path("output/paper_real"), help="what is kept")
    model = "the folder of another model to extend; default: SmolLM2, on the CPU a small LLaMA"
    real.add_argument("--model", type=Path, help=model)
    texts = 'JSON lines {"text": …}; default: long documents that the machine has'
    real.add_argument("--texts", type=Path, help=texts)
    flags = parser.parse_args()
    if flags.size == "real":
        paper_real.run(flags, torch.device("cuda" if on_cuda else "cpu"))
        return
    plot = flags.plot or Path(__file__).parent / "results" / f"paper_{flags.size}.png"
    device, size = torch.device("cuda" if on_cuda else "cpu"), SIZES[flags.size]
    transformers_logging.set_verbosity_error()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the loader's workers are warned about

    with tempfile.TemporaryDirectory() as folder:
        data = make_data(size.data, Path(folder))
        describe(data, size)
        found = [run_seed(seed, data, size, device) for seed in flags.seeds]
        share = statistics.median(
            mask_share(data.long.row(i).document_lengths(), pattern="anchor")
            for i in range(len(data.long))
        )
    results = aggregate(found)
    show(results, size)
    plot.parent.mkdir(parents=True, exist_ok=True)
    title = f"{len(flags.seeds)} seeds, {hardware(device)}"
    picture(results, size, title=title).savefig(plot, dpi=80)
    print(f"-> {plot}")
    ceiling = {
        "matmul_flops_per_second": {
            name: matmul_rate(device, dtype) for name, dtype in PRECISIONS.items()
        },
        "anchor_mask_share": share,
        "guessing_nats": GUESSING_NATS,
    }
    print_json("paper", device=device, ceiling=ceiling, results=results, seeds=flags.seeds)


# --- training -------------------------------------------------------------------------------------


def run_seed(seed: int, data: Data, size: Size, device: torch.device) -> dict[tuple, dict]:
    """{(pattern, precision): what was measured}, `start` among the patterns."""
    first = short_phase(seed, data, size, device)
    config = model_config(size, data.tokenizer)
    start = {name: weight.detach().clone() for name, weight in first.model.state_dict().items()}
    print(f"seed {seed}: short rows done, loss {first.losses[-1]:.3f}", flush=True)

    variants = extended(config, start, size, device)
    train(variants, data.long, steps=size.long_steps, tokens=size.step_tokens, seed=seed)
    found = {("start", "float32"): evaluate(first, data, size)}
    for variant in variants:
        measured = evaluate(variant, data, size)
        # The first steps warm up kernels and allocators.
        measured["seconds"] = variant.seconds[2:] or variant.seconds
        measured |= {"losses": variant.losses, "engine": variant.engine}
        found[variant.pattern, variant.precision] = measured
        nats = measured["needle_nats"][size.data.long]
        print(
            f"seed {seed}: {variant.pattern:16} {variant.precision:8} loss {variant.losses[-1]:.3f}, "
            f"needle at {size.data.long:,}: {nats:.1f} nats",
            flush=True,
        )
    return found


# --- evaluation -----------------------------------------------------------------------------------


def evaluate(variant: Variant, data: Data, size: Size) -> dict[str, dict]:
    """{measure: {length or positions: value}}."""
    with variant.evaluated() as model:
        answers = answer_prompts(
            greedy(model, pad_id=find_anchor_id(data.tokenizer)),
            data.prompts,
            data.tokenizer,
            batch_size=size.prompts_at_a_time,
        )
        nats = answer_nats(model, data.prompts, data.tokenizer)
        losses = [token_losses(model, document) for document in data.held_out]
    return {
        "needle": mean_by((a.length, float(a.correct)) for a in answers),
        "needle_nats": mean_by(zip((p.length for p in data.prompts), nats, strict=True)),
        "perplexity": {
            f"{row['first']}-{row['last']}": row["perplexity"]
            for row in perplexity_rows(losses, [size.data.long])
            if row["kind"] == "position"
        },
    }


def answer_nats(model: LlamaForCausalLM, prompts: list[Prompt], tokenizer) -> list[float]:
    """What the hidden number costs each prompt: the summed loss of its tokens, behind the question."""
    nats = []
    for prompt in prompts:
        answer = tokenizer(f" {prompt.answer}", add_special_tokens=False)["input_ids"]
        losses = token_losses(model, torch.tensor(prompt.token_ids + answer))
        nats.append(losses[-len(answer) :].sum().item())
    return nats


# --- the report -----------------------------------------------------------------------------------


def aggregate(found: list[dict[tuple, dict]]) -> list[dict]:
    """A result per variant from every seed's measurements: mean and spread of each, the median step."""
    results = []
    for pattern, precision in found[0]:
        of_seeds = [seed[pattern, precision] for seed in found]
        result = {"pattern": pattern, "precision": precision}
        for measure in MEASURES:
            result[measure] = {
                key: mean_and_spread([measured[measure][key] for measured in of_seeds])
                for key in of_seeds[0][measure]
            }
        if pattern != "start":
            result["engine"] = of_seeds[0]["engine"]
            result["loss"] = mean_and_spread(
                [statistics.fmean(m["losses"][-10:]) for m in of_seeds]
            )
            result["step_s"] = statistics.median(s for m in of_seeds for s in m["seconds"])
            result["reset_gap"] = mean_and_spread([reset_gap(seed, precision) for seed in found])
        results.append(result)
    return results


def mean_and_spread(values: list[float]) -> dict[str, float | None]:
    """The mean and the sample standard deviation (None of a single value)."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread}


def reset_gap(seed: dict[tuple, dict], precision: str) -> float:
    """Mean over steps of |loss of intra_doc − loss of intra_doc_reset|, in one seed and precision."""
    pairs = zip(
        seed["intra_doc", precision]["losses"],
        seed["intra_doc_reset", precision]["losses"],
        strict=True,
    )
    return statistics.fmean(abs(a - b) for a, b in pairs)


def describe(data: Data, size: Size) -> None:
    for rows, steps in ((data.short, size.short_steps), (data.long, size.long_steps)):
        tokens = steps * size.step_tokens
        report = rows.report
        print(
            f"{report['documents']:,} documents, {report['document_tokens']:,} tokens in {len(rows):,} "
            f"rows of {rows.row_length:,}; {steps} steps of {size.step_tokens:,} tokens "
            f"({tokens / len(rows) / rows.row_length:.1f} epochs)"
        )
    print(
        f"{size.data.questions_share:.0%} of the text asks for numbers that it hid; "
        f"{len(data.held_out)} held-out files; prompts per length: "
        f"{len(size.data.depths) * size.data.trials}",
        flush=True,
    )


def show(results: list[dict], size: Size) -> None:
    names = {"pattern": [r["pattern"] for r in results], "type": [r["precision"] for r in results]}
    lengths = size.data.lengths
    for measure, title, digits in (
        ("needle", "needle, share found, by length", 2),
        ("needle_nats", "needle, nats for the number, by length", 2),
    ):
        print(f"\n{title}")
        print_table(
            names
            | {
                f"{length:,}": [cell(r[measure][length], digits) for r in results]
                for length in lengths
            }
        )
    print("\nperplexity by position")
    positions = list(results[0]["perplexity"])
    print_table(
        names | {span: [cell(r["perplexity"][span], 1) for r in results] for span in positions}
    )
    print("\ntraining (loss: mean of the last ten steps; reset gap: intra_doc against its reset)")
    trained = [r for r in results if r["pattern"] != "start"]
    print_table(
        {
            "pattern": [r["pattern"] for r in trained],
            "type": [r["precision"] for r in trained],
            "loss": [cell(r["loss"], 3) for r in trained],
            "step s": [f"{r['step_s']:.4f}" for r in trained],
            "engine": [r["engine"] for r in trained],
            "reset gap": [f"{r['reset_gap']['mean']:.1e}" for r in trained],
        }
    )


def cell(value: dict[str, float | None], digits: int) -> str:
    spread = "" if value["spread"] is None else f" ± {value['spread']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def picture(results: list[dict], size: Size, *, title: str) -> Figure:
    """Retrieval and its cost by length, and perplexity by position; one row of panels per precision."""
    panels = {
        "needle": ("share of numbers found (0 to 1)", "prompt length (tokens)"),
        "needle_nats": ("nats for the hidden number", "prompt length (tokens)"),
        "perplexity": ("perplexity", "position of the predicted token (tokens)"),
    }
    figure = Figure(figsize=(14, 8.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # inches: labels clear of the next panel
    rows = f"from rows of {size.data.short:,} to {size.data.long:,} tokens"
    figure.suptitle(f"{rows}; mean ± standard deviation of {title}")
    axes_rows = figure.subplots(len(PRECISIONS), len(panels), sharey="col")
    for precision, axes_row in zip(PRECISIONS, axes_rows, strict=True):
        for (measure, (ylabel, xlabel)), axes in zip(panels.items(), axes_row, strict=True):
            lines = [r for r in results if r["pattern"] == "start" or r["precision"] == precision]
            for number, result in enumerate(lines):
                values = list(result[measure].values())
                # Side by side, for they often lie on each other.
                places = [i + 0.06 * (number - len(lines) // 2) for i in range(len(values))]
                axes.errorbar(
                    places,
                    [value["mean"] for value in values],
                    yerr=[value["spread"] or 0.0 for value in values],
                    label=result["pattern"].replace("start", "before the extension (float32)"),
                    color=COLOURS[result["pattern"]],
                    linestyle="--" if result["pattern"] == "start" else "-",
                    marker="o",
                    markersize=4,
                    capsize=3,
                )
            keys = list(lines[0][measure])
            axes.set_xticks(range(len(keys)), [f"{key}" for key in keys], fontsize=8)
            task = "" if measure == "perplexity" else "needle, "
            axes.set(title=f"{task}{precision}", xlabel=xlabel, ylabel=ylabel)
            if measure == "needle":
                axes.set_ylim(-0.04, 1.04)
            if measure == "needle_nats":
                axes.axhline(GUESSING_NATS, color="black", linestyle=":", label="guessing")
            axes.grid(alpha=0.3)
    handles, labels = axes_rows[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


if __name__ == "__main__":
    main()
