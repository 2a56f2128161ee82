"""One pass over the rows of a recipe: read, shaped and checked, one at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

from lorafit.data.findings import Findings
from lorafit.data.formats import Shaper
from lorafit.data.listing import Listed, Side
from lorafit.data.problems import listed as named
from lorafit.data.readers import HubRows, Rows, read_rows
from lorafit.data.rows import Row
from lorafit.data.source_files import DataFile, FileProblem
from lorafit.recipe.sections import DataSection


class Reading:
    """The rows that can be trained on, and what was found on the way to them."""

    def __init__(self, section: DataSection, hub_rows: HubRows | None) -> None:
        self.section = section
        self.hub_rows = hub_rows
        self.findings: dict[Side, Findings] = {"train": Findings(), "eval": Findings()}
        self.rows_read: dict[Side, int] = {"train": 0, "eval": 0}
        self.formats: dict[int, str] = {}
        """What the rows of a source turned out to be, by the number of its first file."""
        self.digests: dict[int, str] = {}
        """SHA-256 by file, of those that were read from end to end."""
        self.kept: Counter[int] = Counter()
        """Rows that can be trained on, by the number of the first file of their source."""
        self.bytes_read = 0

    def rows(self, listed: Listed) -> Iterator[Row]:
        """Every row of the source, up to its limit, that can be trained on."""
        source, side, findings = listed.source, listed.side, self.findings[listed.side]
        shaper = Shaper(source, findings, section=self.section)
        left = source.limit
        for number, rows in self._opened(listed, shaper):
            taken = 0
            try:
                for line, raw in rows if left != 0 else ():
                    taken += 1
                    row = shaper.shape(raw, (number, line))
                    if row is not None:
                        self.kept[listed.first] += 1
                        yield row
                    if taken == left:
                        break
            except FileProblem as problem:
                findings.add("unreadable", (number, problem.line), problem.message)
            left = None if left is None else left - taken
            self.rows_read[side] += taken
        if listed.problem:
            findings.add("unreadable", (listed.first, 0), listed.problem)
        for _ in listed.ignored:
            findings.add("ignored_files", (listed.end - 1, 0), named(listed.ignored))
        shaper.report_columns((listed.first, 0))
        self.formats[listed.first] = shaper.format

    def _opened(self, listed: Listed, shaper: Shaper) -> Iterator[tuple[int, Rows]]:
        """The number and the rows of each file; nothing is opened before its first row is asked for."""
        if listed.source.path is None:
            if self.hub_rows is not None:
                yield listed.first, self.hub_rows(listed.source, shaper.needed)
            return
        for number, file in enumerate(listed.files, listed.first):
            yield number, self._file_rows(number, file, listed.side, shaper)

    def _file_rows(self, number: int, file: DataFile, side: Side, shaper: Shaper) -> Rows:
        hashed, findings = _Counted(self), self.findings[side]

        def broken(line: int, message: str) -> None:
            findings.add("broken", (number, line), message)

        yield from read_rows(file, broken=broken, needed=shaper.needed, hashed=hashed)
        if file.suffix not in (".parquet", ".arrow"):  # those are not read from end to end
            self.digests[number] = hashed.sha256.hexdigest()

    def is_same_as(self, other: Reading) -> bool:
        """Whether both passes read the same bytes, and as many rows."""
        return self.rows_read == other.rows_read and self.digests == other.digests


class _Counted:
    """The hash of one file, and what was read of all."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.sha256 = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        self.sha256.update(data)
        self._reading.bytes_read += len(data)
