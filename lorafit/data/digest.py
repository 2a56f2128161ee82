"""What the bytes of the sources hash to, without parsing them: whether prepared tokens are still those of the data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice

from lorafit.data.files import FileProblem, files_of, read_bytes
from lorafit.data.readers import HubRows
from lorafit.recipe.sections import DataSection

DATE = "date that the chat template writes"
TOKENS = "tokens of the rows"
"""Parts of what prepared tokens are known by."""


@dataclass(frozen=True)
class Contents:
    """Names and SHA-256 of every file of the sources, in the order `scan` numbers them."""

    files: tuple[str, ...]
    digests: tuple[str, ...]


def contents(section: DataSection, *, hub_rows: HubRows) -> Contents:
    """What the sources hold now. Files that cannot be read are left to `scan` to report."""
    names, digests = [], []
    for source in (*section.train, *section.eval):
        if source.path is None:
            names.append(hub_name(source.hub, source.split))
            try:
                rows = [row for _, row in islice(hub_rows(source), source.limit)]
                digests.append(sha256(json.dumps(rows, default=str).encode()))
            except FileProblem:
                digests.append("")
            continue
        try:
            files, _ = files_of(source.path)
        except FileProblem:
            names.append(source.path)
            digests.append("")
            continue
        for file in files:
            names.append(file.name)
            try:
                digests.append(sha256(read_bytes(file)))
            except FileProblem:
                digests.append("")
    return Contents(tuple(names), tuple(digests))


def hub_name(hub: str | None, split: str) -> str:
    """How a Hub data set is named where files are."""
    return f"hub:{hub}[{split}]"


def sha256(data: bytes) -> str:
    """Hex digest; about 2 GB/s."""
    return hashlib.sha256(data).hexdigest()
