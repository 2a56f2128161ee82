"""From a batch back to the lines of the data that its rows came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lorafit.data.arrow_files import PLACE
from lorafit.data.prepare import PreparedData

RowsOf = Callable[[dict[str, Any]], list[dict[str, list[int]]]]
"""The rows of a batch, as a collator takes them."""


class RowFinder:
    """Names (`file:line`) the rows of a batch. The tokens stay on disk: they are looked through for each question."""

    def __init__(self, data: PreparedData, rows_of: RowsOf) -> None:
        self._data, self._rows_of = data, rows_of

    def __call__(self, inputs: dict[str, Any]) -> list[str]:
        """The rows in `inputs`, known by the first of their columns."""
        rows = self._rows_of(inputs)
        column = next(iter(rows[0]))
        return self._where([np.array(row[column], np.int32) for row in rows], column)

    def _where(self, wanted: list[npt.NDArray[np.int32]], column: str) -> list[str]:
        found = ["a row that was cut"] * len(wanted)
        for batch in self._data.train.data.to_batches():
            tokens = batch.column(column)
            lengths, values = tokens.value_lengths().to_numpy(), tokens.flatten().to_numpy()
            starts = np.cumsum(lengths, dtype=np.int64) - lengths
            for number, ids in enumerate(wanted):
                for row in np.flatnonzero(lengths == len(ids)):
                    if np.array_equal(values[starts[row] : starts[row] + len(ids)], ids):
                        file, line = (batch.column(name)[int(row)].as_py() for name in PLACE)
                        found[number] = f"{self._data.files[file]}:{line}"
        return found
