"""Rows of a Hub data set, read by `datasets`; their "line" is the row number, from 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets

from lorafit.data.arrow_rows import row_cleaner
from lorafit.data.files import FileProblem
from lorafit.recipe.sections import Source


def hub_rows(source: Source) -> Iterator[tuple[int, Any]]:
    """The rows of one split. Data sets that bring code of their own cannot be loaded: `datasets` no longer runs any.

    Raises FileProblem with what `datasets` says.
    """
    try:
        table = datasets.load_dataset(source.hub, source.name, split=source.split, revision=source.revision)
    # What it raises for a missing data set, split, name or network shares no base class but this one.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error).split())[:300]
        raise FileProblem(f"cannot be loaded: {said}; check hub, name, split and revision, or the network") from None
    clean = row_cleaner(table.features.arrow_schema)
    return ((number, clean(row)) for number, row in enumerate(table, 1))
