"""From a batch back to its rows: their tokens and labels, and the lines of the data they came from."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from lorafit.data.prepare import PreparedData


class RowFinder:
    """Names (`file:line`) the rows of a batch. The index over all rows is built at the first question only."""

    def __init__(self, data: PreparedData) -> None:
        self._data = data
        self._index: dict[tuple[int, ...], str] | None = None

    def __call__(self, inputs: dict[str, Any]) -> list[str]:
        """The rows in `inputs`: input_ids [B, T] with an attention_mask, or one flattened row with cu_seq_lens_q."""
        if self._index is None:
            self._index = {
                tuple(row["input_ids"]): f"{self._data.files[row['file']]}:{row['line']}" for row in self._data.train
            }
        return [self._index.get(tuple(row["input_ids"]), "a row that was cut") for row in rows_of(inputs)]


def rows_of(inputs: dict[str, Any]) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of each document of a batch, as a collator takes them: padding left out."""
    if "cu_seq_lens_q" in inputs:
        shares = [slice(start, end) for start, end in pairwise(inputs["cu_seq_lens_q"].tolist())]
        return [_row(inputs, 0, share) for share in shares]
    masks: torch.Tensor = inputs["attention_mask"].bool()
    return [_row(inputs, number, mask) for number, mask in enumerate(masks)]


def _row(inputs: dict[str, Any], number: int, share: slice | torch.Tensor) -> dict[str, list[int]]:
    return {name: inputs[name][number, share].tolist() for name in ("input_ids", "labels")}
