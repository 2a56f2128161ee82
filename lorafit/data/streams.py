"""What a data file holds, unpacked and checked while it is read: never more of it in memory than a few buffers."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from lorafit.data.source_files import DataFile, FileProblem

CHUNK = 1 << 20
"""Bytes read at a time."""
LONGEST_LINE = 64 << 20
"""Characters of a line, a CSV field or an element of a JSON array: beyond them it is not a row."""
TOO_LONG = (
    f"is longer than {LONGEST_LINE >> 20} Mi characters; no row is: check the line ends of the file, or cut it up"
)
_MAGIC = {
    b"\x1f\x8b": "is compressed with gzip but not named so; rename it to end in .gz",
    b"PAR1": "is a Parquet file; rename it to end in .parquet",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it first",
    b"\xff\xfe": "is UTF-16 text; convert it: `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "is UTF-16 text; convert it: `iconv -f UTF-16 -t UTF-8`",
    b"version https://git-lfs.github.com/spec": "is a Git LFS pointer, not the data; fetch it with `git lfs pull`",
}

if TYPE_CHECKING:
    Stream = io.BufferedReader[Any]


class Hash(Protocol):
    """What takes the bytes that are read."""

    def update(self, data: memoryview, /) -> None: ...


class _Hashed(io.RawIOBase):
    """A raw file that hashes what is read of it."""

    def __init__(self, raw: io.RawIOBase, hashed: Hash) -> None:
        self._raw, self._hash = raw, hashed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0
        self._hash.update(memoryview(buffer)[:count])
        return count


@contextmanager
def content(file: DataFile, *, hashed: Hash | None = None) -> Iterator[Stream]:
    """A stream of what the file holds, its gzip unpacked; what goes wrong while the block reads it is a FileProblem.

    `hashed` takes the bytes on disk, all of them when the stream is read to its end.
    """
    with file.open() as raw:
        try:
            stream: Stream = io.BufferedReader(_Hashed(raw, hashed) if hashed else raw, CHUNK)
            if not stream.peek(1):
                raise FileProblem("is empty; remove it from the recipe, or write the rows into it")
            if file.is_compressed:
                stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), CHUNK)
                if not stream.peek(1):
                    raise FileProblem("is empty inside its gzip; write the rows into it")
            _refuse_other_kinds(stream.peek(1), file)
            yield stream
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FileProblem(f"is not a whole gzip file ({error}); compress or download it again") from None
        except OSError as error:
            raise FileProblem(f"cannot be read further ({os.strerror(error.errno or 0)}); check the disk") from None


def _refuse_other_kinds(head: bytes, file: DataFile) -> None:
    for magic, problem in _MAGIC.items():
        if head.startswith(magic) and not (file.suffix == ".parquet" and magic == b"PAR1"):
            raise FileProblem(problem)


def refuse_what_is_no_text(head: bytes) -> None:
    """Raises FileProblem for the beginning of a file that is not text in UTF-8 with line ends."""
    if head[:1024].lstrip()[:200].lower().startswith((b"<!doctype html", b"<html")):
        raise FileProblem("is an HTML page, not data; download the file itself (the raw link)")
    if b"\0" in head[:64]:
        raise FileProblem("is not UTF-8 text (it holds zero bytes: UTF-16, or binary); convert it: `iconv -t UTF-8`")


def not_utf8(file: DataFile) -> FileProblem:
    """Says which byte of the file is none of UTF-8's: decoders read ahead, so the line is looked for once more."""
    line, decoder = 1, codecs.getincrementaldecoder("utf-8")()
    with content(file) as stream:
        while True:
            chunk = stream.read(CHUNK)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                if error.reason == "unexpected end of data":
                    return FileProblem("ends in the middle of a character; copy or download it again", line=line)
                byte = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
                return FileProblem(f"{byte}; convert the file: `iconv -f LATIN1 -t UTF-8`", line=line)
            if not chunk:
                return FileProblem("changed while it was read; run again when it is written")
            line += chunk.count(b"\n")
