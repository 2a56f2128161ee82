"""Requests to stop: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a terminal that closes).

A run leaves at once where nothing is lost, else at the end of its step, with a checkpoint. No torch: a request is heard
from the first moment on. The process that only starts others passes a request on to them and waits.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

import psutil

from lorafit.errors import MachineError, StopRequested
from lorafit.launching import launch

T = TypeVar("T")

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

LEFT = "left at once; the last checkpoint is what it was"

ENDED_WITH_ANOTHER = 143
"""Exit code of a process that ends because another of its run did: not the cause, and nothing to say."""


def listen(on_request: Callable[[int, FrameType | None], None]) -> None:
    """Call `on_request` for each request, but those that were ignored when this process started (nohup)."""
    for number in REQUESTS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_request)
    release()  # held back while this process became what it is


def hold_back() -> None:
    """Let requests wait for the next `listen`, also across `exec`, which forgets who listens."""
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)


def release() -> None:
    """Hear what was held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)


@contextmanager
def ends_clean() -> Iterator[None]:
    """In this block SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, where nobody else listens to them."""
    heard = [number for number in REQUESTS if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        heard = []
    for number in heard:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


class StopRequest:
    """What a process that trains hears. Outside of `held` a request raises KeyboardInterrupt; inside it is noted."""

    def __init__(self, *, resume_command: str = "", is_announced: bool = False) -> None:
        """`resume_command` is what the user types to go on; `is_announced` says a noted request on stderr."""
        self.heard: signal.Signals | None = None
        self._resume_command = resume_command
        self._is_announced = is_announced
        self._interrupts = 0
        self._is_held = False
        self._is_over = False

    def listen(self) -> None:
        """Hear requests from now on."""
        listen(self._on_request)
        # A system that stops a job signals all of its processes. Those that training forks to load batches still owe
        # them to this one, and begin with requests held back for good.
        os.register_at_fork(
            before=lambda: hold_back() if self._is_held else None,
            after_in_parent=lambda: release() if self._is_held else None,
        )

    def _on_request(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 and not launch.is_worker():  # there the launcher counts
            _write_line(LEFT)
            os._exit(StopRequested.exit_code)
        if self._is_over:
            return
        if launch.is_worker() and has_lost_another():
            raise SystemExit(ENDED_WITH_ANOTHER)  # nothing can be agreed on any more
        first, self.heard = self.heard is None, signal.Signals(number)
        if not self._is_held:
            raise KeyboardInterrupt
        if first and self._is_announced:
            _write_line(f"{self.heard.name}: stopping at the end of this step; a second Ctrl-C leaves at once")

    @contextmanager
    def held(self) -> Iterator[None]:
        """In this block a request is noted, and obeyed by who looks at `heard`."""
        if self.heard:  # some library swallowed the interrupt
            raise KeyboardInterrupt
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def ignore(self) -> None:
        """From now on only a second SIGINT counts: what is left to do is short, and better done."""
        self._is_over = True

    def stopped(self, *, step: int, steps: int, where: str) -> StopRequested:
        """What is said of a run that was stopped after `step` of `steps`, with a checkpoint of that step."""
        kept = "" if step else "; nothing was saved"
        go_on = f"; go on with `{self._resume_command}`" if self._resume_command else ""
        return StopRequested(f"stopped at {step}/{steps}{kept}{go_on}", where=where)


def done_elsewhere(work: Callable[[], T]) -> T:
    """What `work` comes to in another thread: it waits for other processes in C, where Python hears no request."""
    found: list[T] = []
    broken: list[Exception] = []

    def try_it() -> None:
        try:
            found.append(work())
        except Exception as error:  # raised where the result is wanted
            broken.append(error)

    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if broken:
        raise broken[0]
    return found[0]


def has_lost_another(*, within_seconds: float = 0.0) -> bool:
    """Whether a process that trains with this one on this machine has ended, the one that started them, or a machine.

    A broken connection is noticed a moment before the process at its other end is gone.
    """
    until = time.monotonic() + within_seconds
    while not _is_one_gone():
        if time.monotonic() >= until:
            return False
        time.sleep(0.05)
    return True


def _is_one_gone() -> bool:
    if launch.has_lost_machine():
        return True
    try:
        siblings = psutil.Process(os.getppid()).children()
        alive = [process for process in siblings if process.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return True
    return len(alive) < launch.processes_here()


class PassOn:
    """What the process that starts others does with a request: each of them hears it as SIGTERM, once.

    They have no terminal of their own, so Ctrl-C reaches this process alone. A second SIGINT kills them.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        self._interrupts = 0

    def listen(self) -> None:
        """Hear requests from now on."""
        listen(self._on_request)

    def _on_request(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        started = psutil.Process().children()
        if self._interrupts > 1:
            for process in started:
                process.kill()
            psutil.wait_procs(started, timeout=5)
            _write_line(LEFT)
            os._exit(StopRequested.exit_code)
        first, self.heard = self.heard is None, signal.Signals(number)
        if not started:
            raise KeyboardInterrupt
        if first:
            for process in started:
                process.terminate()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(processes: list[psutil.Process], *, within_seconds: float) -> None:
    """Ask them to end, and kill those that do not. Another thread may learn meanwhile that one has ended."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    kill_at = time.monotonic() + within_seconds
    while time.monotonic() < kill_at and any(_is_alive(process) for process in processes):
        time.sleep(0.1)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def end_after_lost_machine(sign: Path, why: Callable[[], object], *, is_over: threading.Event) -> None:
    """End what this process has started, which waits for a machine that is gone and may hear nothing any more, until
    this process is over, too.

    Where nothing was started yet this process itself may wait in torch, and is left without a goodbye.
    """
    sign.touch()
    until, has_ended_some = time.monotonic() + 8, False
    while not is_over.is_set() and (time.monotonic() < until or has_ended_some):
        started = psutil.Process().children()  # asked for no exit code, which is for the launcher to learn
        has_ended_some = has_ended_some or bool(started)
        _end(started, within_seconds=4)
        is_over.wait(0.5)
    if is_over.is_set():
        return
    _write_line(f"error: {why()}")
    os._exit(MachineError.exit_code)


def _write_line(text: str) -> None:
    """Past sys.stderr, in the middle of whose own writing a signal may come."""
    os.write(2, f"\n{text}\n".encode())
