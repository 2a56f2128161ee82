"""Work in a process of its own, whose memory and imports end with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from lorafit import pulse
from lorafit.errors import VerificationError
from lorafit.pulse import Say, duration, unsaid

_START = """
import ctypes, os, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
parent, module = sys.argv[1:3]
if os.getppid() != int(parent):
    sys.exit(1)
sys.argv[1:] = sys.argv[3:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""The process ends when the one that waits for it does, however that ended (Linux), from before its first import on."""


def run_process(module: str, job_file: Path, *, what: str, where: Path, say: Say = unsaid) -> None:
    """`python -m module job_file`, in a fresh process that ends with this one.

    Raises VerificationError (`what`) with its last line. `say` hears every half a minute that it goes on.
    """
    command = [sys.executable, "-c", _START, str(os.getpid()), module, str(job_file)]
    started = time.monotonic()
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    child = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
    try:
        while True:
            try:
                _, said = child.communicate(timeout=pulse.MOST_SECONDS)
                break
            except subprocess.TimeoutExpired:
                say(f"{module.rpartition('.')[2].replace('_', ' ')}: {duration(time.monotonic() - started)} so far")
    finally:
        child.kill()  # an interrupt ends it, too
        child.wait()
    if child.returncode:
        lines = [line for line in said.splitlines() if line.strip()]
        killed = (
            "it was killed; the machine may have run out of memory" if child.returncode < 0 else "it gave no reason"
        )
        raise VerificationError(f"{what}: {lines[-1] if lines and child.returncode > 0 else killed}", where=str(where))
