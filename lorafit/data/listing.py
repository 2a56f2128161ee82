"""The sources of a recipe -> what they read, listed once, in the order in which files are numbered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorafit.data.files import DataFile, FileProblem, files_of, shown
from lorafit.recipe.sections import DataSection, Source

Side = Literal["train", "eval"]


@dataclass(frozen=True)
class Listed:
    """One source and what it reads."""

    source: Source
    side: Side
    name: str
    first: int
    """The number of its first file."""
    files: tuple[DataFile, ...] = ()
    """None for a Hub data set, and where there is a problem."""
    ignored: tuple[str, ...] = ()
    """Files of a directory that are left out."""
    problem: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """How its files are named; a Hub data set counts as one."""
        return tuple(file.name for file in self.files) or (self.name,)

    @property
    def end(self) -> int:
        """One more than the number of its last file."""
        return self.first + len(self.names)


def listing(section: DataSection) -> tuple[Listed, ...]:
    """Training sources, then held-out ones."""
    return tuple(_listed(section))


def _listed(section: DataSection) -> Iterator[Listed]:
    first = 0
    sides: tuple[tuple[Side, tuple[Source, ...]], ...] = (("train", section.train), ("eval", section.eval))
    for side, sources in sides:
        for source in sources:
            listed = _list(source, side, first)
            yield listed
            first = listed.end


def _list(source: Source, side: Side, first: int) -> Listed:
    if source.path is None:
        return Listed(source, side, f"hub:{source.hub}[{source.split}]", first)
    name = shown(Path(source.path))
    try:
        files, ignored = files_of(source.path)
    except FileProblem as problem:
        return Listed(source, side, name, first, problem=problem.message)
    return Listed(source, side, name, first, tuple(files), tuple(file.name for file in ignored))
