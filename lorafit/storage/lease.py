"""Who has something at the moment, and whether they are still alive: a file that names its holder, gone when it is."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from lorafit import operating_system
from lorafit.storage.json_text import parsed
from lorafit.storage.locks import lock_for_process

SILENCE_SECONDS = 120.0
"""A process of another machine that has given no sign of life for so long is gone."""

BEAT_SECONDS = 10.0
"""Between two signs of life."""


def this_host() -> str:
    """This machine, and the space in which its process numbers hold: containers have their own."""
    return f"{platform.node()}:{operating_system.process_space()}"


def is_running(pid: int, *, started: float | None = None) -> bool:
    """Whether there is such a process on this machine that has not ended, and began when it is said to have."""
    try:
        process = psutil.Process(pid)
        has_ended = process.status() == psutil.STATUS_ZOMBIE
        return not has_ended and (started is None or abs(process.create_time() - started) < 2)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # of another user
        return True


def is_alive(pid: int, *, host: str, started: float | None, silent_seconds: float) -> bool:
    """Whether the process that had number `pid` on `host` is still there; it gave a sign of life so long ago.

    On this machine the process itself tells. One of another, or one that did not say when it began, whose number a
    later process may have, must not be silent for long.
    """
    if host in (socket.gethostname(), this_host()):
        is_known = started is not None
        return is_running(pid, started=started) and (is_known or silent_seconds < SILENCE_SECONDS)
    return silent_seconds < SILENCE_SECONDS


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    pid: int
    host: str
    since: str
    process_started: float
    """Seconds since the epoch; tells a process from a later one with the same pid."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def is_alive(self, file: Path) -> bool:
        """Whether it still holds the lease in `file`."""
        try:
            silent = time.time() - file.stat().st_mtime
        except FileNotFoundError:  # released
            return False
        return is_alive(self.pid, host=self.host, started=self.process_started, silent_seconds=silent)


class Held(Exception):
    """Another process holds the lease."""

    def __init__(self, holder: Holder | None) -> None:
        """None where the file does not say who it is."""
        super().__init__(str(holder or "another process"))
        self.holder = holder


class Lease:
    """Held from `take` to `release`, or as long as this process lives: also across `exec`, and by no child of it.

    So the lock is that of a process: of an opened file a data loader's process would inherit it, and outlive the run
    with it.
    """

    def __init__(self, file: Path) -> None:
        self._path = file
        self._file: int | None = None
        self._is_over = threading.Event()

    def take(self) -> Holder | None:
        """Hold it; who held it before and is gone without having released it, if anybody. Raises Held."""
        while self._file is None:
            self._file = self._open()
        before = _holder(self._file)
        if before is not None and before.pid == os.getpid() and before.is_alive(self._path):
            before = None  # taken by what this process was before `exec`
        if before is not None and before.is_alive(self._path):
            os.close(self._file)
            self._file = None
            raise Held(before)
        me = psutil.Process()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps(asdict(Holder(me.pid, socket.gethostname(), since, me.create_time())))
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{text}\n".encode(), 0)
        threading.Thread(target=self._touch, args=(self._file,), daemon=True).start()
        return before

    def is_held_by_parent(self) -> bool:
        """Whether the process that started this one holds it, for this one, too."""
        try:
            file = os.open(self._path, os.O_RDONLY)
        except OSError:
            return False
        holder = _holder(file)
        os.close(file)
        return holder is not None and holder.pid == os.getppid() and holder.is_alive(self._path)

    def release(self) -> None:
        """Let others have it."""
        if self._file is None:
            return
        self._is_over.set()
        self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    def _open(self) -> int | None:
        """The locked file; None when its holder took it away meanwhile, so that another must be made. Raises Held."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock_for_process(file):
                raise Held(_holder(file))
            if os.path.samestat(os.fstat(file), self._path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        return None

    def _touch(self, file: int) -> None:
        """Tell other machines that this one is alive."""
        while not self._is_over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(file)


@contextmanager
def lease(file: Path) -> Iterator[Holder | None]:
    """It is this process's in this block. Who held it before and is gone, if anybody. Raises Held."""
    taken = Lease(file)
    before = taken.take()
    try:
        yield before
    finally:
        taken.release()


def _holder(file: int) -> Holder | None:
    """What the file says; None where it says nothing that can be read."""
    try:
        return Holder(**parsed(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None
