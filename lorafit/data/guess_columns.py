"""What `lorafit init` makes of a data file whose columns have names of their own."""

from contextlib import closing
from itertools import islice
from typing import Any

from lorafit.data.columns import familiar_columns
from lorafit.data.listing import files_of
from lorafit.data.readers import read_rows
from lorafit.data.source_files import FileProblem


def familiar_mapping(path: str) -> dict[str, Any]:
    """`format` and `columns` for a file that fits no format but whose first row has names that many data sets use.

    Empty where the columns fit as they are, where there is nothing familiar, and where the file cannot be read:
    `validate` says then what is wrong.
    """
    first = first_row(path)
    return {} if first is None else familiar_columns(first)


def first_row(path: str) -> dict[str, Any] | None:
    """The first row of a data file; None where it is no object, and where the file cannot be read."""
    return next(iter(first_rows(path, 1)), None)


def first_rows(path: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a data file that are objects; none where the file cannot be read."""
    try:
        files = files_of(path)
        with closing(read_rows(files[0], broken=lambda _line, _message: None, needed=list)) as rows:
            return [row for _, row in islice(rows, count) if isinstance(row, dict)]
    except (FileProblem, UnicodeError):
        return []
