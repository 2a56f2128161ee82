"""A source of the recipe -> its files, with what is wrong with one said in one line."""

from __future__ import annotations

import difflib
import glob
import io
import os
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_KNOWN = ", ".join(SUFFIXES)


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
    def is_compressed(self) -> bool:
        """Named as gzip."""
        return self.path.suffix.lower() == ".gz"

    def open(self) -> io.RawIOBase:
        """The bytes as they are on disk. Raises FileProblem."""
        if not self.suffix:
            raise FileProblem(f"is not a kind of file that can be read ({_KNOWN}, each also .gz)")
        if self.path.exists() and not self.path.is_file():
            raise FileProblem("is not a regular file; write the rows to a file first")
        try:
            return self.path.open("rb", buffering=0)
        except FileNotFoundError:
            raise FileProblem(f"does not exist{_nearest(self.path)}; paths are relative to the recipe") from None
        except OSError as error:
            raise FileProblem(f"cannot be read ({os.strerror(error.errno or 0)}); check its permissions") from None

    def identity(self) -> list[int] | None:
        """What changes whenever the file is written to; None when it is not there.

        The time of the last change of the file's entry is among it: nobody can set it back, as `touch` and `rsync` do
        with the time of the last change of the content.
        """
        try:
            found = self.path.stat()
        except OSError:
            return None
        return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def shown(path: Path) -> str:
    """The path as a person would type it: relative to the current directory when it lies within."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def files_of(path: str) -> tuple[list[DataFile], list[Path]]:
    """The data files a `path` of the recipe means, sorted, and the files of a directory that are left out.

    Raises FileProblem when there is none.
    """
    given = Path(path)
    if given.is_dir():
        found = sorted(file for file in given.rglob("*") if file.is_file() and not _is_hidden(file, given))
        data = [file for file in found if _suffix(file)]
        if not data:
            raise FileProblem(f"is a directory without data files ({_KNOWN}, each also .gz)")
        return [_data_file(file) for file in data], [file for file in found if not _suffix(file)]
    if not given.exists() and glob.has_magic(path):
        matches = [Path(match) for match in sorted(glob.glob(path, recursive=True))]  # noqa: PTH207 (Path.glob takes no absolute pattern)
        files = [match for match in matches if not match.is_dir()]
        if not files:
            raise FileProblem("matches no file; check the pattern (relative to the recipe)")
        return [_data_file(file) for file in files], []
    return [_data_file(given)], []


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _suffix(path: Path) -> str:
    """`.jsonl` for `a.jsonl` and `a.jsonl.gz`; empty when it is no data file."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _data_file(path: Path) -> DataFile:
    return DataFile(path, shown(path), _suffix(path))


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = [entry.name for entry in path.parent.iterdir() if _suffix(entry)]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""
