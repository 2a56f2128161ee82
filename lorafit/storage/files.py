"""Files that are whole or not there, also after the machine loses power, and what they hash to."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

from lorafit.storage.stage import move, stage_beside


def write_file(path: Path, content: str | bytes) -> None:
    """`content` in `path`: whoever reads it, after whatever happened, sees what was there before or all of it."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with stage_beside(path) as stage:
        made = stage / path.name
        with made.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        move(made, path)


def append_line(path: Path, line: str) -> None:
    """One more line at the end of a file, by one process alone; a kill may leave half of it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_regular(path: Path) -> bytes:
    """What a file holds. Raises OSError, also for what is no file: reading a pipe would wait forever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is a directory, a pipe or a device, not a file", str(path))
    return path.read_bytes()
