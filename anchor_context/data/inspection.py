"""What is in a prepared set: lengths, sources, cuts, the work that each pattern leaves, a few rows.

Costs: reads the pieces of at most `ROWS_MEASURED` rows, evenly spread, and the decoded rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anchor_context.attention.patterns import PATTERNS, attended_pairs
from anchor_context.data.rows import DOCUMENT_LENGTHS, PreparedRows, Row
from anchor_context.layout import IGNORE_INDEX
from anchor_context.run.work import ModelWork

ROWS_MEASURED = 2000
MOST_SOURCES = 40
"""Lines of the table of sources."""
SHOWN = 40
"""Characters of a piece's beginning and end, and so many tokens are decoded for them."""

LLAMA_7B_WORK = ModelWork(matmul_parameters=6_600_000_000, attention_width=32 * 4096)
"""LLaMA-2-7B's, whose layers have no window: the model that the estimated speed-up of a whole step is for."""


@dataclass(frozen=True)
class Inspection:
    """The figures of a prepared set."""

    report: dict
    lengths: np.ndarray
    """(documents,) tokens of each document laid."""
    mask_share: dict[str, float]
    """Pattern -> the pairs it attends to, as a share of full causal attention's."""
    attention_speedup: float
    """Full attention's pairs over `anchor`'s: the bound of what attention alone can gain."""
    step_speedup: float
    """The same for the floating-point work of a training step of LLaMA-2-7B."""

    @classmethod
    def of(cls, prepared: PreparedRows) -> Inspection:
        """Measure a prepared set."""
        chosen = np.unique(np.linspace(0, len(prepared) - 1, ROWS_MEASURED, dtype=int))
        rows = [prepared.row(i).document_lengths() for i in chosen]
        placed = "shared" if prepared.anchor_placement == "shared" else "per_document"
        pairs = {
            name: sum(
                attended_pairs(lengths, pattern=name, anchor_placement=pattern.placement(placed))
                for lengths in rows
            )
            for name, pattern in PATTERNS.items()
        }
        tokens = len(rows) * prepared.row_length
        work = {
            pattern: LLAMA_7B_WORK.flops(tokens=tokens, pairs=count)
            for pattern, count in pairs.items()
        }
        return cls(
            report=prepared.report,
            lengths=np.load(prepared.directory / DOCUMENT_LENGTHS),
            mask_share={pattern: count / pairs["full"] for pattern, count in pairs.items()},
            attention_speedup=pairs["full"] / pairs["anchor"],
            step_speedup=work["full"] / work["anchor"],
        )

    @property
    def cut_share(self) -> float:
        """Documents that a row's end cuts, as a share of all."""
        return self.report["documents_cut"] / self.report["documents"]

    def histogram(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(edges, documents, tokens) by length: edges are powers of two, a bin holds [edge, next)."""
        highest = int(np.log2(self.lengths.max())) + 1
        edges = 2 ** np.arange(int(np.log2(self.lengths.min())), highest + 1)
        documents, _ = np.histogram(self.lengths, edges)
        tokens, _ = np.histogram(self.lengths, edges, weights=self.lengths)
        return edges, documents, tokens

    def __str__(self) -> str:
        report = self.report
        lines = [
            f"{report['rows']:,} rows of {report['row_length']:,} tokens, anchors "
            f"{report['anchor_placement']}, packing {report['strategy']}",
            f"{report['documents']:,} documents, {report['document_tokens']:,} tokens; "
            f"{report['anchors_added']:,} anchors added, {report['pad_tokens']:,} padding "
            f"({report['pad_tokens'] / (report['rows'] * report['row_length']):.2%}), "
            f"{report['skipped_documents']:,} bad documents skipped, special tokens written in texts: "
            f"{report.get('special_tokens_as_text', 0):,} are text, "
            f"{report.get('special_tokens_parsed', 0):,} were taken for the tokens",
            f"documents cut by a row's end: {report['documents_cut']:,} ({self.cut_share:.1%})",
            "",
            "document length (tokens)   documents",
        ]
        edges, documents, _ = self.histogram()
        for low, high, count in zip(edges[:-1], edges[1:], documents, strict=True):
            bar = "█" * round(40 * count / documents.max())
            lines.append(f"{low:>11,} – {high - 1:<11,} {count:>11,} {bar}")
        lines += ["", *source_lines(report)]
        lines += ["", "pattern            share of full attention's work"]
        lines += [f"{pattern:<16} {share:>8.2%}" for pattern, share in self.mask_share.items()]
        lines += [
            "",
            f"estimated speed-up of anchor over full: attention alone {self.attention_speedup:.1f}×, "
            f"a training step of LLaMA-2-7B {self.step_speedup:.2f}× (by floating-point work)",
        ]
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """Write the histogram, the sources and the patterns' work as a PNG."""
        import matplotlib  # here, because `prepare` and its worker processes never plot

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        several = len(self.report["sources"]) > 1  # the shares of one source say nothing
        figure, (lengths, work, *sources) = plt.subplots(
            1, 2 + several, figsize=(10 + 5 * several, 4.5), layout="constrained"
        )
        edges, documents, tokens = self.histogram()
        share = [documents / documents.sum(), tokens / tokens.sum()]
        for values, name in zip(share, ("documents", "tokens"), strict=True):
            lengths.stairs(values, edges, label=name, fill=name == "documents", alpha=0.7)
        lengths.set(xlabel="document length (tokens)", ylabel="share of all")
        # Of powers of ten a set may span one, and show one number.
        lengths.set_xscale("log", base=2)
        lengths.xaxis.set_major_formatter("{x:,.0f}")
        lengths.set_title("document lengths")
        lengths.axvline(self.report["row_length"], color="grey", linestyle=":", label="row length")
        lengths.legend()
        colours = [PATTERNS[pattern].colour for pattern in self.mask_share]
        shares = [100 * share for share in self.mask_share.values()]
        work.bar(list(self.mask_share), shares, color=colours)
        work.set(ylabel="% of full attention's work", title="patterns")
        work.tick_params(axis="x", rotation=20)
        for axes in sources:
            tokens_of = self.report["sources"]
            largest = sorted(tokens_of, key=lambda name: tokens_of[name])[-12:]
            shares = [100 * tokens_of[name] / sum(tokens_of.values()) for name in largest]
            axes.barh([name[:24] for name in largest], shares)
            axes.set(xlabel="% of the tokens", title="sources")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def source_lines(report: dict) -> list[str]:
    """A table of the largest sources: tokens laid, and their share of all before and after sampling."""
    tokens, shares = report["sources"], report["source_shares"]
    names = sorted(tokens, key=lambda name: -tokens[name])
    lines = ["source                          tokens   share  as read"]
    lines += [
        f"{name[:24]:<24} {tokens[name]:>14,} {shares[name]['after']:>7.1%} {shares[name]['before']:>8.1%}"
        for name in names[:MOST_SOURCES]
    ]
    return lines + [f"and {len(names) - MOST_SOURCES:,} smaller ones"] * (len(names) > MOST_SOURCES)


def describe_row(row: Row, tokenizer) -> str:
    """A row decoded, a line per piece: where it lies, its targets, its first and last characters."""
    labels, lines = row.labels(), []
    for piece, (start, end) in enumerate(zip(row.starts.tolist(), row.ends.tolist(), strict=True)):
        targets = int((labels[start:end] != IGNORE_INDEX).sum())
        head, tail = (
            repr(tokenizer.decode(ids))[1:-1]
            for ids in (row.tokens[start:end][:SHOWN], row.tokens[start:end][-SHOWN:])
        )
        text = head[:SHOWN] if end - start <= SHOWN else f"{head[:SHOWN]} … {tail[-SHOWN:]}"
        what = f"document {row.documents[piece]}" if piece < row.document_pieces else "padding"
        lines.append(f"  [{start:>7,}, {end:>7,})  {what:<13} {targets:>7,} targets  {text}")
    last = row.tokens[-1]
    if last >= 0:
        lines.append(f"  goes on in another row with {tokenizer.decode([int(last)])!r}")
    return "\n".join(lines)
