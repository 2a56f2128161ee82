"""Rows of Hub data sets, read by `datasets`; their "line" is the row number, from 1."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import pyarrow

from lorafit.data.arrow_rows import row_cleaner
from lorafit.data.source_files import FileProblem
from lorafit.recipe.sections import Source

# What `datasets` raises for a missing data set, split, name or network shares no base class but these.
FAILURES = (OSError, ValueError, TypeError, RuntimeError, pyarrow.ArrowException, datasets.exceptions.DatasetsError)
ROWS_PER_BATCH = 1024


class HubTables:
    """The data sets of a recipe, each loaded once. Those that bring code of their own cannot be: it is not run."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str | None, ...], datasets.Dataset | FileProblem] = {}

    def rows(self, source: Source, needed: Callable[[Iterable[str]], list[str]]) -> Iterator[tuple[int, Any]]:
        """The rows of one split; only the columns that are needed are read and decoded.

        Raises FileProblem, at any row, with what `datasets` says.
        """
        table = self._table(source)
        number = 0
        try:
            few = table.select_columns(needed(table.column_names))
            clean = row_cleaner(few.features.arrow_schema)
            for batch in few.iter(ROWS_PER_BATCH):
                for values in zip(*batch.values(), strict=True):
                    number += 1
                    yield number, clean(dict(zip(batch, values, strict=True)))
        except FAILURES as error:
            raise FileProblem(f"cannot be read further: {_said(error)}", line=number + 1) from None

    def identity(self, source: Source) -> str:
        """What `datasets` knows the prepared split by: the name, the commit and the settings. Raises FileProblem."""
        return str(self._table(source)._fingerprint)

    def _table(self, source: Source) -> datasets.Dataset:
        key = (source.hub, source.name, source.split, source.revision)
        if key not in self._tables:
            self._tables[key] = _loaded(source)
        table = self._tables[key]
        if isinstance(table, FileProblem):
            raise table
        return table


def _loaded(source: Source) -> datasets.Dataset | FileProblem:
    said_by_datasets = logging.getLogger("datasets")
    level = said_by_datasets.level
    said_by_datasets.setLevel(logging.CRITICAL)  # it logs what it raises as well
    try:
        return datasets.load_dataset(source.hub, source.name, split=source.split, revision=source.revision)
    except FAILURES as error:
        cause = error.__cause__ or error.__context__
        because = f" ({_said(cause)})" if isinstance(cause, FAILURES) else ""
        mend = "check hub, name, split and revision, or the network"
        return FileProblem(f"cannot be loaded: {_said(error)}{because}; {mend}")
    finally:
        said_by_datasets.setLevel(level)


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
