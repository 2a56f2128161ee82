"""A source of the recipe -> its files -> their text, with what is wrong with a file said in one line."""

from __future__ import annotations

import difflib
import glob
import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_KNOWN = ", ".join(SUFFIXES)
_MAGIC = {
    b"\x1f\x8b": "is compressed with gzip but not named so; rename it to end in .gz",
    b"PAR1": "is a Parquet file; rename it to end in .parquet",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it first",
    b"\xff\xfe": "is UTF-16 text; convert it: `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "is UTF-16 text; convert it: `iconv -f UTF-16 -t UTF-8`",
    b"version https://git-lfs.github.com/spec": "is a Git LFS pointer, not the data; fetch it with `git lfs pull`",
}


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


def read_bytes(file: DataFile) -> bytes:
    """The whole file, as it is on disk.

    Raises FileProblem.
    """
    if not file.suffix:
        raise FileProblem(f"is not a kind of file that can be read ({_KNOWN}, each also .gz)")
    path = file.path
    if path.exists() and not path.is_file():
        raise FileProblem("is not a regular file; write the rows to a file first")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileProblem(f"does not exist{_nearest(path)}; paths are relative to the recipe") from None
    except OSError as error:
        raise FileProblem(f"cannot be read ({os.strerror(error.errno or 0)}); check its permissions") from None


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = [entry.name for entry in path.parent.iterdir() if _suffix(entry)]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def unpack(file: DataFile, data: bytes) -> bytes:
    """What a gzip file holds; other files as they are.

    Raises FileProblem for what is empty or not what its name says.
    """
    if not data:
        raise FileProblem("is empty; remove it from the recipe, or write the rows into it")
    if file.is_compressed:
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FileProblem(f"is not a whole gzip file ({error}); compress or download it again") from None
        if not data:
            raise FileProblem("is empty inside its gzip; write the rows into it")
    for magic, problem in _MAGIC.items():
        if data.startswith(magic) and not (file.suffix == ".parquet" and magic == b"PAR1"):
            raise FileProblem(problem)
    return data


def decode(data: bytes) -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Raises FileProblem.
    """
    head = data[:1024].lstrip()[:200].lower()
    if head.startswith((b"<!doctype html", b"<html")):
        raise FileProblem("is an HTML page, not data; download the file itself (the raw link)")
    if b"\0" in data[:64]:
        raise FileProblem("is not UTF-8 text (it holds zero bytes: UTF-16, or binary); convert it: `iconv -t UTF-8`")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"byte 0x{data[error.start]:02x} is not UTF-8; convert the file: `iconv -f LATIN1 -t UTF-8`"
        raise FileProblem(message, line=line) from None
    if not text.strip():
        raise FileProblem("holds only blank lines; write the rows into it")
    return text
