"""Rows of a Parquet file; their "line" is the row number, from 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from lorafit.data.arrow_rows import row_cleaner
from lorafit.data.files import FileProblem


def parquet_rows(data: bytes) -> Iterator[tuple[int, Any]]:
    """Every row as a mapping.

    Raises FileProblem.
    """
    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        first = str(error).split("\n", 1)[0]
        raise FileProblem(f"is not a whole Parquet file ({first}); download or write it again") from None
    return _numbered(table)


def _numbered(table: pyarrow.parquet.ParquetFile) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        clean = row_cleaner(table.schema_arrow)
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, clean(row)
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).split("\n", 1)[0]
        raise FileProblem(f"cannot be read further ({first}); download or write it again", line=number + 1) from None
