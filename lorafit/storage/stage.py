"""Directories that are whole or not there, also after the machine loses power.

What is being made, or thrown away, lies in a stage: a directory beside its target with a name drawn at random and a
marker in it, locked as long as the process that made it lives. Only what is in a stage is ever removed, by its maker
or, once the lock says that the maker is gone, by whoever comes next.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorafit.storage.files import STAGE_SUFFIX, flush
from lorafit.storage.json_text import parsed

MARKER = "made-by-lorafit.json"
NOT_LOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""What file systems without locks answer (Lustre mounted so, some FUSE)."""


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty directory that becomes `target` when the block ends, and is gone when the block raises.

    Raises FileExistsError when there is a `target` by then.
    """
    with stage_beside(target) as stage:
        made = stage / target.name
        made.mkdir()
        yield made
        for path in (*made.rglob("*"), made):
            flush(path)
        if target.exists() or target.is_symlink():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        made.rename(target)
        flush(target.parent)


def discard(path: Path) -> None:
    """Remove a directory: its name first, so that half of one never passes for a whole one."""
    with stage_beside(path) as stage:
        path.rename(stage / path.name)


@contextmanager
def stage_beside(target: Path) -> Iterator[Path]:
    """A directory beside `target` in which the block may make what it likes; removed with what is left in it."""
    stage = target.with_name(f".{target.name}.{secrets.token_hex(8)}{STAGE_SUFFIX}")
    stage.mkdir(parents=True)
    lock = None
    try:
        lock = _marked(stage, target)
        yield stage
    finally:
        _remove(stage)
        if lock is not None:
            os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove the stages in `parent` whose makers are gone. Where no lock can say so they stay."""
    with suppress(FileNotFoundError):
        stages = [path for path in parent.iterdir() if path.name.endswith(STAGE_SUFFIX) and _is_ours(path)]
        for stage in stages:
            with suppress(OSError):  # held by its maker, or removed by another process meanwhile
                lock = os.open(stage / MARKER, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(stage)
                finally:
                    os.close(lock)


def _marked(stage: Path, target: Path) -> int:
    """Put the marker into the stage; the descriptor that holds its lock. It gets its name when it is locked."""
    unlocked = stage / f"{MARKER}.new"
    lock = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    with suppress_not_lockable():
        fcntl.flock(lock, fcntl.LOCK_EX)
    marker = {"stage_of": target.name, "host": socket.gethostname(), "process": os.getpid()}
    os.write(lock, json.dumps(marker).encode())
    unlocked.rename(stage / MARKER)
    return lock


@contextmanager
def suppress_not_lockable() -> Iterator[None]:
    """Go on where the file system has no locks: nothing is removed by others there."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_LOCKABLE:
            raise


def _is_ours(stage: Path) -> bool:
    """Made by lorafit, on this machine: the lock of another may not be seen here."""
    try:
        marker = parsed((stage / MARKER).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and "stage_of" in marker and marker.get("host") == socket.gethostname()


def _remove(stage: Path) -> None:
    """The marker last: as long as anything is left of a stage, it is known for one."""
    with suppress(OSError):
        for path in stage.iterdir():
            if path.name == MARKER:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if {path.name for path in stage.iterdir()} <= {MARKER}:  # else a network disk still holds a file of it
            (stage / MARKER).unlink(missing_ok=True)
            stage.rmdir()
