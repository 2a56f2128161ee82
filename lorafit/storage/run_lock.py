"""One run at a time in a run directory. No torch: the command line asks here first."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafit.errors import RunDirError
from lorafit.storage.lease import SILENCE_SECONDS, Held, Holder, Lease
from lorafit.storage.no_room import NO_ROOM
from lorafit.storage.run_dir import RunDir
from lorafit.storage.stage import make_directory

logger = logging.getLogger(__name__)


@contextmanager
def held(run: RunDir, *, rank: int | None = None) -> Iterator[None]:
    """The directory is this run's in this block. Raises RunDirError when another run holds it.

    Of processes that train together `rank` is the number: they leave it to the one that started them, or, where that
    is a stranger, to the first of them.
    """
    lock = RunLock(run)
    if rank is not None and (rank != 0 or lock.is_held_by_launcher()):
        yield
        return
    if before := lock.take():
        logger.info(f"{run.path}: was in use by {before}, which is gone; taken over")
    try:
        yield
    finally:
        lock.release()


class RunLock:
    """The lease of a run directory, which is made for it, and goes with it where nothing was written into it."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._lease = Lease(run.lock)
        self._made: list[Path] = []

    def take(self) -> Holder | None:
        """Hold the directory; who held it before and is gone without having released it, if anybody.

        Makes the directory. Raises RunDirError when it is held, or cannot become a run directory.
        """
        self._run.refuse_unusable()
        path = self._run.path
        self._made = [place for place in (path, *path.parents) if not place.exists()]
        while True:
            _make(path)
            try:
                return self._lease.take()
            except FileNotFoundError:  # its last holder removed the directory meanwhile
                if path.is_dir():
                    raise
            except Held as other:
                raise self._held_by(other.holder) from other

    def is_held_by_launcher(self) -> bool:
        """Whether the process that started this one holds the directory, for this one, too."""
        return self._lease.is_held_by_parent()

    def release(self) -> None:
        """Let others have the directory; what `take` made goes where nothing was written into it."""
        self._lease.release()
        for place in self._made:
            with contextlib.suppress(OSError):
                place.rmdir()

    def _held_by(self, holder: Holder | None) -> RunDirError:
        who = holder or "another process"
        mend = "wait for it, stop it, or choose another output_dir"
        if holder is not None and holder.host != socket.gethostname():
            mend += f"; if it is gone, wait {SILENCE_SECONDS:.0f} seconds, or delete {self._run.lock}"
        return RunDirError(f"is in use by {who}; {mend}", where=str(self._run.path))


def _make(path: Path) -> None:
    """The directory, with those above it. Raises RunDirError where there can be none; a full disk stays an OSError."""
    try:
        make_directory(path)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise RunDirError(f"cannot be made ({error.strerror}); choose another output_dir", where=str(path)) from error
