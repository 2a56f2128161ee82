"""Rows of an embedding or output head that were never trained, found from a few hundred rows of the file.

Bases reserve tokens that no text of their training held. Their rows are what they began as: zero, or drawn to it by
weight decay; the mean of the others, where they were added to a finished model; or all alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lorafit.builders.weight_files import TensorInfo

Matrix = npt.NDArray[np.float32]
Rows = Callable[[Sequence[int]], Matrix]
"""Gives the rows of these ids, [n, columns]."""

SAMPLE = 512
"""Ordinary rows that are looked at: their mean is within a twentieth of a row's usual distance to it."""

NOTHING = 0.01
"""Of the usual length of a row: below it the row says nothing."""

AT_THE_MEAN = 0.25
"""Of the usual distance from the mean of all rows: below it the row does not tell its token from any other."""

ALIKE = 0.01
"""Of their length: two rows nearer than this are one. Rows that were trained, or drawn at random, are about 1 apart."""


def never_trained(
    rows: Rows, suspects: Sequence[int], *, ordinary: Sequence[int], peers: Sequence[int] = ()
) -> dict[int, str]:
    """Those of the ids `suspects` whose row was never trained, and what it is instead.

    `ordinary` are the ids to compare with, `peers` other reserved ones, which may have the same row.
    """
    if not suspects:
        return {}
    usual = rows(_spread(ordinary))
    mean = usual.mean(axis=0)
    length = float(np.median(np.linalg.norm(usual, axis=1)))
    distance = float(np.median(np.linalg.norm(usual - mean, axis=1)))
    looked_at, others = rows(suspects), sorted({*suspects, *_spread(peers)})
    beside = rows(others)
    found = {}
    for id_, row in zip(suspects, looked_at, strict=True):
        norm = float(np.linalg.norm(row))
        if norm <= NOTHING * length:
            found[id_] = "zero" if not row.any() else "as good as zero"
        elif (twin := _twin(id_, row, others, beside)) is not None:
            found[id_] = f"the same as that of id {twin}"
        elif float(np.linalg.norm(row - mean)) <= AT_THE_MEAN * distance:
            found[id_] = "the mean of all rows"
    return found


def _spread(ids: Sequence[int]) -> list[int]:
    """At most SAMPLE of them, evenly."""
    count = min(SAMPLE, len(ids))
    return [ids[index * len(ids) // count] for index in range(count)]


def _twin(id_: int, row: Matrix, others: Sequence[int], beside: Matrix) -> int | None:
    apart = np.linalg.norm(beside - row, axis=1)
    near = apart <= ALIKE * np.linalg.norm(row)
    return next((other for other, is_near in zip(others, near, strict=True) if is_near and other != id_), None)


def rows_on_disk(directory: Path, tensor: TensorInfo) -> Rows:
    """The rows of a tensor of a safetensors file, read one by one."""
    path, width = directory / tensor.file, tensor.nbytes // tensor.shape[0]

    def read(ids: Sequence[int]) -> Matrix:
        with path.open("rb") as file:
            data = b"".join(os.pread(file.fileno(), width, tensor.start + id_ * width) for id_ in ids)
        return _float32(data, tensor.dtype).reshape(len(ids), -1)

    return read


def _float32(data: bytes, dtype: str) -> Matrix:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    return np.frombuffer(data, kinds[dtype]).astype(np.float32)
