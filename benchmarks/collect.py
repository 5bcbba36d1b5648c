"""Puts what benchmarks kept (`--keep`) into benchmarks/results: a file per device, and README.md's tables.

    python benchmarks/collect.py FILE … [--results FOLDER] [--commit COMMIT]
    python benchmarks/collect.py                 # only writes the tables again

A result takes the place of an earlier one of the same case; all others stay, so a device's file grows over
several calls, and says of every result when, with what and how it was measured. `--commit` is for results of
a copy of the checkout that had no git.

Guarantees: the tables show what a file says; a figure that no file has is "not yet measured".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MARKS = "<!-- measured on GPUs: written by benchmarks/collect.py -->", "<!-- end -->"
UNKNOWN = "not yet measured"
KEPT = {"benchmark", "hardware", "date", "commit", "versions", "command"}
"""What every line has beside its result."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="of --keep, or <gpu>.json files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write into")
    parser.add_argument("--commit", help="of results that name none")
    flags = parser.parse_args()
    lines = [line for path in flags.files for line in read(path)]
    for line in lines:
        line["commit"] = line["commit"] or flags.commit
    for device in sorted({line["hardware"] for line in lines}):
        save([line for line in lines if line["hardware"] == device], flags.results)
    write_tables(flags.results)


def read(path: Path) -> list[dict]:
    """The results in a file: a device's `.json`, as from another machine, or lines as `--keep` writes them.

    A line that is none, as one that a killed process began, is told and left out. The last line of a
    benchmark that keeps nothing itself counts as one result, of all it found.
    """
    if path.suffix == ".json":
        return json.loads(path.read_text())["results"]
    found = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict) or not line.keys() >= KEPT:
            print(f"{path}:{number} is left out: it is no result", file=sys.stderr)
            continue
        if "result" not in line:
            all_found = {key: line.pop(key) for key in set(line) - KEPT}
            line |= {"case": [], "result": all_found}
        found.append(line)
    return found


def save(lines: list[dict], folder: Path) -> None:
    """Merge one device's results into its file, named after it."""
    hardware = lines[0]["hardware"]
    name = re.sub(r"[^a-z0-9]+", "-", hardware.split(",")[0].lower()).strip("-")
    path = folder / f"{name}.json"
    before = json.loads(path.read_text())["results"] if path.exists() else []
    merged = {case_of(line): line for line in before}
    for line in lines:
        merged[case_of(line)] = line
    results = ",\n".join(json.dumps(line) for line in merged.values())
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"hardware": {json.dumps(hardware)}, "results": [\n{results}\n]}}\n')
    print(f"-> {path}")


def case_of(line: dict) -> tuple:
    """What was measured."""
    return (line["benchmark"], *((key, line["result"][key]) for key in line["case"]))


# --- the tables -----------------------------------------------------------------------------------


def write_tables(folder: Path) -> None:
    """Between the marks of the folder's README.md, if it has one."""
    readme = folder / "README.md"
    if not readme.exists():
        return
    head, rest = readme.read_text().split(MARKS[0])
    _, tail = rest.split(MARKS[1])
    readme.write_text(f"{head}{MARKS[0]}\n\n{tables(folder)}\n\n{MARKS[1]}{tail}")
    print(f"-> {readme}")


def tables(folder: Path) -> str:
    """Markdown: of every device all it has."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    parts = [part for record in records for part in of_device(Lines(record))]
    return "\n\n".join(parts or [f"Any GPU: {UNKNOWN}."])


class Lines:
    """The results in one device's file."""

    def __init__(self, record: dict):
        self.hardware, self.lines = record["hardware"], record["results"]
        self.origins: list[str] = []
        """Where results come from, in the order of their marks."""

    def of(self, benchmark: str, order: Callable[[dict], object]) -> list[tuple[dict, str]]:
        """(result, the mark of where it comes from), sorted."""
        found = [line for line in self.lines if line["benchmark"] == benchmark]
        found.sort(key=lambda line: order(line["result"]))
        return [(line["result"], self.mark(line)) for line in found]

    def mark(self, line: dict) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
        commit = line["commit"] or "unknown"
        origin = f"{line['date']}, commit {commit}: {line['command']} ({versions})"
        if origin not in self.origins:
            self.origins.append(origin)
        return f"[{self.origins.index(origin) + 1}]"


def of_device(lines: Lines) -> list[str]:
    """Markdown paragraphs and tables."""
    parts = [
        f"### {lines.hardware}",
        *attention(lines),
        *steps(lines),
        *runs(lines),
        *longest(lines),
        *tests(lines),
    ]
    origins = [f"* [{i}] {origin}" for i, origin in enumerate(lines.origins, 1)]
    return [*parts, "\n".join(["Where the figures come from:", "", *origins])]


def attention(lines: Lines) -> list[str]:
    def order(r: dict) -> tuple:
        return (-r["head_dim"], -r["row_length"], r["pattern"], r["kernel"])

    found = lines.of("attention", order)
    rates = {round(r["matmul_flops_per_second"] / 1e12) for r, _ in found}
    title = "**Attention**, forward and backward: ms (TFLOP/s)"
    if rates:
        title += f"; one large matrix product: {' to '.join(map(str, sorted(rates)))} TFLOP/s"

    def cell(r: dict, way: str) -> str:
        milliseconds = r[f"{way}_s"] * 1e3
        digits = 1 if milliseconds < 100 else 0
        return f"{milliseconds:,.{digits}f} ({r[f'{way}_flops_per_second'] / 1e12:.0f})"

    rows = [
        {
            "heads": f"{r['heads']}/{r['kv_heads']} × {r['head_dim']}",
            "row": f"{r['row_length']:,}",
            "pattern": f"`{r['pattern']}`",
            "share of the pairs": f"{r['mask_share']:.3g}",
            "kernel": f"`{r['kernel']}`",
            "forward": cell(r, "forward"),
            "backward": cell(r, "backward"),
            "": mark,
        }
        for r, mark in found
    ]
    return section(title, rows)


def steps(lines: Lines) -> list[str]:
    def order(r: dict) -> tuple:
        return (r["row_length"], r["variant"], r["plan"], r["kernel"])

    rows = [
        {
            "row": f"{r['row_length']:,}",
            "variant": f"`{r['variant']}`",
            "plan": r["plan"],
            "kernel": f"`{r['kernel']}`",
            "s": seconds(r),
            "tokens/s": number(r.get("tokens_per_second")),
            "MFU": percent(r.get("mfu")),
            "GiB": gib(r["peak_bytes"]),
            "": mark,
        }
        for r, mark in lines.of("train_step", order)
    ]
    return section("**A training step**, LLaMA-3.2-1B's sizes (`train_step.py`)", rows)


def runs(lines: Lines) -> list[str]:
    rows = [
        {
            "row": f"{r['row_length']:,}",
            "ZeRO": r["zero_stage"],
            "kernel": f"`{r['kernel']}`",
            "steps": r["steps"],
            "s": seconds(r),
            "tokens/s": number(r["tokens_per_second"]),
            "MFU": percent(r["mfu"]),
            "GiB": gib(r["peak_bytes"]),
            "planned": gib(r["planned_peak_bytes"]),
            "": mark,
        }
        for r, mark in lines.of("train_run", lambda r: (r["row_length"], r["zero_stage"]))
    ]
    return section("**`train.py` itself**, the same sizes (`train_run.py`)", rows)


def longest(lines: Lines) -> list[str]:
    rows = [
        {
            "document": f"{r['document_tokens']:,} tokens",
            "did not fit": number(r["out_of_memory_at"]),
            "plan": r["plan"],
            "kernel": f"`{r['kernel']}`",
            "s": seconds(r),
            "tokens/s": number(r["tokens_per_second"]),
            "MFU": percent(r["mfu"]),
            "GiB": gib(r["peak_bytes"]),
            "": mark,
        }
        for r, mark in lines.of("longest", lambda r: r["kernel"])
    ]
    return section(
        "**The longest single document** that trained, the same sizes (`longest.py`)", rows
    )


def tests(lines: Lines) -> list[str]:
    rows = [
        {
            "tests": r["selection"],
            "passed": r["passed"],
            "failed": r["failed"] + r["error"],
            "skipped": r["skipped"],
            "s": f"{r['seconds']:.0f}" + " (ended)" * (not r["finished"]),
            "": mark,
        }
        for r, mark in lines.of("tests", lambda r: r["selection"])
    ]
    return section("**`tests/gpu`**", rows)


def section(title: str, rows: list[dict]) -> list[str]:
    """A title and a table with the keys of the rows as its head."""
    if not rows:
        return [f"{title}: {UNKNOWN}."]
    head = list(rows[0])
    body = [f"| {' | '.join(str(row[key]) for key in head)} |" for row in rows]
    return [f"{title}:", "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *body])]


def seconds(r: dict) -> str:
    """Of a step; where it has none, why."""
    taken = r["step_s"]
    if isinstance(taken, list):  # several were measured, and nobody kept which
        return " to ".join(f"{one:.3g}" for one in taken)
    return f"{taken:.3g}" if taken else r.get("note", "out of memory")


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def gib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**30:.1f}"


if __name__ == "__main__":
    main()
