"""Processes that a command starts for a part of its work end with it, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import is_alive

from lorafit.errors import VerificationError
from lorafit.merging.fresh_process import run_process

SLEEPER = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""
PARENT = """
import pathlib, sys, tempfile
from lorafit.merging.fresh_process import run_process
from lorafit.launching.signals import ends_clean
with ends_clean(), tempfile.TemporaryDirectory(dir=sys.argv[1]):
    run_process("sleeper", pathlib.Path(sys.argv[2]), what="", where=pathlib.Path())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_child_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER, encoding="utf-8")
    work, started = tmp_path / "work", tmp_path / "started"
    work.mkdir()
    path = f"{tmp_path}:{Path(__file__).parent.parent}"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(work), str(started)],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while not (started.is_file() and started.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    child = int(started.read_text())
    assert is_alive(child)
    parent.send_signal(number)
    parent.wait(timeout=30)
    until = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(child)
    assert number == signal.SIGKILL or not any(work.iterdir())


def test_what_goes_wrong_in_a_child_is_told_by_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails.py").write_text("import sys\nsys.exit(f'no {sys.argv[1:]}')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(VerificationError, match=r"it failed: no \['job'\]"):
        run_process("fails", Path("job"), what="it failed", where=tmp_path)
