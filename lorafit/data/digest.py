"""What the bytes of the sources hash to, without parsing them: whether prepared tokens are still those of the data.

Hashing a gigabyte takes a second, so the hash of a file is remembered beside the prepared tokens. It is taken for that
of the file as long as nothing that changes with a file has changed: device, inode, size, and both times, of which the
second cannot be set by anybody. One thing is left: a file that is written to again within the same tick of the clock
looks the same. So a hash is remembered only when the file was at rest for a while before, as git does with its index.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from lorafit.data.findings import Findings
from lorafit.data.formats import Shaper
from lorafit.data.hub import HubTables
from lorafit.data.listing import Listed
from lorafit.data.source_files import DataFile, FileProblem
from lorafit.data.streams import CHUNK
from lorafit.recipe.sections import DataSection
from lorafit.storage.files import write_file

DATE = "date that the chat template writes"
TOKENS = "tokens of the rows"
"""Parts of what prepared tokens are known by."""

AT_REST = 3 * 10**9
"""Nanoseconds: the coarsest clock of a file system in use ticks every two seconds (FAT)."""
REMEMBERED = "digests"


def digests(
    sources: tuple[Listed, ...], section: DataSection, *, hub: HubTables, cache_dir: Path | None
) -> tuple[str, ...]:
    """SHA-256 of every file, in the order in which they are numbered; empty for those that cannot be read.

    What is wrong with those is for `scan` to report.
    """
    return tuple(digest for listed in sources for digest in _digests(listed, section, hub, cache_dir))


def _digests(listed: Listed, section: DataSection, hub: HubTables, cache_dir: Path | None) -> Iterator[str]:
    memory = _Memory(cache_dir, listed.name)
    if listed.source.path is None:
        yield _hub_digest(listed, section, hub, memory)
    elif not listed.files:
        yield ""
    for file in listed.files:
        try:
            yield _file_digest(file, memory)
        except (FileProblem, OSError):
            yield ""
    memory.keep()


def _file_digest(file: DataFile, memory: _Memory) -> str:
    before, now = file.identity(), time.time_ns()
    known = memory.recall(file.name, before)
    if known:
        return known
    hashed = hashlib.sha256()
    with file.open() as stream:
        while chunk := stream.read(CHUNK):
            hashed.update(chunk)
    if before is not None and before == file.identity() and max(before[-2:]) < now - AT_REST:
        memory.remember(file.name, before, hashed.hexdigest())
    return hashed.hexdigest()


def _hub_digest(listed: Listed, section: DataSection, hub: HubTables, memory: _Memory) -> str:
    """Of the rows as JSON, in the columns that are read: the same wherever `datasets` keeps them."""
    source = listed.source
    try:
        # The columns that are read depend on these.
        settings = json.dumps([source.format, source.columns, source.limit])
        identity = [hub.identity(source), hashlib.sha256(settings.encode()).hexdigest()]
        known = memory.recall(listed.name, identity)
        if known:
            return known
        hashed = hashlib.sha256(b"[")
        rows = hub.rows(source, Shaper(source, Findings(), section=section).needed)
        for number, (_, row) in enumerate(islice(rows, source.limit)):
            hashed.update(f"{', ' if number else ''}{json.dumps(row, default=str)}".encode())
        hashed.update(b"]")
    except FileProblem:
        return ""
    memory.remember(listed.name, identity, hashed.hexdigest())
    return hashed.hexdigest()


class _Memory:
    """The hashes of one source that an earlier run wrote down."""

    def __init__(self, cache_dir: Path | None, source: str) -> None:
        name = hashlib.blake2b(source.encode(errors="surrogateescape"), digest_size=16).hexdigest()
        self._path = cache_dir / REMEMBERED / f"{name}.json" if cache_dir else None
        self._known: dict[str, Any] = {}
        self._is_new = False
        if self._path:
            with suppress(OSError, ValueError):
                self._known = dict(json.loads(self._path.read_bytes()))

    def recall(self, name: str, identity: Any) -> str | None:
        known = self._known.get(name)
        return str(known[1]) if isinstance(known, list) and len(known) == 2 and known[0] == identity else None

    def remember(self, name: str, identity: Any, digest: str) -> None:
        self._known[name] = [identity, digest]
        self._is_new = True

    def keep(self) -> None:
        if self._path and self._is_new:
            with suppress(OSError):  # costs only the next run
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_file(self._path, json.dumps(self._known))
