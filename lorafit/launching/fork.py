"""A copy of this process as it stands: what is imported here need not be imported there, nor lies in memory twice."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import IO, NoReturn

from lorafit import operating_system
from lorafit.launching.signals import REQUESTS

Serve = Callable[[IO[bytes], IO[bytes]], None]
"""What a copy does with what it is asked and where its answers go."""


def is_safe() -> bool:
    """Whether copies of this process, made before it computes anything, can do all that it can.

    Not once torch was there, whose own threads a copy lacks and waits for; not where other threads of Python may hold
    what they would never let go of in a copy, or where a GPU's driver knows this process and no copy of it.
    """
    return "torch" not in sys.modules and is_safe_without_torch_threads()


def is_safe_without_torch_threads() -> bool:
    """The same of a process that has torch, and has computed with one thread at most and no gradient."""
    return operating_system.can_copy_processes() and threading.active_count() == 1


class Fork:
    """What a `Child` asks of a `subprocess.Popen`, of a copy of this process that hears no request."""

    def __init__(self, serve: Serve, *, errors: IO[bytes]) -> None:
        """`errors` takes all that is printed there."""
        asked, ours = os.pipe()
        said, theirs = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()  # nothing is said twice
        parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
        self.pid = os.fork()
        if not self.pid:
            os.close(ours)
            os.close(said)
            _be_the_copy(serve, os.fdopen(asked, "rb"), os.fdopen(theirs, "wb"), parent=parent, errors=errors)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(asked)
        os.close(theirs)
        self.stdin: IO[bytes] | None = os.fdopen(ours, "wb")
        self.returncode: int | None = None
        self._said = os.fdopen(said, "rb", buffering=0)
        self._answers = bytearray()

    def kill(self) -> None:
        """End it at once."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended, after its answers or before."""
        if self.returncode is None:
            self.communicate(timeout)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[bytes, None]:
        """All that it answers, until it has ended. Raises TimeoutExpired, and may then be called again."""
        if self.stdin is not None:
            with suppress(BrokenPipeError):
                self.stdin.close()
            self.stdin = None
        until = None if timeout is None else time.monotonic() + timeout
        waiting = select.poll()
        waiting.register(self._said, select.POLLIN)
        while self.returncode is None:
            left = None if until is None else max(0.0, until - time.monotonic()) * 1000
            if not waiting.poll(left):
                raise subprocess.TimeoutExpired(f"copy {self.pid}", timeout or 0)
            part = os.read(self._said.fileno(), 1 << 20)
            self._answers += part
            if not part:
                _, status = os.waitpid(self.pid, 0)
                self.returncode = os.waitstatus_to_exitcode(status)
                self._said.close()
        return bytes(self._answers), None


def _be_the_copy(serve: Serve, asked: IO[bytes], said: IO[bytes], *, parent: int, errors: IO[bytes]) -> NoReturn:
    """Never comes back to where the copy was made: what is open there is not its own."""
    code = 1
    try:
        operating_system.end_with(parent)
        os.dup2(errors.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        serve(asked, said)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
