"""What is being made, and what is being thrown away: whole under its name or not there, also after a loss of power.

Until then it lies in a stage: a directory beside its target with a name drawn at random and a marker in it, locked as
long as the process that made it lives. Only what is in a stage is ever removed, by its maker or, once the lock says
that the maker is gone, by whoever comes next.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorafit import operating_system
from lorafit.storage.json_text import parsed
from lorafit.storage.locks import lock_opened, locked_by_nobody

STAGE_SUFFIX = ".lorafit-stage"
MARKER = "made-by-lorafit.json"
UNLOCKED = f"{MARKER}.new"


def flush(path: Path) -> None:
    """Bring what was written to a file, or the names in a directory, from memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        operating_system.flush(descriptor)
    finally:
        os.close(descriptor)


def move(path: Path, target: Path) -> None:
    """Give a file or directory another name, and bring that to the disk; a file of that name is replaced."""
    path.replace(target)
    for directory in dict.fromkeys((target.parent, path.parent)):
        if not directory.name.endswith(STAGE_SUFFIX):  # gone in a moment
            flush(directory)


def make_directory(path: Path) -> None:
    """It and those above it, as far as they are not there, with their names on the disk."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        flush(place.parent)


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
        move(made, target)


def discard(path: Path) -> None:
    """Remove a directory: its name first, so that half of one never passes for a whole one."""
    with stage_beside(path) as stage:
        move(path, stage / path.name)


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty directory for what nobody keeps, for this user alone; where temporary files go (TMPDIR)."""
    with stage_beside(Path(tempfile.gettempdir()) / "lorafit") as stage:
        made = stage / "scratch"
        made.mkdir()
        yield made


@contextmanager
def stage_beside(target: Path) -> Iterator[Path]:
    """A directory beside `target` in which the block may make what it likes; removed with what is left in it.

    First goes what others left there that were killed.
    """
    make_directory(target.parent)
    remove_abandoned(target.parent)
    stage, lock = _new_stage(target)
    try:
        yield stage
    finally:
        _remove(stage)
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove the stages in `parent` whose makers are gone. Where no lock can say so they stay."""
    with suppress(OSError):  # not there, or not for us to read
        for stage in [path for path in parent.iterdir() if path.name.endswith(STAGE_SUFFIX)]:
            with suppress(OSError):  # held by its maker, or removed by another process meanwhile
                if _is_ours(stage):
                    with locked_by_nobody(stage / MARKER):
                        _remove(stage)
                elif _holds_nothing(stage):
                    _remove_unmarked(stage)


def _new_stage(target: Path) -> tuple[Path, int]:
    """A marked one, and the descriptor that holds its lock.

    Its marker gets its name when it is locked and on the disk. Before that there is nothing in it that could be lost:
    another process that takes it for abandoned may remove it, and it is made again.
    """
    while True:
        stage = target.with_name(f".{target.name}.{secrets.token_hex(8)}{STAGE_SUFFIX}")
        stage.mkdir(mode=0o700)
        try:
            return stage, _marked(stage, target)
        except FileNotFoundError:
            continue
        except BaseException:  # a full disk, a request to stop
            _remove_unmarked(stage)
            raise


def _marked(stage: Path, target: Path) -> int:
    lock = os.open(stage / UNLOCKED, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        lock_opened(lock)
        marker = {"stage_of": target.name, "host": socket.gethostname(), "process": os.getpid()}
        os.write(lock, json.dumps(marker).encode())
        operating_system.flush(lock)
        (stage / UNLOCKED).rename(stage / MARKER)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _is_ours(stage: Path) -> bool:
    """Made by lorafit, on this machine: the lock of another may not be seen here."""
    try:
        marker = parsed((stage / MARKER).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and "stage_of" in marker and marker.get("host") == socket.gethostname()


def _holds_nothing(stage: Path) -> bool:
    """Its maker was killed before it was marked, or is about to mark it."""
    return {path.name for path in stage.iterdir()} <= {UNLOCKED}


def _remove_unmarked(stage: Path) -> None:
    with suppress(OSError):
        (stage / UNLOCKED).unlink(missing_ok=True)
        stage.rmdir()


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
