"""Files and names that are still there after the machine loses power."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Bring what was written to a file, or the names in a directory, from memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, text: str) -> None:
    """`text` in `path`: whoever reads it, after whatever happened, sees the old text or the new one."""
    stage = path.with_name(path.name + ".tmp")
    try:
        with stage.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a full disk
        stage.unlink(missing_ok=True)
        raise
    stage.replace(path)
    flush(path.parent)
