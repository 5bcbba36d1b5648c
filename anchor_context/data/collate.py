"""What one forward sees, as tensors: whole rows, or whole units of a step's rows laid end to end.

Guarantees: a token's id, label and position are those of its row, wherever it is computed; but where a unit
was cut, positions may count from the cut (`_parts_of`). Both forms take them from the same two places:
`Row.labels` and the layout of the whole row.
Costs: a rank that computes units of a row reads that row once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from anchor_context.attention.patterns import PATTERNS, layout_of_units, make_layout
from anchor_context.data.micro_batches import MicroBatchPlan, Units
from anchor_context.data.rows import PAD_PIECE, PreparedRows, Row
from anchor_context.layout import IGNORE_INDEX


def collate(prepared: PreparedRows, row_ids: np.ndarray, *, pattern: str) -> dict:
    """Whole rows as one micro-batch.

    Returns:
        input_ids, labels, position_ids: (B, S) int64; labels are shifted already and hold
        `IGNORE_INDEX` where there is no target. layout: of the whole rows. row_ids: list of int.
    """
    rows = [prepared.row(int(i)) for i in row_ids]
    length = prepared.row_length
    # Pieces and documents count over the whole micro-batch.
    pieces = [row.pieces() for row in rows]
    first_document = np.cumsum([0, *(documents.max() + 1 for _, documents in pieces)])
    layout = make_layout(
        np.concatenate([starts + b * length for b, (starts, _) in enumerate(pieces)]),
        documents=np.concatenate([ids + first_document[b] for b, (_, ids) in enumerate(pieces)]),
        batch_size=len(rows),
        row_length=length,
        pattern=pattern,
        anchor_placement=prepared.anchor_placement,
    )
    return {
        "input_ids": torch.from_numpy(
            np.stack([row.tokens[:length] for row in rows]).astype(np.int64)
        ),
        "labels": torch.from_numpy(np.stack([row.labels() for row in rows])),
        "position_ids": layout.position_ids,
        "layout": layout,
        "row_ids": [int(row) for row in row_ids],
    }


@dataclass
class StepRows:
    """The rows of a step, out of which micro-batches of units are made."""

    rows: Sequence[Row]
    pattern: str
    anchor_placement: str
    pad_id: int

    def __post_init__(self) -> None:
        self._laid: dict[int, np.ndarray] = {}
        self._documents: dict[tuple[int, int], np.ndarray] = {}

    def collate(
        self, plan: MicroBatchPlan, *, rank: int, index: int, divisible_by: int = 1
    ) -> dict:
        """One micro-batch of the plan: its units in the order of the rows, then padding.

        An interleaved document that is a unit lies in one piece here: its chunks, in their order.

        Args:
            divisible_by: pad to a multiple of so many tokens, and a blank micro-batch to one.

        Returns:
            input_ids, labels, position_ids: (1, T) int64; layout.
        """
        units = plan.units
        parts: list[np.ndarray] = []  # (3, tokens) each: ids, labels, positions
        lengths: list[int] = []  # of the pieces that they lie in
        unit_of: list[int] = []  # of each piece
        documents: list[int] = []  # of each piece
        next_document = 0
        mine = plan.units_of(rank=rank, index=index)
        if units.anchors and len(mine):
            parts.append(self._tokens(units.row[mine[0]])[:, :1])
            lengths, unit_of, documents, next_document = [1], [-1], [0], 1
        for unit in mine:
            parts += self._parts_of(units, unit)
            if units.kind == "row":
                inside, numbers = self._documents_of(units, unit)
            else:
                inside, numbers = units.tokens[unit : unit + 1], np.zeros(1, np.int64)
            lengths += inside.tolist()
            documents += (numbers + next_document).tolist()
            next_document += int(numbers.max()) + 1
            unit_of += [int(unit)] * len(inside)

        total = sum(lengths)
        padding = -total % divisible_by if total else divisible_by
        parts.append(self._padding(padding))
        pads = [min(PAD_PIECE, padding - start) for start in range(0, padding, PAD_PIECE)]
        documents += range(next_document, next_document + len(pads))
        lengths += pads
        unit_of += [len(units.row)] * len(pads)

        ids, labels, positions = np.concatenate(parts, axis=1)[:, None]
        layout = layout_of_units(
            np.array(lengths),
            positions[0],
            pattern=self.pattern,
            anchor_placement=self.anchor_placement,
            rows=np.array(unit_of),
            documents=np.array(documents),
        )
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": layout.position_ids,
            "layout": layout,
        }

    def _parts_of(self, units: Units, unit: int) -> list[np.ndarray]:
        """(3, tokens) each: what a unit consists of: perhaps an anchor that its row does not have, then the
        tokens of its row. A cut changes no id and no label. Positions are the row's, but where the pattern
        counts them from a document's start they count from the cut."""
        document = self._laid_out(units.kind, int(units.row[unit]), int(units.document[unit]))
        start, anchors = units.start[unit], units.new_anchors[unit]
        tokens = document[:, start : start + units.tokens[unit] - anchors]
        pattern = PATTERNS[self.pattern]
        if start and not pattern.anchored:
            ids, labels, positions = tokens
            tokens = np.stack([ids, labels, pattern.positions(positions, positions[0])])
        anchor = np.array([[document[0, 0]], [IGNORE_INDEX], [0]])
        return [anchor, tokens] if anchors else [tokens]

    def _documents_of(self, units: Units, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """(pieces,) each: lengths, and documents counted in the row, of a unit that is (part of) a row."""
        row = self.rows[units.row[unit]]
        pieces = row.document_pieces
        start, stop = units.start[unit], units.start[unit] + units.tokens[unit]
        lengths = np.minimum(row.ends[:pieces], stop) - np.maximum(row.starts[:pieces], start)
        inside = lengths > 0
        return lengths[inside], row.documents[:pieces][inside].astype(np.int64)

    def _laid_out(self, kind: str, i: int, document: int) -> np.ndarray:
        """(3, tokens) int64: a document of row `i` in one piece, or the row without its padding."""
        if (i, document) not in self._documents:
            row, tokens = self.rows[i], self._tokens(i)
            ends, pieces = row.ends, np.arange(row.document_pieces)
            if kind != "row":
                pieces = np.flatnonzero(row.documents[pieces] == document)
            if ends[pieces[-1]] - row.starts[pieces[0]] == (ends - row.starts)[pieces].sum():
                laid = tokens[:, row.starts[pieces[0]] : ends[pieces[-1]]]  # no copy
            else:
                laid = np.concatenate([tokens[:, row.starts[p] : ends[p]] for p in pieces], axis=1)
            self._documents[i, document] = laid
        return self._documents[i, document]

    def _tokens(self, i: int) -> np.ndarray:
        """(3, S) int64: ids, labels and positions of row `i` of the step."""
        if i not in self._laid:
            row = self.rows[i]
            layout = make_layout(
                row.starts,
                documents=row.documents,
                batch_size=1,
                row_length=row.length,
                pattern=self.pattern,
                anchor_placement=self.anchor_placement,
            )
            positions = layout.position_ids[0].numpy()
            self._laid[i] = np.stack([row.tokens[: row.length], row.labels(), positions])
        return self._laid[i]

    def _padding(self, tokens: int) -> np.ndarray:
        """(3, tokens) int64."""
        one = [[self.pad_id], [IGNORE_INDEX], [0]]
        return np.repeat(np.array(one, dtype=np.int64), tokens, axis=1)
