"""The sources of a recipe -> what they read, listed once, in the order in which files are numbered."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorafit.data.directory import files_in, refuse_other_splits
from lorafit.data.files import DataFile, FileProblem, data_file, matching, shown
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


def listing(section: DataSection, *, is_held_out: bool = False) -> tuple[Listed, ...]:
    """Training sources, then held-out ones. `is_held_out` says that nothing is trained: all are rows to measure on."""
    return tuple(_listed(section, is_held_out))


def _listed(section: DataSection, is_held_out: bool) -> Iterator[Listed]:
    first = 0
    sides: tuple[tuple[Side, tuple[Source, ...]], ...] = (("train", section.train), ("eval", section.eval))
    for side, sources in sides:
        for source in sources:
            listed = _list(source, side, first, is_held_out)
            yield listed
            first = listed.end


def _list(source: Source, side: Side, first: int, is_held_out: bool) -> Listed:
    if source.path is None:
        return Listed(source, side, f"hub:{source.hub}[{source.split}]", first)
    given = Path(source.path)
    try:
        files, ignored = files_of(source.path)
        if given.is_dir() and not is_held_out:
            refuse_other_splits(files, given, is_for_training=side == "train")
    except FileProblem as problem:
        return Listed(source, side, shown(given), first, problem=problem.message)
    return Listed(source, side, shown(given), first, tuple(files), tuple(file.name for file in ignored))


def files_of(path: str) -> tuple[list[DataFile], list[DataFile]]:
    """The data files a `path` of the recipe means, sorted, and the files of a directory that are left out.

    Raises FileProblem when there is none.
    """
    given = Path(path)
    try:
        if given.is_dir():
            return files_in(given)
        if not given.exists() and glob.has_magic(path):
            return matching(path), []
    except OSError as error:
        raise FileProblem(f"cannot be read ({os.strerror(error.errno or 0)}); check its name") from None
    return [data_file(given)], []
