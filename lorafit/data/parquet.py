"""Rows of a Parquet or Arrow file; their "line" is the row number, from 1."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lorafit.data.arrow_rows import row_cleaner
from lorafit.data.source_files import DataFile, FileProblem
from lorafit.data.streams import CHUNK, content

Needed = Callable[[Iterable[str]], list[str]]
ROWS_PER_BATCH = 1024
ROOM_LEFT = 1 << 30
"""Bytes of the temporary directory that unpacking leaves free."""


def parquet_rows(file: DataFile, needed: Needed) -> Iterator[tuple[int, Any]]:
    """Every row as a mapping of the columns that are needed.

    Raises FileProblem.
    """
    number = 0
    with _random_access(file) as source:
        try:
            schema, batches = _arrow(source, needed) if file.suffix == ".arrow" else _parquet(source, needed)
        except (pyarrow.ArrowException, OSError) as error:
            kind = file.suffix[1:].capitalize()
            raise FileProblem(f"is not a whole {kind} file ({_said(error)}); download or write it again") from None
        if len(set(schema.names)) < len(schema.names):
            twice = next(name for name in schema.names if schema.names.count(name) > 1)
            raise FileProblem(f'the column "{twice}" stands twice; rename one')
        clean = row_cleaner(schema)
        try:
            for batch in batches:
                for row in batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows:
                    number += 1
                    yield number, clean(row)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            message = f"cannot be read further ({_said(error)}); download or write it again"
            raise FileProblem(message, line=number + 1) from None


def _parquet(source: Any, needed: Needed) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    # Without these a row group is held as a whole, and twice.
    table = pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=CHUNK)
    names = needed(table.schema_arrow.names)
    return table.schema_arrow, table.iter_batches(batch_size=ROWS_PER_BATCH, columns=names)


def _arrow(source: Any, needed: Needed) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    """What `datasets` writes: a stream of batches."""
    stream = pyarrow.ipc.open_stream(source)
    names = needed(stream.schema.names)
    parts = (
        batch.select(names).slice(start, ROWS_PER_BATCH)
        for batch in stream
        for start in range(0, batch.num_rows, ROWS_PER_BATCH)
    )
    return stream.schema, parts


@contextmanager
def _random_access(file: DataFile) -> Iterator[Any]:
    """What Parquet's footer needs: the file itself, or a temporary one of what its gzip holds."""
    with content(file) as stream:
        if not file.is_compressed and stream.seekable():
            yield pyarrow.PythonFile(stream, mode="r")
            return
        with tempfile.TemporaryFile() as unpacked:
            while chunk := stream.read(CHUNK):
                if shutil.disk_usage(tempfile.gettempdir()).free < ROOM_LEFT:
                    raise FileProblem(f"unpacks to more than {Path(tempfile.gettempdir())} has room for; set TMPDIR")
                unpacked.write(chunk)
            unpacked.seek(0)
            yield pyarrow.PythonFile(unpacked, mode="r")


def _said(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
