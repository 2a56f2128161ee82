"""From a batch back to its rows: their tokens and labels, and the lines of the data they came from."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorafit.data.arrow_files import PLACE
from lorafit.data.prepare import PreparedData


class RowFinder:
    """Names (`file:line`) the rows of a batch. The tokens stay on disk: they are looked through for each question."""

    def __init__(self, data: PreparedData) -> None:
        self._data = data

    def __call__(self, inputs: dict[str, Any]) -> list[str]:
        """The rows in `inputs`: input_ids [B, T] with an attention_mask, or one flattened row with cu_seq_lens_q."""
        return self._where([np.array(row["input_ids"], np.int32) for row in rows_of(inputs)])

    def _where(self, wanted: list[npt.NDArray[np.int32]]) -> list[str]:
        found = ["a row that was cut"] * len(wanted)
        for batch in self._data.train.data.to_batches():
            tokens = batch.column("input_ids")
            lengths, values = tokens.value_lengths().to_numpy(), tokens.flatten().to_numpy()
            starts = np.cumsum(lengths, dtype=np.int64) - lengths
            for number, ids in enumerate(wanted):
                for row in np.flatnonzero(lengths == len(ids)):
                    if np.array_equal(values[starts[row] : starts[row] + len(ids)], ids):
                        file, line = (batch.column(name)[int(row)].as_py() for name in PLACE)
                        found[number] = f"{self._data.files[file]}:{line}"
        return found


def rows_of(inputs: dict[str, Any]) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of each document of a batch, as a collator takes them: padding left out."""
    if "cu_seq_lens_q" in inputs:
        shares = [slice(start, end) for start, end in pairwise(inputs["cu_seq_lens_q"].tolist())]
        return [_row(inputs, 0, share) for share in shares]
    masks: torch.Tensor = inputs["attention_mask"].bool()
    return [_row(inputs, number, mask) for number, mask in enumerate(masks)]


def _row(inputs: dict[str, Any], number: int, share: slice | torch.Tensor) -> dict[str, list[int]]:
    return {name: inputs[name][number, share].tolist() for name in ("input_ids", "labels")}
