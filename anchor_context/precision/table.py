"""Rows of measurements, and what is asked of them: the mean or the largest of a column over some of the rows.

Costs: a column becomes an array at the first question about it; from then on a question takes about a
millisecond among 100,000 rows, and a report or a picture asks a thousand.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

Row = dict[str, object]


class Table:
    """Rows in the order of measurement.

    Where a row lacks a column (a layer's window ends sooner), no question about that column counts it.
    """

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self._codes: dict[str, tuple[np.ndarray, dict]] = {}
        self._numbers: dict[str, np.ndarray] = {}

    def values(self, column: str) -> list:
        """The different values of a column, in the order of measurement."""
        return list(self._coded(column)[1])

    def where(self, **wanted) -> Table:
        """The rows whose columns equal `wanted`."""
        return Table([self.rows[i] for i in np.flatnonzero(self._found(wanted))])

    def mean(self, column: str, **wanted) -> float:
        """Over the rows whose columns equal `wanted` (layers and heads, as a rule)."""
        return self._asked(column, wanted).mean().item()

    def max(self, column: str, **wanted) -> float:
        """The largest value over the rows whose columns equal `wanted`."""
        return self._asked(column, wanted).max().item()

    def write_csv(self, path: Path) -> None:
        """The columns of all rows; what a row lacks stays empty."""
        columns = dict.fromkeys(name for row in self.rows for name in row)
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(columns))
            writer.writeheader()
            writer.writerows(self.rows)

    def _asked(self, column: str, wanted: dict) -> np.ndarray:
        if column not in self._numbers:
            self._numbers[column] = np.array([row.get(column, np.nan) for row in self.rows], float)
        numbers = self._numbers[column][self._found(wanted)]
        numbers = numbers[~np.isnan(numbers)]
        assert numbers.size, f"no {column} was measured with {wanted}"
        return numbers

    def _found(self, wanted: dict) -> np.ndarray:
        """(rows,) bool"""
        found = np.ones(len(self.rows), dtype=bool)
        for column, value in wanted.items():
            codes, code_of = self._coded(column)
            found &= codes == code_of.get(value, -1)
        return found

    def _coded(self, column: str) -> tuple[np.ndarray, dict]:
        """The column with a small integer for each different value, and value -> integer."""
        if column not in self._codes:
            code_of: dict = {}
            codes = [code_of.setdefault(row[column], len(code_of)) for row in self.rows]
            self._codes[column] = np.array(codes, dtype=np.int32), code_of
        return self._codes[column]
