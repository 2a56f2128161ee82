"""Sources -> checked rows, without torch or datasets: what `validate` needs, and where `prepare` starts."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorafit.data.digest import hub_name, sha256
from lorafit.data.files import FileProblem, files_of, read_bytes, shown, unpack
from lorafit.data.findings import Findings, refuse_too_many_lost
from lorafit.data.formats import Shaper
from lorafit.data.problems import listed
from lorafit.data.readers import HubRows, Rows, read_rows
from lorafit.data.rows import Place, Row, content_key
from lorafit.errors import DataError
from lorafit.recipe.sections import DataSection, Source

Side = Literal["train", "eval"]


@dataclass(frozen=True)
class SourceScan:
    """What one source of the recipe holds."""

    name: str
    side: Side
    format: str
    files: int
    rows: int
    """Rows that can be trained on."""
    weight: float

    @property
    def rows_per_epoch(self) -> int:
        """`rows` times `weight`; a share of a row is rounded."""
        return int(self.weight) * self.rows + round(self.weight % 1 * self.rows)


@dataclass(frozen=True)
class DataScan:
    """Checked rows of both sides and what was found on the way."""

    train: list[Row]
    """Training rows, each once."""
    eval: list[Row]
    files: tuple[str, ...]
    """What the file numbers of the rows index."""
    source_of_file: tuple[int, ...]
    """For each file, its source in `sources`."""
    sources: tuple[SourceScan, ...]
    digests: tuple[str | None, ...]
    """SHA-256 of each file; None for those not read from disk or beyond a limit."""
    read: dict[Side, int]
    """Rows read, lost ones included."""
    findings: dict[Side, Findings]
    skipped_hub: tuple[str, ...]
    """Hub data sets that were not read."""

    @property
    def train_rows(self) -> int:
        """Training rows of one epoch, weights included."""
        return len(epoch_rows([row.place for row in self.train], self, seed=0))

    @property
    def eval_rows(self) -> int:
        """Held-out rows."""
        return len(self.eval)

    @property
    def lost(self) -> int:
        """Rows left out."""
        return sum(findings.count("lost") for findings in self.findings.values())

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
        held_out = f", {self.eval_rows:,} held out" if self.eval else ""
        files = f"{len(self.files)} file{'s' if len(self.files) != 1 else ''}"
        hub = f"; read when training starts: {', '.join(self.skipped_hub)}" if self.skipped_hub else ""
        return f"{self.train_rows:,} rows to train on{held_out}, from {files}, {self.lost:,} lost{hub}"


def scan(section: DataSection, *, seed: int, hub_rows: HubRows | None = None) -> DataScan:
    """Read and check every row of the section. Hub data sets are read by `hub_rows`; without it they are only named.

    Raises DataError with every problem of every file.
    """
    reading = _Reading(section, hub_rows)
    for source in section.train:
        reading.read(source, "train")
    for source in section.eval:
        reading.read(source, "eval")
    problems = [p for findings in reading.findings.values() for p in findings.problems("error", reading.files)]
    if problems:
        raise DataError(problems)
    for side in reading.findings:
        if reading.is_whole(side):
            refuse_too_many_lost(
                reading.findings[side],
                rows=reading.rows_read[side],
                allowed=section.max_lost_rows,
                files=reading.files,
                side=side,
            )
    train, held_out = reading.rows["train"], reading.rows["eval"]
    keys = [content_key(row) for row in train]
    _find_duplicates(train, keys, held_out, reading.findings)
    if section.eval_fraction is not None and reading.is_whole("train"):
        train, held_out = _split(train, keys, section.eval_fraction, seed=seed)
    return DataScan(
        train=train,
        eval=held_out,
        files=tuple(reading.files),
        source_of_file=tuple(reading.source_of_file),
        sources=tuple(reading.sources),
        digests=tuple(reading.digests),
        read=reading.rows_read,
        findings=reading.findings,
        skipped_hub=tuple(reading.skipped_hub),
    )


class _Reading:
    """The state of one pass over all sources."""

    def __init__(self, section: DataSection, hub_rows: HubRows | None) -> None:
        self._section = section
        self._hub_rows = hub_rows
        self.rows: dict[Side, list[Row]] = {"train": [], "eval": []}
        self.findings: dict[Side, Findings] = {"train": Findings(), "eval": Findings()}
        self.rows_read: dict[Side, int] = {"train": 0, "eval": 0}
        self.files: list[str] = []
        self.source_of_file: list[int] = []
        self.sources: list[SourceScan] = []
        self.skipped_hub: list[str] = []
        self.digests: list[str | None] = []
        self._whole: dict[Side, bool | None] = {"train": None, "eval": None}

    def is_whole(self, side: Side) -> bool:
        """Whether the side has sources, and all of them were read."""
        return self._whole[side] is True

    def read(self, source: Source, side: Side) -> None:
        """Every row of the source, up to its limit."""
        findings = self.findings[side]
        shaper = Shaper(source, findings, section=self._section)
        before, first_file = len(self.rows[side]), len(self.files)
        if source.path is None and self._hub_rows is None:
            self.skipped_hub.append(str(source.hub))
            self._whole[side] = False
            name = str(source.hub)
        else:
            self._whole[side] = self._whole[side] is not False
            name = (
                self._read_hub(source, side, shaper) if source.path is None else self._read_files(source, side, shaper)
            )
        shaper.report_columns((first_file, 0))
        kept = len(self.rows[side]) - before
        files = len(self.files) - first_file
        self.sources.append(SourceScan(name, side, shaper.format, files, kept, source.weight))

    def _read_hub(self, source: Source, side: Side, shaper: Shaper) -> str:
        name = hub_name(source.hub, source.split)
        number = self._add_file(name)
        try:
            if self._hub_rows is not None:
                self._take(self._hub_rows(source), source.limit, side=side, shaper=shaper, file=number)
        except FileProblem as problem:
            self.findings[side].add("unreadable", (number, 0), problem.message)
        return name

    def _read_files(self, source: Source, side: Side, shaper: Shaper) -> str:
        findings = self.findings[side]
        path = str(source.path)
        try:
            files, ignored = files_of(path)
        except FileProblem as problem:
            findings.add("unreadable", (self._add_file(shown(Path(path))), 0), problem.message)
            return shown(Path(path))
        left = source.limit
        for file in files:
            number = self._add_file(file.name)
            if left == 0:
                continue
            try:
                data = read_bytes(file)
                self.digests[number] = sha256(data)

                def broken(line: int, message: str, number: int = number) -> None:
                    findings.add("broken", (number, line), message)

                rows = read_rows(file, unpack(file, data), broken=broken)
                taken = self._take(rows, left, side=side, shaper=shaper, file=number)
            except FileProblem as problem:
                findings.add("unreadable", (number, problem.line), problem.message)
                continue
            left = None if left is None else left - taken
        for _ in ignored:
            findings.add("ignored_files", (len(self.files) - 1, 0), listed([file.name for file in ignored]))
        return shown(Path(path))

    def _add_file(self, name: str) -> int:
        self.files.append(name)
        self.source_of_file.append(len(self.sources))
        self.digests.append(None)
        return len(self.files) - 1

    def _take(self, rows: Rows, limit: int | None, *, side: Side, shaper: Shaper, file: int) -> int:
        """Shape and check the rows of one file; how many were read."""
        kept, shape = self.rows[side], shaper.shape
        taken = 0
        for line, raw in rows:
            if taken == limit:
                break
            taken += 1
            place = (file, line)
            row = shape(raw, place)
            if row is not None:
                kept.append(row)
        self.rows_read[side] += taken
        return taken


def _find_duplicates(
    train: Sequence[Row], keys: Sequence[Hashable], held_out: Sequence[Row], findings: dict[Side, Findings]
) -> None:
    """Rows that are there twice, and eval rows that are also in train."""
    seen: set[Hashable] = set()
    for row, key in zip(train, keys, strict=True):
        if key in seen:
            findings["train"].add("duplicate", row.place)
        seen.add(key)
    seen_in_eval: set[Hashable] = set()
    for row in held_out:
        key = content_key(row)
        if key in seen:
            findings["eval"].add("eval_in_train", row.place)
        elif key in seen_in_eval:
            findings["eval"].add("duplicate", row.place)
        seen_in_eval.add(key)
    leaked = findings["eval"].counts["eval_in_train"]
    if held_out and leaked == len(held_out):
        raise DataError(
            "every eval row is also in train, so the held-out loss would say nothing; choose other files, or set "
            "data.eval_fraction instead",
            where="data.eval",
        )


def _split(rows: list[Row], keys: list[Hashable], share: float, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Train and held-out rows: whole groups of equal rows are drawn until the share is reached.

    Raises DataError when one side would stay empty.
    """
    groups = list(dict.fromkeys(keys))
    random.Random(seed).shuffle(groups)
    sizes = dict.fromkeys(groups, 0)
    for key in keys:
        sizes[key] += 1
    wanted, held, drawn = max(1, round(share * len(rows))), set(), 0
    for group in groups:
        if drawn >= wanted:
            break
        held.add(group)
        drawn += sizes[group]
    if drawn >= len(rows):
        raise DataError(
            f"data.eval_fraction {share:g} of {len(rows):,} rows leaves none to train on; lower it, or add rows",
            where="data.eval_fraction",
        )
    train = [row for row, key in zip(rows, keys, strict=True) if key not in held]
    return train, [row for row, key in zip(rows, keys, strict=True) if key in held]


def epoch_rows(places: Sequence[Place], scanned: DataScan, *, seed: int) -> list[int]:
    """Indices of the rows of one epoch: each source as often as its weight says, a share of it drawn by seed."""
    by_source: dict[int, list[int]] = {}
    for index, (file, _) in enumerate(places):
        by_source.setdefault(scanned.source_of_file[file], []).append(index)
    chosen = []
    for source, indices in sorted(by_source.items()):
        weight = scanned.sources[source].weight
        share = round(weight % 1 * len(indices))
        drawn = sorted(random.Random(f"{seed}:{source}").sample(indices, share))
        chosen += indices * int(weight) + drawn
    return chosen
