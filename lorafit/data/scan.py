"""The first pass: sources -> checked rows, without torch or datasets: what `validate` needs, where `prepare` starts.

Of a row nothing is kept but its place and a key of its content: 32 bytes.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from lorafit.data.findings import Findings, refuse_too_many_lost, where
from lorafit.data.groups import Groups
from lorafit.data.listing import Listed, Side, bytes_of, listing
from lorafit.data.near import NearRows
from lorafit.data.progress import watched
from lorafit.data.readers import HubRows
from lorafit.data.reading import Reading
from lorafit.data.rows import Chat, Place, Row, alike_key, content_key
from lorafit.errors import DataError, Problem
from lorafit.recipe.sections import DataSection

CHANGED = "the files changed while they were read; run again when they are written"


@dataclass(frozen=True)
class SourceScan:
    """What one source of the recipe holds."""

    name: str
    side: Side
    format: str
    files: int
    rows: int
    """Rows that can be trained on."""
    held_out: int
    """How many of a training source's rows are held out instead."""
    weight: float

    @property
    def rows_per_epoch(self) -> int:
        """Rows that are not held out, times `weight`; a share of a row is rounded."""
        return times(self.rows - self.held_out, self.weight)


def times(rows: int, weight: float) -> int:
    """How many rows an epoch has of so many."""
    return int(weight) * rows + share_of(rows, weight)


def share_of(rows: int, weight: float) -> int:
    """How many rows the part of the weight that is no whole number means."""
    return round(weight % 1 * rows)


@dataclass(frozen=True)
class DataScan:
    """What the rows of both sides are, and what was found on the way."""

    listing: tuple[Listed, ...]
    sources: tuple[SourceScan, ...]
    reading: Reading
    """The pass that found all this."""
    held_out: bytes | None
    """For each training row 1 when `eval_fraction` holds it out; None when nothing is split."""
    longest_chat: Chat | None
    """The conversation of most messages: the one that a template may make most sequences of."""

    @property
    def files(self) -> tuple[str, ...]:
        """What the file numbers of the rows index."""
        return tuple(name for listed in self.listing for name in listed.names)

    @property
    def findings(self) -> dict[Side, Findings]:
        """Everything found so far, by side."""
        return self.reading.findings

    @property
    def train_rows(self) -> int:
        """Training rows of one epoch, weights included."""
        return sum(source.rows_per_epoch for source in self.sources if source.side == "train")

    @property
    def eval_rows(self) -> int:
        """Held-out rows."""
        return sum(source.held_out if source.side == "train" else source.rows for source in self.sources)

    @property
    def lost(self) -> int:
        """Rows left out."""
        return sum(findings.count("lost") for findings in self.findings.values())

    @property
    def skipped_hub(self) -> tuple[str, ...]:
        """Hub data sets that were not read."""
        return tuple(str(listed.source.hub) for listed in self.listing if _is_skipped(listed, self.reading.hub_rows))

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence per kind of oddity, lost rows first."""
        return tuple(
            sentence
            for findings in self.findings.values()
            for level in ("lost", "warning")
            for sentence in findings.sentences(level, self.files)
        )

    def summary(self) -> str:
        """One line: rows of both sides, files, what is lost."""
        held_out = f", {self.eval_rows:,} held out" if self.eval_rows else ""
        files = f"{len(self.files)} file{'s' if len(self.files) != 1 else ''}"
        hub = f"; read when training starts: {', '.join(self.skipped_hub)}" if self.skipped_hub else ""
        return f"{self.train_rows:,} rows to train on{held_out}, from {files}, {self.lost:,} lost{hub}"

    def rows(self) -> Iterator[tuple[Side, Row]]:
        """Every row again, in order, with the side it is on: the second pass.

        Raises DataError at its end when the files no longer are what the first pass read.
        """
        again = Reading(self.reading.section, self.reading.hub_rows)
        number = 0
        for listed, source in zip(self.listing, self.sources, strict=True):
            before = number
            for row in again.rows(listed):
                is_held_out = self.held_out is not None and self.held_out[number : number + 1] == b"\1"
                yield "eval" if is_held_out else listed.side, row
                number += 1
            if number - before != source.rows:
                raise DataError(CHANGED, where="data")
        if not again.is_same_as(self.reading):
            raise DataError(CHANGED, where="data")


def scan(
    section: DataSection,
    *,
    seed: int,
    hub_rows: HubRows | None = None,
    listed: tuple[Listed, ...] | None = None,
    each: Callable[[Row], None] | None = None,
    show_progress: bool = False,
) -> DataScan:
    """Read and check every row of the section. Hub data sets are read by `hub_rows`; without it they are only named.

    `listed` is the section's `listing`, for who has it already; `each` sees every row as it passes by. Raises DataError
    with every problem of every file.
    """
    sources = listing(section) if listed is None else listed
    reading = Reading(section, hub_rows)
    rows, size = _Rows(compares_sides=bool(section.eval)), bytes_of(sources)

    def estimate(read: int) -> int | None:
        return read * size // reading.bytes_read if 0 < reading.bytes_read <= size else None

    near = NearRows()
    near.hold(_held_out_on_disk(section, sources))
    all_rows = ((source.side, row) for source in sources for row in reading.rows(source))
    for side, row in watched(all_rows, "reading", is_shown=show_progress, total=estimate):
        rows.add(row)
        if side == "train":
            near.see(row)
        if each is not None:
            each(row)
    ends = list(accumulate(reading.kept[source.first] for source in sources))
    files = [name for source in sources for name in source.names]
    _refuse_errors(section, sources, reading, files)
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    train_rows = sum(count for count, source in zip(counts, sources, strict=True) if source.side == "train")
    firsts = rows.groups.firsts()
    _find_duplicates(rows, firsts, train_rows, dict(near.pairs()), findings=reading.findings, files=files)
    held_out = None
    if section.eval_fraction is not None and _is_whole("train", sources, hub_rows):
        held_out = _drawn(firsts, section.eval_fraction, seed=seed)
    scans = []
    for source, start, count in zip(sources, [0, *ends], counts, strict=False):
        drawn = sum(held_out[start : start + count]) if held_out and source.side == "train" else 0
        form = reading.formats[source.first]
        number_of_files = source.end - source.first
        scans.append(SourceScan(source.name, source.side, form, number_of_files, count, drawn, source.source.weight))
    _refuse_sources_without_rows(sources, scans, hub_rows)
    return DataScan(sources, tuple(scans), reading, held_out, rows.longest_chat)


class _Rows:
    """What is kept of the rows: where each stands, and which are the same; and the longest conversation."""

    def __init__(self, *, compares_sides: bool) -> None:
        self.groups = Groups()
        self.alike = Groups() if compares_sides else None
        """Those that differ in case and white space alone; where a side is chosen by lot equal rows fall together."""
        self.longest_chat: Chat | None = None
        self._lines = array("Q")
        self._files: list[int] = []
        self._starts: list[int] = []

    def add(self, row: Row) -> None:
        file, line = row.place
        if not self._files or file != self._files[-1]:
            self._files.append(file)
            self._starts.append(len(self.groups))
        self._lines.append(line)
        self.groups.add(content_key(row))
        if self.alike is not None:
            self.alike.add(alike_key(row))
        if isinstance(row, Chat) and (not self.longest_chat or len(row.messages) > len(self.longest_chat.messages)):
            self.longest_chat = row

    def __len__(self) -> int:
        return len(self.groups)

    def place(self, row: int) -> Place:
        return self._files[bisect_right(self._starts, row) - 1], self._lines[row]


def _is_skipped(listed: Listed, hub_rows: HubRows | None) -> bool:
    return listed.source.path is None and hub_rows is None


def _is_whole(side: Side, sources: tuple[Listed, ...], hub_rows: HubRows | None) -> bool:
    """Whether the side has sources, and all of them were read."""
    own = [listed for listed in sources if listed.side == side]
    return bool(own) and not any(_is_skipped(listed, hub_rows) for listed in own)


def _refuse_errors(section: DataSection, sources: tuple[Listed, ...], reading: Reading, files: list[str]) -> None:
    problems = [p for findings in reading.findings.values() for p in findings.problems("error", files)]
    if problems:
        raise DataError(problems)
    for side, findings in reading.findings.items():
        if _is_whole(side, sources, reading.hub_rows):
            refuse_too_many_lost(
                findings, rows=reading.rows_read[side], allowed=section.max_lost_rows, files=files, side=side
            )


def _refuse_sources_without_rows(
    sources: tuple[Listed, ...], scans: list[SourceScan], hub_rows: HubRows | None
) -> None:
    """A source that nothing is seen of is a mistake, whatever the others hold."""
    problems = []
    numbers: Counter[Side] = Counter()
    for listed, found in zip(sources, scans, strict=True):
        where = f"data.{listed.side}.{numbers[listed.side]}"
        numbers[listed.side] += 1
        if _is_skipped(listed, hub_rows):
            continue
        if not found.rows:
            problems.append(Problem(where, f"{found.name} holds no row; take it out, or check path and limit"))
        elif found.rows > found.held_out and not found.rows_per_epoch:
            rows = found.rows - found.held_out
            message = f"weight {found.weight:g} of {rows:,} row{'s' if rows > 1 else ''} is none of {found.name}"
            problems.append(Problem(where, f"{message}; raise it to {1 / rows:.2g}, or take the source out"))
    if problems:
        raise DataError(problems)


def _find_duplicates(
    rows: _Rows,
    firsts: array[int],
    train_rows: int,
    near: dict[Place, Place],
    *,
    findings: dict[Side, Findings],
    files: list[str],
) -> None:
    """Rows that are there twice, and eval rows that are also in train, with the row that they are there."""
    alike = firsts if rows.alike is None else rows.alike.firsts()
    for row, first in enumerate(firsts):
        if row >= train_rows > first:
            findings["eval"].add("eval_in_train", rows.place(row), where(rows.place(first), files))
        elif row >= train_rows > alike[row]:
            findings["eval"].add("eval_like_train", rows.place(row), where(rows.place(alike[row]), files))
        elif row >= train_rows and (other := near.get(rows.place(row))):
            findings["eval"].add("eval_near_train", rows.place(row), where(other, files))
        elif first != row:
            findings["train" if row < train_rows else "eval"].add("duplicate", rows.place(row))
    leaked = findings["eval"].counts["eval_in_train"]
    if leaked and leaked == len(rows) - train_rows:
        raise DataError(
            "every eval row is also in train, so the held-out loss would say nothing; choose other files, or set "
            "data.eval_fraction instead",
            where="data.eval",
        )


def _held_out_on_disk(section: DataSection, sources: tuple[Listed, ...]) -> Iterator[Row]:
    """The eval rows, for a first look; of what is elsewhere none. Whoever reads them again says what is wrong."""
    reading = Reading(section, None)
    for source in sources:
        if source.side == "eval" and not any(not file.is_local for file in source.files):
            yield from reading.rows(source)


def _drawn(firsts: array[int], share: float, *, seed: int) -> bytes:
    """For each row 1 when it is held out: whole groups of equal rows are drawn until the share is reached.

    Raises DataError when one side would stay empty.
    """
    sizes = array("I", bytes(4 * len(firsts)))
    for first in firsts:
        sizes[first] += 1
    groups = array("I", (row for row, first in enumerate(firsts) if row == first))
    random.Random(seed).shuffle(groups)
    wanted, drawn = max(1, round(share * len(firsts))), 0
    is_drawn = bytearray(len(firsts))
    for group in groups:
        if drawn >= wanted:
            break
        is_drawn[group] = 1
        drawn += sizes[group]
    if drawn >= len(firsts):
        raise DataError(
            f"data.eval_fraction {share:g} of {len(firsts):,} rows leaves none to train on; lower it, or add rows",
            where="data.eval_fraction",
        )
    return bytes(is_drawn[first] for first in firsts)
