"""`train.py` itself, under DeepSpeed, on a model of random weights: tokens per second, MFU, memory.

    python benchmarks/train_run.py                                       # the default for this machine
    python benchmarks/train_run.py --row_lengths 131072 --zero_stage 3 -- --micro_batch_tokens 16384

With a GPU: LLaMA-3.2-1B's sizes (heads untied), bfloat16, rows of 131,072 and of 1,048,576 tokens, twenty
steps of one row each. Without one: a tiny LLaMA, float32. What stands behind `--` goes to `train.py`.
Documents are random tokens, log-normal (median 1,339 tokens, sigma 1.0), written as `--data-format tokenized`
reads them; nothing is asked of a hub or a network. Model and documents are made once, the same every time, in
`--folder`.

Of every run: the medians over its steps, without the first two, in which kernels compile and memory is asked
for, or the second one where there is no third; `steps` says how many were counted. They are kept after every
step but the first. A run that has its time is ended, and what it recorded until then counts.
`planned_peak_bytes` is what the run's memory plan expected, null where it says nothing; `start_s` is from the
launch to the end of the first step.
"""

from __future__ import annotations

import argparse
import gc
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from common import Report, document_lengths, print_table
from steps import ONE_BILLION, TINY, Shape

from anchor_context.demo import train_tokenizer
from anchor_context.run.metrics import read_metrics

ROOT = Path(__file__).parents[1]
WARM_UP_STEPS = 2


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [131_072, 1_048_576] if on_cuda else [512]
    parser.add_argument("--row_lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--zero_stage", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument(
        "--at_most_seconds", type=float, default=3600, help="of all runs, each in its share"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "anchor_context_benchmark",
        help="where model, documents and runs lie",
    )
    parser.add_argument("--keep", type=Path, help="append every result to this file at once")
    parser.add_argument("train_flags", nargs="*", metavar="-- FLAGS OF TRAIN.PY")
    flags = parser.parse_args()

    deadline = time.monotonic() + flags.at_most_seconds
    shape, dtype = (ONE_BILLION, torch.bfloat16) if on_cuda else (TINY, torch.float32)
    model = make_model(flags.folder, shape, device, dtype, max_length=max(flags.row_lengths))
    data = make_documents(flags.folder, shape, tokens=2 * max(flags.row_lengths))
    gc.collect()
    torch.cuda.empty_cache()  # the model is on the disk; the runs need the memory

    report = Report(
        "train_run", case=("row_length", "zero_stage", "kernel"), device=device, keep=flags.keep
    )
    failed = False
    for index, row_length in enumerate(flags.row_lengths):
        share = (deadline - time.monotonic()) / (len(flags.row_lengths) - index)
        run = Run(flags.folder, row_length=row_length, zero_stage=flags.zero_stage)
        run.start(
            model,
            data,
            steps=flags.steps,
            precision="bf16" if on_cuda else "no",
            more=flags.train_flags,
        )
        for result in run.results(steps=flags.steps, at_most_seconds=share):
            report.add(result)
        failed |= run.failed
    show(report.results)
    report.end(ceiling={"mfu": 1.0})
    sys.exit(failed)


def make_model(
    folder: Path, shape: Shape, device: torch.device, dtype: torch.dtype, *, max_length: int
) -> Path:
    """A folder with random weights of this shape, and a tokenizer, of which only its BOS is needed."""
    name = "-".join(str(size) for size in vars(shape).values())
    made = folder / f"model-{name}-{max_length}"
    if not made.exists():
        unfinished = made.with_name(f"{made.name}.unfinished")
        shape.model(device=device, dtype=dtype, max_length=max_length).save_pretrained(unfinished)
        train_tokenizer(["a text of random tokens"], vocab_size=300).save_pretrained(unfinished)
        unfinished.rename(made)
    return made


def make_documents(folder: Path, shape: Shape, *, tokens: int) -> Path:
    """A file with so many random tokens, a document a line."""
    made = folder / f"documents-{shape.vocabulary}-{tokens}.jsonl"
    if not made.exists():
        random = np.random.default_rng(0)
        unfinished = made.with_suffix(".unfinished")
        with unfinished.open("w") as stream:
            for length in document_lengths(tokens, seed=0).tolist():
                ids = random.integers(2, shape.vocabulary, size=length).tolist()  # 0 is EOS, 1 BOS
                stream.write(json.dumps({"input_ids": ids, "source": [{"end": length}]}) + "\n")
        unfinished.rename(made)
    return made


class Run:
    """One run of `train.py` on one process."""

    def __init__(self, folder: Path, *, row_length: int, zero_stage: int):
        self.row_length, self.zero_stage = row_length, zero_stage
        name = f"run-{row_length}-zero{zero_stage}"
        tries = len(list(folder.glob(f"{name}-*.log")))
        self.output = folder / f"{name}-{tries + 1}"
        self.log = folder / f"{self.output.name}.log"
        self.folder = folder
        self.failed = False

    def start(
        self, model: Path, data: Path, *, steps: int, precision: str, more: list[str]
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            *(sys.executable, "-m", "anchor_context.launch", "--num_processes", "1"),
            *("--config_file", str(self._launch_config()), "--main_process_port", str(port)),
            *("train.py", "--model_name_or_path", str(model), "--dataset", str(data)),
            *("--data-format", "tokenized", "--seq-length", str(self.row_length)),
            *("--attention_pattern", "anchor", "--mixed_precision", precision),
            *("--max-train-steps", str(steps), "--output-dir", str(self.output)),
            *("--cache_dir", str(self.folder / "rows"), *more),
        ]
        self.started = time.monotonic()
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _launch_config(self) -> Path:
        """One process on whatever there is, with this stage of ZeRO."""
        launch = yaml.safe_load((ROOT / "accelerate_configs/cpu.yaml").read_text())
        launch["deepspeed_config"] |= {
            "deepspeed_config_file": f"accelerate_configs/zero{self.zero_stage}.json",
            "zero3_init_flag": self.zero_stage == 3,
        }
        path = self.folder / f"zero{self.zero_stage}.yaml"
        path.write_text(yaml.safe_dump(launch))
        return path

    def results(self, *, steps: int, at_most_seconds: float):
        """After every step but the first, what the run came to; until it ends, or is ended at its time."""
        told = 0
        first_step_s = None
        try:
            while True:
                ended = self.process.poll() is not None
                late = time.monotonic() - self.started > at_most_seconds
                records = read_metrics(self.output / "metrics.jsonl")
                if records and first_step_s is None:
                    first_step_s = time.monotonic() - self.started
                if len(records) > told:
                    told = len(records)
                    if told > 1:
                        yield self._result(records, start_s=first_step_s)
                if ended or late:
                    break
                time.sleep(0.2)
        finally:
            self._end()
        if self.process.returncode != 0:
            self.failed = ended
            why = "it failed" if ended else "its time was over"
            print(f"run of {self.row_length:,} tokens: {told} of {steps} steps, then {why}:")
            print("\n".join(self.log.read_text(errors="replace").splitlines()[-15:]), flush=True)

    def _result(self, records: list[dict], *, start_s: float | None) -> dict:
        settings = json.loads((self.output / "args.json").read_text())
        counted = records[WARM_UP_STEPS:] or records[-1:]

        def median(key: str) -> float | None:
            values = [r[key] for r in counted if r.get(key) is not None]
            return statistics.median(values) if values else None

        return {
            "row_length": self.row_length,
            "zero_stage": self.zero_stage,
            "kernel": settings["kernel"],
            "steps": len(counted),
            "step_s": median("step_seconds"),
            "tokens_per_second": median("tokens_per_second"),
            "mfu": median("mfu"),
            "micro_batches": median("micro_batches"),
            "peak_bytes": max(r["peak_memory_bytes"] for r in records),
            "planned_peak_bytes": planned_peak(settings["memory"]),
            "start_s": start_s,
            "loss": records[-1]["loss"],
        }

    def _end(self) -> None:
        """Nothing of the run is left: the next one plans with the memory that is free."""
        ranks = []
        if self.process.poll() is None:
            ranks = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for process in ranks:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        psutil.wait_procs(ranks, timeout=30)


def planned_peak(memory: dict) -> int | None:
    """The bytes that a memory plan in `args.json` expects at its peak; None where it expects nothing."""
    peak = memory.get("peak")
    return sum(peak["parts"].values()) if peak else None


def show(results: list[dict]) -> None:
    def gib(size: int | None) -> str:
        return "-" if size is None else f"{size / 2**30:.1f}"

    print_table(
        {
            "row": [f"{r['row_length']:,}" for r in results],
            "ZeRO": [r["zero_stage"] for r in results],
            "kernel": [r["kernel"] for r in results],
            "steps": [r["steps"] for r in results],
            "step s": [f"{r['step_s']:.2f}" for r in results],
            "tokens/s": [f"{r['tokens_per_second']:,.0f}" for r in results],
            "MFU": ["-" if r["mfu"] is None else f"{r['mfu']:.1%}" for r in results],
            "peak GiB": [gib(r["peak_bytes"]) for r in results],
            "planned": [gib(r["planned_peak_bytes"]) for r in results],
        }
    )


if __name__ == "__main__":
    main()
