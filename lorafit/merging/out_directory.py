"""A model or adapter that appears where it was asked for whole or not at all, and the disk that has room for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafit.errors import DiskError, RunDirError
from lorafit.storage.no_room import NO_ROOM
from lorafit.storage.stage import make_directory, remove_abandoned, staged

SMALL_FILES = 32 << 20
"""Bytes set aside for tokenizer, settings and file system."""


@contextmanager
def out_directory(target: Path, *, needed: int) -> Iterator[Path]:
    """A directory that becomes `target` when the block ends, and is gone when the block raises.

    `needed` is the bytes of the weights that will be written. Raises RunDirError when `target` exists, DiskError when
    there is no room for it or the disk fills up meanwhile.
    """
    parent = target.parent
    refuse_existing(target)
    try:
        make_directory(parent)
        _refuse_full(parent, needed)
        with staged(target) as stage:
            yield stage
            refuse_existing(target)  # another process may have been faster
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise _disk_error(parent, needed, str(error.strerror)) from None


def refuse_existing(target: Path) -> None:
    """Raises RunDirError when there is something in the place of `target`, or nothing can be put there."""
    remove_abandoned(target.parent)
    if target.exists() or target.is_symlink():
        raise RunDirError("exists already: remove it, or choose another directory with --out", where=str(target))
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir():
        raise RunDirError(f"{parent} is a file; choose another directory with --out", where=str(target))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunDirError(f"{parent} is not writable; choose another directory with --out", where=str(target))


def _refuse_full(parent: Path, needed: int) -> None:
    if shutil.disk_usage(parent).free < needed + SMALL_FILES:
        raise _disk_error(parent, needed, "No space left on device")


def _disk_error(parent: Path, needed: int, reason: str) -> DiskError:
    free = shutil.disk_usage(parent).free
    return DiskError(
        f"{reason}: the merged model needs {needed + SMALL_FILES:,} bytes, {free:,} are free; make room, or choose "
        "another directory with --out",
        where=str(parent),
    )
