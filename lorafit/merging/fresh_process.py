"""Work in a process of its own, whose memory and imports end with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lorafit.errors import VerificationError


def run_process(module: str, job_file: Path, *, what: str, where: Path) -> None:
    """`python -m module job_file`, in a fresh process. Raises VerificationError (`what`) with its last line."""
    command = [sys.executable, "-m", module, str(job_file)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        killed = "it was killed; the machine may have run out of memory" if done.returncode < 0 else "it gave no reason"
        raise VerificationError(f"{what}: {lines[-1] if lines and done.returncode > 0 else killed}", where=str(where))
