"""Files that are whole or not there, also after the machine loses power, and what they hash to."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

from lorafit import operating_system
from lorafit.storage.stage import move, remove_abandoned, stage_beside


def write_file(path: Path, content: str | bytes) -> None:
    """`content` in `path`: whoever reads it, after whatever happened, sees what was there before or all of it."""
    encoded = content.encode("utf-8") if isinstance(content, str) else content
    if path.exists() and not path.is_file() and not path.is_dir():  # /dev/stdout, a pipe
        path.write_bytes(encoded)
        return
    path = Path(os.path.realpath(path))  # what a link leads to is replaced, not the link
    os.stat(f"{path.parent}/.")  # noqa: PTH116 - raises where it is no directory, which `Path` would drop the dot of
    with stage_beside(path) as stage:
        made = stage / path.name
        with made.open("xb") as file:
            file.write(encoded)
            file.flush()
            operating_system.flush(file.fileno())
        move(made, path)


def write_new_file(path: Path, content: str | bytes) -> None:
    """The same where there is none yet. Raises FileExistsError."""
    remove_abandoned(path.parent)
    if path.exists() or path.is_symlink():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    write_file(path, content)


def append_line(path: Path, line: str) -> None:
    """One more line at the end of a file, by one process alone; a kill may leave half of it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def cut_torn_line(path: Path) -> None:
    """Remove what follows the last line feed: half a line, of a writer that died in it. Nobody may write meanwhile."""
    with path.open("rb+") as file:
        end = whole = file.seek(0, os.SEEK_END)
        while whole:
            start = max(whole - 4096, 0)
            file.seek(start)
            found = file.read(whole - start).rfind(b"\n") + 1
            if found:
                whole = start + found
                break
            whole = start
        if whole < end:
            file.truncate(whole)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_regular(path: Path) -> bytes:
    """What a file holds. Raises OSError, also for what is no file: reading a pipe would wait forever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is a directory, a pipe or a device, not a file", str(path))
    return path.read_bytes()
