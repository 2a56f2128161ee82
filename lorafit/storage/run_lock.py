"""One run at a time in a run directory: a lock that names its holder, and is gone when the holder is.

No torch: the command line asks here first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from lorafit.errors import RunDirError
from lorafit.launching import launch
from lorafit.storage.json_text import parsed
from lorafit.storage.run_dir import RunDir
from lorafit.storage.stage import NOT_LOCKABLE

SILENCE_SECONDS = 120.0
"""A holder on another machine that has not touched its lock for so long is gone."""


@dataclass(frozen=True)
class Holder:
    """Who holds a run directory."""

    pid: int
    host: str
    since: str
    process_started: float
    """Seconds since the epoch; tells a process from a later one with the same pid."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def is_alive(self, file: Path) -> bool:
        """On this machine by its process; on another by when it last touched the lock."""
        if self.host != socket.gethostname():
            return time.time() - file.stat().st_mtime < SILENCE_SECONDS
        try:
            return abs(psutil.Process(self.pid).create_time() - self.process_started) < 2
        except psutil.NoSuchProcess:
            return False


@contextmanager
def held(run: RunDir, *, say: Callable[[str], None]) -> Iterator[None]:
    """The directory is this run's in this block. Processes that train together leave it to the one that started them,
    or, where that is a stranger, to the first of them. Raises RunDirError when another run holds it."""
    lock = RunLock(run)
    if launch.is_worker() and (launch.rank() != 0 or lock.is_held_by_launcher()):
        yield
        return
    if before := lock.take():
        say(f"{run.path}: was in use by {before}, which is gone; taken over")
    try:
        yield
    finally:
        lock.release()


class RunLock:
    """Held from `take` to `release`, or as long as this process lives: also across `exec`, and by no child of it.

    A POSIX record lock, not flock: a data loader's process would inherit the latter and outlive the run with it.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._file: int | None = None
        self._made: list[Path] = []
        self._is_over = threading.Event()

    def take(self) -> Holder | None:
        """Hold the directory; who held it before and is gone without having released it, if anybody.

        Makes the directory. Raises RunDirError when it is held, or cannot become a run directory.
        """
        self._run.refuse_unusable()
        path = self._run.path
        self._made = [place for place in (path, *path.parents) if not place.exists()]
        while self._file is None:
            _make(path)
            self._file = self._open()
        before = _holder(self._file)
        if before is not None and before.pid == os.getpid() and before.is_alive(self._run.lock):
            before = None  # taken by what this process was before `exec`
        if before is not None and before.is_alive(self._run.lock):
            os.close(self._file)
            self._file = None
            raise self._held_by(before)
        me = psutil.Process()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps(asdict(Holder(me.pid, socket.gethostname(), since, me.create_time())))
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{text}\n".encode(), 0)
        threading.Thread(target=self._touch, args=(self._file,), daemon=True).start()
        return before

    def is_held_by_launcher(self) -> bool:
        """Whether the process that started this one holds the directory, for this one, too."""
        try:
            file = os.open(self._run.lock, os.O_RDONLY)
        except OSError:
            return False
        holder = _holder(file)
        os.close(file)
        return holder is not None and holder.pid == os.getppid() and holder.is_alive(self._run.lock)

    def release(self) -> None:
        """Let others have the directory; what `take` made goes where nothing was written into it."""
        if self._file is None:
            return
        self._is_over.set()
        self._run.lock.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        for place in self._made:
            with contextlib.suppress(OSError):
                place.rmdir()

    def _open(self) -> int | None:
        """The locked file; None when its holder took it away meanwhile, so that another must be made."""
        file = os.open(self._run.lock, os.O_RDWR | os.O_CREAT, 0o666)
        os.set_inheritable(file, True)  # closing any descriptor of it drops the lock, and so would `exec`
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NOT_LOCKABLE:  # there the text alone decides
                holder = _holder(file)
                os.close(file)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise self._held_by(holder) from error
                raise
        try:
            if os.path.samestat(os.fstat(file), self._run.lock.stat()):
                return file
        except FileNotFoundError:
            pass
        os.close(file)
        return None

    def _touch(self, file: int) -> None:
        """Tell other machines that this one is alive."""
        while not self._is_over.wait(SILENCE_SECONDS / 6):
            with contextlib.suppress(OSError):
                os.utime(file)

    def _held_by(self, holder: Holder | None) -> RunDirError:
        who = holder or "another process"
        mend = "wait for it, stop it, or choose another output_dir"
        if holder is not None and holder.host != socket.gethostname():
            mend += f"; if it is gone, wait {SILENCE_SECONDS:.0f} seconds, or delete {self._run.lock}"
        return RunDirError(f"is in use by {who}; {mend}", where=str(self._run.path))


def _make(path: Path) -> None:
    """The directory, with those above it. Raises RunDirError where there can be none; a full disk stays an OSError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            raise
        raise RunDirError(f"cannot be made ({error.strerror}); choose another output_dir", where=str(path)) from error


def _holder(file: int) -> Holder | None:
    """What the lock says; None where it says nothing that can be read."""
    try:
        return Holder(**parsed(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None
