"""From a batch of token ids back to the data rows they came from."""

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
        return [self._index.get(tuple(document), "a row that was cut") for document in _documents(inputs)]


def _documents(inputs: dict[str, Any]) -> list[list[int]]:
    input_ids: torch.Tensor = inputs["input_ids"]
    if "cu_seq_lens_q" in inputs:
        bounds = inputs["cu_seq_lens_q"].tolist()
        return [input_ids[0, start:end].tolist() for start, end in pairwise(bounds)]
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    return [row[:length].tolist() for row, length in zip(input_ids, lengths, strict=True)]
