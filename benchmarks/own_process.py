"""A command in a process of its own, for as long as it may take: what it holds on a GPU ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


class NoAnswer(Exception):
    """It failed or took too long; one line says which."""


def output_of(command: Sequence[str | Path], *, environment: Mapping[str, str], seconds: float) -> str:
    """What it prints. Raises NoAnswer; after `seconds` it is killed, with what it has started."""
    # Not into pipes: a process that it has left behind would hold them open, and this one would wait for it.
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=os.environ | dict(environment), stdout=printed, stderr=errors, start_new_session=True
        )
        try:
            code = process.wait(timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"killed: it took more than {seconds:.0f} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            errors.seek(0)
            raise NoAnswer((errors.read().strip().splitlines() or [f"it ended with {code}"])[-1][:300])
        printed.seek(0)
        return printed.read()


def end_by_exception() -> None:
    """A request to end leaves through every `finally`, so that no process of the benchmark stays."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
