"""Puts what `gpu.sh` measured into benchmarks/results: one JSON file per device, and README.md's table.

    python benchmarks/collect.py FOLDER     # of <benchmark>.json lines and pytest's tests.log
    python benchmarks/collect.py            # only writes the table again

Guarantees: the table shows what a file says; a figure that no file has is "not yet measured".
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MARKS = "<!-- measured on GPUs: written by benchmarks/collect.py -->", "<!-- end -->"
UNKNOWN = "not yet measured"


def main() -> None:
    if len(sys.argv) > 1:
        save(Path(sys.argv[1]))
    readme = RESULTS / "README.md"
    head, rest = readme.read_text().split(MARKS[0])
    _, tail = rest.split(MARKS[1])
    readme.write_text(f"{head}{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}{tail}")
    print(f"-> {readme}")


def save(folder: Path) -> None:
    """One file of all the benchmarks' lines, named after the device; what is no such line is left out."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        try:
            line = json.loads(path.read_text())
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict) and "benchmark" in line:
            lines.append(line)
        else:
            print(f"{path.stem} is left out: its last line is no result", file=sys.stderr)
    on_gpu = [line["hardware"] for line in lines if line["benchmark"] != "packing"]
    if not on_gpu:
        sys.exit("error: no benchmark finished; nothing written")
    tests = (folder / "tests.log").read_text().splitlines()[-1:]
    if not any(word in line for line in tests for word in ("passed", "failed", "skipped")):
        tests = ["did not finish"]  # pytest's last line tells how many; it was ended before
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    name = re.sub(r"[^a-z0-9]+", "-", on_gpu[0].split(",")[0].lower()).strip("-")
    record = {
        "hardware": on_gpu[0],
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() or None,
        "tests": tests[0],
        "benchmarks": lines,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"-> {path}")


def table() -> str:
    """Markdown: a row per figure, a column per device."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    devices = [f"{record['hardware']} ({record['date']})" for record in records] or ["any GPU"]
    lines = [f"| | {' | '.join(devices)} |", "|---" * (len(devices) + 1) + "|"]
    for title, figure in FIGURES.items():
        cells = [figure(Lines(record)) or UNKNOWN for record in records] or [UNKNOWN]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


class Lines:
    """The results in one device's file."""

    def __init__(self, record: dict):
        self.record = record
        self.of = {line["benchmark"]: line for line in record["benchmarks"]}

    def results(self, benchmark: str, **wanted) -> list[dict]:
        """The results of a benchmark that have these values, in the order of the file."""
        found = self.of.get(benchmark, {}).get("results", [])
        return [r for r in found if all(r.get(key) == value for key, value in wanted.items())]


def attention_ratio(lines: Lines) -> str | None:
    """The longest row: anchor's time over full's, of the first kernel, next to the mask's share."""
    anchors = lines.results("attention", engine="flash", pattern="anchor")
    if not anchors:
        return None
    longest = max(r["row_length"] for r in anchors)
    anchor = next(r for r in anchors if r["row_length"] == longest)
    (full,) = lines.results(
        "attention", kernel=anchor["kernel"], pattern="full", row_length=longest
    )
    ratio = (anchor["forward_s"] + anchor["backward_s"]) / (full["forward_s"] + full["backward_s"])
    return f"{ratio:.3f} (mask's share {anchor['mask_share']:.3f}; {longest:,} tokens, {anchor['kernel']})"


def step_ratio(lines: Lines) -> str | None:
    anchor, full = (lines.results("train_step", variant=name) for name in ("anchor", "full"))
    if not anchor or not full or not anchor[0]["step_s"] or not full[0]["step_s"]:
        return None
    row = anchor[0]["row_length"]
    return f"{anchor[0]['step_s'] / full[0]['step_s']:.3f} ({row:,} tokens)"


def step_rate(lines: Lines) -> str | None:
    anchor = lines.results("train_step", variant="anchor")
    if not anchor or not anchor[0]["step_s"]:
        return None
    return (
        f"{anchor[0]['tokens_per_second']:,.0f} tokens/s, {anchor[0]['peak_bytes'] / 2**30:.1f} GiB"
    )


def plain_step(lines: Lines) -> str | None:
    plain = lines.results("train_step", variant="plain_hf")
    if not plain:
        return None
    if plain[0]["step_s"] is None:
        return "out of memory"
    rate, peak = plain[0]["tokens_per_second"], plain[0]["peak_bytes"]
    return f"{rate:,.0f} tokens/s, {peak / 2**30:.1f} GiB"


def longest_row(lines: Lines) -> str | None:
    found = lines.results("memory", variant="anchor longest")
    return f"{found[0]['row_length']:,} tokens" if found and found[0]["row_length"] else None


def exponent(lines: Lines) -> str | None:
    value = lines.of.get("memory", {}).get("exponent", {}).get("anchor")
    return None if value is None else f"{value:.3f}"


FIGURES = {
    "attention, `anchor` over `full`, forward and backward": attention_ratio,
    "training step, 1B LLaMA, `anchor` over `full`": step_ratio,
    "training step, 1B LLaMA, `anchor`": step_rate,
    "the same rows in a plain Hugging Face loop": plain_step,
    "longest row that trains, 1B LLaMA": longest_row,
    "exponent of memory over row length (1 is linear)": exponent,
    "`tests/gpu`": lambda lines: lines.record["tests"],
}


if __name__ == "__main__":
    main()
