"""A directory that appears under its name whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorafit.errors import DiskError, RunDirError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
SMALL_FILES = 32 << 20
"""Bytes set aside for tokenizer, settings and file system."""


@contextmanager
def staged(target: Path, *, needed: int) -> Iterator[Path]:
    """A directory beside `target`, put in its place when the block ends; removed when the block raises.

    `needed` is the bytes of the weights that will be written. Raises RunDirError when `target` exists, DiskError when
    there is no room for it or the disk fills up meanwhile.
    """
    parent = target.parent
    _refuse_existing(target)
    stage = parent / f"{target.name}.tmp-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        _refuse_full(parent, needed)
        stage.mkdir()
        lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held by this process as long as it lives: by that a stale one is known
            yield stage
            for path in sorted(stage.rglob("*")):
                _flush(path)
            os.fsync(lock)
            _refuse_existing(target)
            stage.rename(target)
            _flush(parent)
        finally:
            os.close(lock)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        shutil.rmtree(stage, ignore_errors=True)
        raise _disk_error(parent, needed, str(error.strerror)) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # gone already when it was renamed


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise RunDirError("exists already: remove it, or choose another directory with --out", where=str(target))
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir():
        raise RunDirError(f"{parent} is a file; choose another directory with --out", where=str(target))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunDirError(f"{parent} is not writable; choose another directory with --out", where=str(target))


def _remove_stale(target: Path) -> None:
    """What a killed merge left beside `target`; another merge that is still at work keeps its own."""
    for path in target.parent.glob(f"{target.name}.tmp-*"):
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
