"""Validation while a run trains: loss on documents that it is not trained on, in two views.

    packed    rows laid as those of training, in its pattern: what training sees
    alone     each document behind a BOS at position 0, plain causal attention: what a user of the model gets

Both are means over all targets, whole and by the target's position in its document (`perplexity.py`). In the
packed view a document that goes on in another row counts anew there. Alone it does not: its first tokens
count, as many as a row has. `python -m anchor_context.evaluate ppl --every_document` measures the same on a
saved model.

The two are one computation: documents alone are rows with an anchor before every document, computed in the
pattern `intra_doc_reset`, to which an anchor is its document's own first token. So every engine, layout and
treatment of the memory that trains also validates.

Guarantees: the same numbers, to float32 rounding, for every number of ranks, layout and size of micro-batch,
because they are sums over targets, in float64, over their number. Training goes on bit for bit as if nothing
had been validated: no gradient, no random number, no row of the training data is touched. A validation that
was broken off is made by the resumed run.
Costs: two forwards of the evaluation data, in the micro-batches of training; a worker process for each; one
all-reduce.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from anchor_context.data.fingerprint import origin
from anchor_context.data.held_out import HELD_OUT
from anchor_context.data.options import DataOptions
from anchor_context.data.prepare import prepare_rows
from anchor_context.data.rows import PreparedRows, is_prepared, open_rows
from anchor_context.evaluate.perplexity import first_positions, sums_by_position
from anchor_context.files import warn, whole
from anchor_context.layout import IGNORE_INDEX, DocumentLayout
from anchor_context.parallel.traffic import Traffic
from anchor_context.run.agreement import on_one_rank
from anchor_context.run.folder import validation_of
from anchor_context.run.metrics import StepLog, read_metrics

ALONE = "intra_doc_reset"
"""The pattern of the documents alone."""


# --------------------------------------------------------------------------------------------------
# The data.


class View(NamedTuple):
    """Rows, and the pattern that they are computed in."""

    rows: PreparedRows
    pattern: str


def prepare_views(
    dataset: str, options: DataOptions, *, anchor_placement: str, **how
) -> dict[str, Path]:
    """Prepare the rows of both views, each with an entry of its own in the cache: their folders, by view.

    Args:
        dataset: as `prepare_rows` takes it, but documents.
        options: of the training data. Nothing is sampled here: every document counts once.
        anchor_placement: that of training, for the packed view.
        how: further arguments of `prepare_rows`.

    Raises:
        ValueError: as `prepare_rows`, or `dataset` is prepared rows, of which no other view can be made.
    """
    if is_prepared(Path(dataset)):
        raise ValueError(
            f"--eval_dataset {dataset} is prepared rows: name the documents that they were made of, which "
            "validation lays in two ways"
        )
    source = options.source_column if options.domain_tag else None
    packed = replace(
        options, eval_documents=None, upsample_long=None, mixture=None, source_column=source
    )
    # Whole documents, as far as a row reaches.
    alone = replace(
        packed, packing="best_fit", interleave_chunks=False, domain_tag=False, source_column=None
    )
    rows = {"packed": (packed, anchor_placement), "alone": (alone, "per_document")}
    try:
        return {
            view: prepare_rows(dataset, laid, anchor_placement=placement, **how).directory
            for view, (laid, placement) in rows.items()
        }
    except ValueError as error:  # the same mistakes, in other data
        raise ValueError(str(error).replace("--dataset", "--eval_dataset")) from error


def prepare_held_out_views(training: PreparedRows, options: DataOptions, **how) -> dict[str, Path]:
    """As `prepare_views`, of the documents that the rows of training left out (`--eval_documents`)."""
    options = replace(options, data_format="tokenized")
    return prepare_views(str(training.directory / HELD_OUT), options, **how)


def open_views(folders: dict[str, Path], *, pattern: str) -> dict[str, View]:
    """Both views, of the folders that `prepare_views` gave; none of none.

    Args:
        pattern: of training.

    Raises:
        ValueError: there is no target.
    """
    if not folders:
        return {}
    views = {
        "packed": View(open_rows(folders["packed"]), pattern),
        "alone": View(open_rows(folders["alone"], anchor_placement="none"), ALONE),
    }
    for rows, _ in views.values():
        if not rows.report["targets"]:
            raise ValueError(
                f"--eval_dataset: no token of the rows ({rows.directory}) has a target, for every document "
                "is a single token; there is nothing to validate on"
            )
    return views


def files_trained_on(views: dict[str, View], training: PreparedRows) -> list[str]:
    """The files to validate on whose content is that of a file that is trained on, whatever its name."""
    contents = {entry.get("content") for entry in training.fingerprint["data"]} - {None}
    data = views["packed"].rows.fingerprint["data"] if views else []
    return [entry["path"] for entry in data if entry.get("content") in contents]


def with_target_positions(batch: dict, *, beginnings: bool = False) -> dict:
    """The batch with its `target_positions`, (B, S) int64: how many tokens stand before the target in its
    document, the anchor counted; 0 where there is no target.

    Args:
        beginnings: leave out the targets of documents that began in another row. In rows with an anchor per
            document these are the ones whose anchor has no target.
    """
    layout, labels = batch["layout"], batch["labels"]
    if beginnings:
        begins = labels.flatten()[layout.cu_seqlens[:-1].long()] != IGNORE_INDEX
        labels = labels.where(begins[layout.document_ids.long()], IGNORE_INDEX)
    positions = _place_in_document(layout).where(labels != IGNORE_INDEX, 0)
    return batch | {"labels": labels, "target_positions": positions}


def _place_in_document(layout: DocumentLayout) -> Tensor:
    """(B, S) int64: the token's number in its document, from 1; behind a shared anchor from 2."""
    documents = layout.document_ids.flatten().numpy()
    order = np.argsort(documents, kind="stable")  # chunks of interleaved documents lie apart
    in_order = documents[order]
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order)) - np.searchsorted(in_order, in_order)
    first = 1 + (layout.anchor_placement == "shared")
    return torch.from_numpy(places + first).view_as(layout.document_ids)


# --------------------------------------------------------------------------------------------------
# Measuring.


class Validation:
    """The validations of a run: when they are due, what they find, and the best model.

        validation = Validation(accelerator, views, log, …)
        if not validation.at(step, stop=guard.requested):  # measures, if a validation is due
            ...                                            # somebody asked to stop: it was broken off

    To be made, and called, by all ranks alike. Without views it does nothing.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        views: dict[str, View],
        log: StepLog,
        model: torch.nn.Module,
        *,
        metrics: Path,
        batches: Callable[..., Iterable[dict]],
        share: Callable[[dict], dict],
        treat: Callable[[int], object],
        traffic: Traffic,
        every: int | None,
        first_step: int,
        last_step: int,
        best: Path | None,
        save: Callable[..., None],
    ):
        """
        Args:
            views: from `open_views`.
            log: of the run. metrics: its file, as the log found it.
            model: a `CausalLMWithLoss`, prepared by Accelerate.
            batches: `make_loader` with what says how ranks share a step; rows and pattern are the view's.
            share: makes of a batch what this rank computes of it (`shard_batch`).
            treat: gives the next forward its treatment of the memory, by the micro-batch's planned tokens.
            traffic: of the engine; what validation adds is taken out again.
            every: steps between validations; None: at the last step alone.
            first_step: of steps done already.
            best: where the model of the lowest packed loss is kept; None: nobody wants it.
            save: `save(best, validation=…)` saves the model there, and what was found of it. Collective.
        """
        self.accelerator, self.views, self.log, self.model = accelerator, views, log, model
        self.treat, self.traffic = treat, traffic
        self.every, self.last_step = every, last_step
        self.best, self.save = best, save
        self.broken = False
        """Whether the last one found a loss that is not finite: no training step may follow to show it."""
        self._lowest, self._done = None, first_step
        if views:
            self._rows = origin(views["packed"].rows.fingerprint)
            record = partial(_recorded, metrics, first_step, best=best, rows=self._rows)
            self._lowest, owed = on_one_rank(accelerator, record)
            self._done = None if owed else first_step
        self._batches, self._firsts = {}, {}
        for name, (rows, pattern) in views.items():
            transform = partial(_prepared_for_rank, beginnings=name == "alone", share=share)
            self._batches[name] = batches(
                rows, pattern=pattern, total_rows=len(rows), transform=transform
            )
            self._firsts[name] = first_positions(rows.longest_document)

    def owes(self, step: int) -> bool:
        """Whether behind `step` steps a validation is due, and not done yet."""
        due = step == self.last_step or (self.every is not None and step % self.every == 0)
        return bool(self.views) and due and step != self._done

    def at(self, step: int, *, stop: Callable[[], bool]) -> bool:
        """Validate, if `step` owes it: into the log, and the best model to its place. Collective.

        Args:
            stop: whether somebody asks the run to stop; the same answer on all ranks. Collective.

        Returns:
            False where it was broken off, because somebody asked the run to stop.
        """
        if not self.owes(step):
            return True
        self.broken = False
        with self.log.pause("validating"):
            figures = self.measure(stop)
            if figures is None:
                return False
            loss = figures["eval_loss"]
            self.broken = loss is None
            if loss is not None and (self._lowest is None or loss < self._lowest):
                self._lowest = loss
                if self.best is not None:
                    found = {"step": step, "eval_loss": loss, "rows": self._rows}
                    self.save(self.best, validation=found)
            # Last, so that whatever ends the run before it is done again by the resumed one.
            self.log.validation(step, figures)
        self._done = step
        return True

    def measure(self, stop: Callable[[], bool]) -> dict | None:
        """What goes into the record, or None where it was broken off. Collective."""
        began = time.perf_counter()
        self.model.eval()
        try:
            sums = [self._sums(view, stop) for view in self.views]
        finally:
            self.model.train()
            self.traffic.take()
        if any(one is None for one in sums):
            return None
        found = dict(zip(self.views, self._over_ranks(sums), strict=True))
        assert found["packed"][1].sum() == self.views["packed"].rows.report["targets"]
        figures = _figures("", self._firsts["packed"], found["packed"])
        figures |= _figures("_alone", self._firsts["alone"], found["alone"])
        return figures | {"eval_seconds": time.perf_counter() - began}

    @torch.no_grad()
    def _sums(self, view: str, stop: Callable[[], bool]) -> Tensor | None:
        """This rank's (2, ranges) float64, as `sums_by_position`; None where it was broken off."""
        device, firsts = self.accelerator.device, self._firsts[view]
        sums = torch.zeros(2, len(firsts), dtype=torch.float64, device=device)
        for batch in self._batches[view]:
            if stop():
                return None
            inputs = {
                key: batch[key].to(device, non_blocking=True)
                for key in ("input_ids", "position_ids", "labels", "layout")
            }
            self.treat(batch["planned_tokens"])
            losses, _ = self.model(**inputs, per_token=True)
            positions = batch["target_positions"].to(device, non_blocking=True).flatten()
            sums += sums_by_position(losses, positions, firsts)
        return sums

    def _over_ranks(self, sums: list[Tensor]) -> list[Tensor]:
        """Their sums over all ranks, on the CPU, by one all-reduce."""
        sizes = [len(one.T) for one in sums]
        total = self.accelerator.reduce(torch.cat(sums, dim=1), "sum")
        return [*total.cpu().split(sizes, dim=1)]


def _prepared_for_rank(batch: dict, *, beginnings: bool, share: Callable[[dict], dict]) -> dict:
    return share(with_target_positions(batch, beginnings=beginnings))


def _recorded(
    metrics: Path, step: int, *, best: Path | None, rows: dict
) -> tuple[float | None, bool]:
    """(the validation loss of the model at `best`; whether the record of `step` is there without one).

    A model of a later step is of a course that the run has left, and a loss on other rows is not compared:
    the run has no best model yet.
    """
    kept = None if best is None else validation_of(best)
    same = kept and kept["step"] <= step and kept.get("rows", rows) == rows
    lowest = kept["eval_loss"] if same else None
    records = read_metrics(metrics)
    last = records[-1] if records else {}
    return lowest, last.get("step") == step and "eval_loss" not in last


def _figures(view: str, firsts: list[int], sums: Tensor) -> dict:
    """The record's keys of one view; what is not finite, or of no target, is null."""
    totals, targets = sums.numpy()
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        loss = totals.sum() / targets.sum()
        perplexity, by_position = np.exp(loss), totals / targets
    return {
        f"eval_loss{view}": _number(loss),
        f"eval_perplexity{view}": _number(perplexity),
        f"eval_targets{view}": int(targets.sum()),
        f"eval_loss{view}_by_position": {
            str(first): _number(mean) for first, mean in zip(firsts, by_position, strict=True)
        },
    }


def _number(value: np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None


# --------------------------------------------------------------------------------------------------
# The picture.


def plot_positions(metrics: Path, plot: Path) -> None:
    """Draw the loss by position of all validations in the record, as a PNG; none without one. A message where
    the disk refuses."""
    from anchor_context.evaluate.plots import loss_by_position  # matplotlib, at the end alone

    records = [r for r in read_metrics(metrics) if "eval_loss_by_position" in r]
    if not records:
        return
    figure = loss_by_position(records)
    try:
        with whole(plot) as unfinished:
            figure.savefig(unfinished, dpi=120, format="png")
    except OSError as error:
        warn(f"{plot} not written: {error.strerror} (errno {error.errno})")
