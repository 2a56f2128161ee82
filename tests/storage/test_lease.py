"""One answer to whether another process is still there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lorafit.storage.lease import SILENCE_SECONDS, Held, is_alive, is_running, lease, this_host

HOLD = """
import sys
from pathlib import Path
from lorafit.storage.lease import lease
with lease(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_process_that_ended_and_was_not_waited_for_is_not_running() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not is_running(process.pid)
    process.wait()


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    began = psutil.Process().create_time()
    assert is_running(os.getpid()) and is_running(os.getpid(), started=began)
    assert not is_running(os.getpid(), started=began - 60)
    assert not is_running(2**22 + 1)


@pytest.mark.parametrize("host", [socket.gethostname(), this_host()])
@pytest.mark.parametrize("silent", [0.0, SILENCE_SECONDS + 1])
def test_of_this_machine_the_process_tells_and_silence_only_where_it_did_not_say_when_it_began(
    host: str, silent: float
) -> None:
    began = psutil.Process().create_time()
    assert is_alive(os.getpid(), host=host, started=began, silent_seconds=silent)
    assert is_alive(os.getpid(), host=host, started=None, silent_seconds=silent) == (silent < SILENCE_SECONDS)
    assert not is_alive(2**22 + 1, host=host, started=None, silent_seconds=silent)


@pytest.mark.parametrize("started", [None, 5.0])
def test_of_another_machine_its_silence_tells(started: float | None) -> None:
    assert is_alive(2**22 + 1, host="elsewhere", started=started, silent_seconds=SILENCE_SECONDS - 1)
    assert not is_alive(os.getpid(), host="elsewhere", started=started, silent_seconds=SILENCE_SECONDS + 1)


def test_a_lease_is_one_process_s_and_gone_with_it(tmp_path: Path) -> None:
    file = tmp_path / "lease"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(Held) as caught, lease(file):
        pass
    assert caught.value.holder is not None and caught.value.holder.pid == other.pid
    other.kill()
    other.communicate()
    with lease(file) as before:
        assert before is not None and before.pid == other.pid
        assert file.is_file()
    assert list(tmp_path.iterdir()) == []
