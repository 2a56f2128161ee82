"""Work that a command gives to a process of its own, whose memory and imports end with it.

`Child("lorafit.planning.make_plan:answer", question)` starts the process, which imports the module, calls the function
and hands back what it returns; `answer()` waits for that. What goes either way is pickled. A LorafitError goes through
as it is. Whatever else goes wrong there is a ChildFailed here.

The process ends with this one, however that ended. It hears no request to stop: who waits for it hears them, and ends
it. Of other launchers' variables it sees none: it trains with nobody.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import IO, Any

from lorafit import pulse
from lorafit.errors import LorafitError, Problem
from lorafit.imports import quick_imports
from lorafit.launching import launch
from lorafit.launching.fork import Fork
from lorafit.launching.signals import REQUESTS
from lorafit.pulse import duration

logger = logging.getLogger(__name__)

_MAIN = "from lorafit.launching.child import main; main()"


class ChildFailed(Exception):
    """The process ended without an answer."""

    def __init__(self, said: str, *, code: int) -> None:
        """`said` is what stood on its stderr, mostly a traceback."""
        super().__init__(said.strip() or f"it ended with {code}")
        self.was_killed = code < 0
        """By a signal: not by us, and mostly for want of memory."""
        lines = [line for line in said.splitlines() if line.strip()]
        killed = "it was killed; the machine may have run out of memory"
        self.reason = killed if self.was_killed else lines[-1] if lines else "it gave no reason"
        """In one line."""


@dataclass(frozen=True)
class Answer:
    """What the function returned, on its way from one process to another."""

    value: Any


@dataclass(frozen=True)
class Refused:
    """The LorafitError that it raised: an exception would lose its problems."""

    kind: type[LorafitError]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Ended:
    """What a process has said, and how it ended."""

    messages: tuple[Any, ...]
    """What its function yielded, one after the other, and last what it returned: an `Answer` or a `Refused`."""
    errors: str
    code: int
    is_late: bool
    """Whether it was ended here, because it took too long."""


class Child:
    """A process that was started and works meanwhile."""

    def __init__(
        self,
        work: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        waits: bool = False,
        copied: bool = False,
    ) -> None:
        """`work` is the `module:function` to call with these; `environment` comes on top of this process's own.

        One that `waits` imports the module meanwhile, and is told by `call` what to call the function with. For one
        that is `copied` the module is imported here, and it is a copy of this process: where `fork.is_safe` says so.
        """
        self._work = work
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe would fill up while nobody reads it
        alone = launch.environment_alone() | dict(environment or {})
        self._process: subprocess.Popen[bytes] | Fork
        if copied:
            _function(work)
            self._process = Fork(partial(_serve_alone, work, alone), errors=self._errors)
            return
        with tempfile.TemporaryFile() as asked:
            pickle.dump(arguments, asked)
            asked.seek(0)
            self._process = started(
                ["-P", "-c", _MAIN, work],  # -P: no library is taken from the directory that the user is in
                environment=alone,
                stdin=subprocess.PIPE if waits else asked,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        """It is not needed any more, whether it was asked or not."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def call(self, *arguments: object) -> None:
        """Begin the work of one that waits."""
        pipe, self._process.stdin = self._process.stdin, None
        assert pipe is not None
        with suppress(BrokenPipeError), pipe:  # what ended it is said by `answer`
            pickle.dump(arguments, pipe)

    def answer(self, *, seconds: float | None = None) -> Any:
        """Wait for it, saying every half a minute that it goes on.

        Raises the LorafitError that the function raised, ChildFailed, and TimeoutError after so many seconds.
        """
        ended = self.ended(seconds=seconds)
        if ended.is_late:
            raise TimeoutError
        last = ended.messages[-1] if ended.messages else None
        if isinstance(last, Refused):
            raise last.kind(last.problems)
        if not isinstance(last, Answer):
            raise ChildFailed(ended.errors, code=ended.code)
        return last.value

    def ended(self, *, seconds: float | None = None) -> Ended:
        """Wait for its end, at most so many seconds; then it is ended."""
        began, is_late = time.monotonic(), False
        with self._errors:
            try:
                while True:
                    left = pulse.MOST_SECONDS if seconds is None else began + seconds - time.monotonic()
                    try:
                        said, _ = self._process.communicate(timeout=left)
                        break
                    except subprocess.TimeoutExpired:
                        if seconds is not None:
                            is_late = True
                            self._process.kill()
                            said, _ = self._process.communicate()
                            break
                        logger.info(f"{self._name()}: {duration(time.monotonic() - began)} so far")
            finally:
                self._process.kill()  # an interrupt ends it, too
                self._process.wait()
            self._errors.seek(0)
            errors = self._errors.read().decode("utf-8", "replace")
        return Ended(tuple(_messages(said)), errors, self._process.wait(), is_late)

    def _name(self) -> str:
        return self._work.partition(":")[0].rpartition(".")[2].replace("_", " ")


def started(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: IO[bytes] | None = None,
    own_session: bool = False,
) -> subprocess.Popen[bytes]:
    """`python ARGUMENTS` with the modules of this process, started by its main thread: it ends with this process where
    it calls `launch.end_with_launcher`, and hears no request before it calls `signals.listen`.

    `own_session` is for one that listens: Ctrl-C then reaches this process alone, which passes it on.
    """
    places = [environment.get("PYTHONPATH"), *sys.path]
    own = {"LORAFIT_LAUNCHER": str(os.getpid()), "PYTHONPATH": os.pathsep.join(filter(None, places))}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)  # a process inherits what its parent holds back
    try:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=dict(environment) | own,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=own_session,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _messages(said: bytes) -> Iterator[Any]:
    """All that came through whole."""
    stream = io.BytesIO(said)
    while True:
        try:
            yield pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):
            return


def main() -> None:
    """Be the process: the function is named on the command line, what to call it with comes through stdin."""
    launch.end_with_launcher()
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print does not get between the answers
    _serve(sys.argv[1], sys.stdin.buffer, results)


def _serve_alone(work: str, environment: Mapping[str, str], asked: IO[bytes], results: IO[bytes]) -> None:
    """Be the process, with the variables of a new one."""
    os.environ.clear()
    os.environ.update(environment)
    _serve(work, asked, results)


def _serve(work: str, asked: IO[bytes], results: IO[bytes]) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    function = _function(work)
    try:
        answer = function(*pickle.load(asked))
        if isinstance(answer, Iterator):
            for part in answer:
                pickle.dump(part, results)
                results.flush()
            answer = None
        outcome: Answer | Refused = Answer(answer)
    except LorafitError as error:
        outcome = Refused(type(error), error.problems)
    pickle.dump(outcome, results)
    results.close()


def _function(work: str) -> Callable[..., Any]:
    module, _, name = work.partition(":")
    with quick_imports():
        function: Callable[..., Any] = getattr(import_module(module), name)
    return function
