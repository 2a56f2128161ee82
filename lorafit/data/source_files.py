"""A source of the recipe -> its files, with what is wrong with one said in one line."""

from __future__ import annotations

import difflib
import glob
import io
import os
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".arrow")
KNOWN = ", ".join(SUFFIXES[:-1])


class FileProblem(Exception):
    """What is wrong with a whole file, or with one line of it."""

    def __init__(self, message: str, *, line: int = 0) -> None:
        self.message, self.line = message, line
        super().__init__(message)


@dataclass(frozen=True)
class DataFile:
    """One file to read: its path, the name it is reported by, and its kind (`.jsonl`, ...)."""

    path: Path
    name: str
    suffix: str

    @property
    def is_local(self) -> bool:
        """On a disk of this machine, where it may change while it is read."""
        return True

    @property
    def is_compressed(self) -> bool:
        """Named as gzip."""
        return self.path.suffix.lower() == ".gz"

    def open(self) -> io.RawIOBase:
        """The bytes as they are on disk. Raises FileProblem."""
        try:
            if not self.path.exists():
                raise FileProblem(f"does not exist{_mend(self.path)}")
            if not self.suffix:
                raise FileProblem(f"is not a kind of file that can be read ({KNOWN}, each also .gz)")
            if not self.path.is_file():
                raise FileProblem("is not a regular file; write the rows to a file first")
            return self.path.open("rb", buffering=0)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise FileProblem(f"cannot be read ({reason}); check its name and its permissions") from None

    def identity(self) -> list[int] | None:
        """What changes whenever the file is written to; None when it is not there.

        The time of the last change of the file's entry is among it: nobody can set it back, as `touch` and `rsync` do
        with the time of the last change of the content.
        """
        try:
            found = self.path.stat()
        except (OSError, ValueError):
            return None
        return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def shown(path: Path) -> str:
    """The path as a person would type it: relative to the current directory when it lies within."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def matching(pattern: str) -> list[DataFile]:
    """The files that a glob matches, sorted. Raises FileProblem when there is none."""
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 (Path.glob takes no absolute pattern)
    files = [match for match in matches if not match.is_dir()]
    if not files:
        raise FileProblem("matches no file; check the pattern (relative to the recipe)")
    return [data_file(file) for file in files]


def data_file(path: Path) -> DataFile:
    """The file, by whatever it is named."""
    return DataFile(path, shown(path), suffix_of(path.name))


def suffix_of(name: str) -> str:
    """`.jsonl` for `a.jsonl` and `a.jsonl.gz`; empty when it is no data file."""
    name = name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _mend(path: Path) -> str:
    """What may have been meant by a path at which there is nothing."""
    if path.is_symlink():
        return f": it is a link to {path.readlink()}, where there is nothing; link it to the file, or name that"
    if path.parent.is_dir():
        names = [entry.name for entry in path.parent.iterdir() if suffix_of(entry.name) or entry.is_dir()]
        near = difflib.get_close_matches(path.name, names, n=1)
        return f"{f'; did you mean {near[0]}?' if near else ''}; paths are relative to the recipe"
    if not suffix_of(path.name):
        return f"; for a data set of the Hub write hub: {path.parent.name}/{path.name}"
    return "; paths are relative to the recipe"
