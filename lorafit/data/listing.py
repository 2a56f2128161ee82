"""The sources of a recipe -> what they read, listed once, in the order in which files are numbered."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorafit.data.directory import files_in, refuse_other_splits
from lorafit.data.source_files import DataFile, FileProblem, data_file, matching, shown
from lorafit.recipe.paths import is_url
from lorafit.recipe.sections import DataSection, Source

if TYPE_CHECKING:
    from lorafit.data.remote import Downloads

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


def listing(
    section: DataSection, *, is_held_out: bool = False, downloads: Downloads | None = None
) -> tuple[Listed, ...]:
    """Training sources, then held-out ones. `is_held_out` says that nothing is trained: all are rows to measure on.

    Remote files are kept in `downloads`; without, they are read as they come, anew each time.
    """
    return tuple(_listed(section, is_held_out, downloads))


def _listed(section: DataSection, is_held_out: bool, downloads: Downloads | None) -> Iterator[Listed]:
    first = 0
    sides: tuple[tuple[Side, tuple[Source, ...]], ...] = (("train", section.train), ("eval", section.eval))
    for side, sources in sides:
        for source in sources:
            listed = _list(source, side, first, is_held_out, downloads)
            yield listed
            first = listed.end


def _list(source: Source, side: Side, first: int, is_held_out: bool, downloads: Downloads | None) -> Listed:
    if source.path is None:
        return Listed(source, side, f"hub:{source.hub}[{source.split}]", first)
    name = _shown(source.path)
    try:
        files, ignored, directory = _files(source.path, downloads)
        if directory and not is_held_out:
            refuse_other_splits(files, directory, is_for_training=side == "train")
    except FileProblem as problem:
        return Listed(source, side, name, first, problem=problem.message)
    return Listed(source, side, name, first, tuple(files), tuple(file.name for file in ignored))


def identities(sources: tuple[Listed, ...]) -> dict[int, list[int] | None]:
    """What changes with each file on disk, by its number."""
    return {
        number: file.identity()
        for listed in sources
        for number, file in enumerate(listed.files, listed.first)
        if file.is_local
    }


def bytes_of(sources: tuple[Listed, ...]) -> int:
    """How large the files on disk are."""
    found = [file.path for listed in sources for file in listed.files if file.is_local]
    return sum(path.stat().st_size for path in found if path.is_file())


def files_of(path: str) -> list[DataFile]:
    """The data files a `path` of the recipe means, sorted. Raises FileProblem when there is none."""
    return _files(path, None)[0]


def _shown(path: str) -> str:
    if not is_url(path):
        return shown(Path(path))
    from lorafit.data.remote import shown_url

    return shown_url(path)


def _files(path: str, downloads: Downloads | None) -> tuple[list[DataFile], list[DataFile], str]:
    """The files, those of a directory that are left out, and the directory, if it is one."""
    if is_url(path):
        # fsspec takes 0.1 s to import: only when a remote file is there.
        from lorafit.data.remote import remote_files

        remote, directory = remote_files(path, downloads)
        return remote, [], directory
    given = Path(path)
    try:
        if given.is_dir():
            return *files_in(given), shown(given)
        if not given.exists() and glob.has_magic(path):
            return matching(path), [], ""
    except OSError as error:
        raise FileProblem(f"cannot be read ({os.strerror(error.errno or 0)}); check its name") from None
    return [data_file(given)], [], ""
