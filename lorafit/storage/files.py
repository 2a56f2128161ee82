"""Files that are whole or not there, also after the machine loses power, and what they hash to."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from pathlib import Path

STAGE_SUFFIX = ".lorafit-stage"


def flush(path: Path) -> None:
    """Bring what was written to a file, or the names in a directory, from memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, content: str | bytes) -> None:
    """`content` in `path`: whoever reads it, after whatever happened, sees what was there before or all of it."""
    stage = path.with_name(f".{path.name}.{secrets.token_hex(8)}{STAGE_SUFFIX}")
    try:
        with stage.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        stage.replace(path)
    except BaseException:  # a full disk, a request to stop
        stage.unlink(missing_ok=True)
        raise
    flush(path.parent)


def read_regular(path: Path) -> bytes:
    """What a file holds. Raises OSError, also for what is no file: reading a pipe would wait forever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is a directory, a pipe or a device, not a file", str(path))
    return path.read_bytes()
