"""One run at a time in a run directory; a lock whose holder is gone is no obstacle."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from lorafit.errors import RunDirError
from lorafit.storage.lease import SILENCE_SECONDS
from lorafit.storage.run_dir import RunDir
from lorafit.storage.run_lock import RunLock
from support.tiny import sums, write_jsonl

HOLD = """
import os, sys, time
from pathlib import Path
from lorafit.storage.run_dir import RunDir
from lorafit.storage.run_lock import RunLock
if "--again" not in sys.argv:
    before = RunLock(RunDir(Path(sys.argv[1]))).take()
    print(f"took over from {before}" if before else "held", flush=True)
if "exec" in sys.argv:
    sys.argv.remove("exec")
    os.execv(sys.executable, [sys.executable, "-c", Path(sys.argv[2]).read_text(), *sys.argv[1:], "--again"])
if "--again" in sys.argv:
    lock = RunLock(RunDir(Path(sys.argv[1])))
    assert lock.take() is None
    print("again", flush=True)
if "fork" in sys.argv and os.fork() == 0:
    time.sleep(60)
sys.stdin.read()
"""


@contextmanager
def holding(run: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `run` until its stdin ends."""
    script = run.parent / "hold.py"
    script.write_text(HOLD, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run), str(script), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write_lock(run: RunDir, **changes: object) -> None:
    me = psutil.Process()
    text = {"pid": me.pid, "host": socket.gethostname(), "since": "then", "process_started": me.create_time()}
    run.path.mkdir(exist_ok=True)
    run.lock.write_text(json.dumps(text | changes), encoding="utf-8")


def test_a_lock_makes_its_directory_and_leaves_nothing(tmp_path: Path) -> None:
    lock = RunLock(RunDir(tmp_path / "runs" / "one"))
    assert lock.take() is None
    assert [path.name for path in (tmp_path / "runs" / "one").iterdir()] == ["run.lock"]
    RunDir(tmp_path / "runs" / "one").refuse_used()
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_what_a_run_wrote_stays_when_its_lock_goes(tmp_path: Path) -> None:
    lock = RunLock(RunDir(tmp_path / "run"))
    lock.take()
    (tmp_path / "run" / "recipe.yaml").write_text("mine")
    lock.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_a_held_directory_is_refused_naming_its_holder(tmp_path: Path) -> None:
    with holding(tmp_path / "run") as holder:
        assert first_line(holder) == "held"
        with pytest.raises(RunDirError, match=f"is in use by process {holder.pid} on .* since 20..-") as caught:
            RunLock(RunDir(tmp_path / "run")).take()
    assert caught.value.exit_code == 4
    assert socket.gethostname() in str(caught.value)


def test_the_second_train_in_a_directory_refuses_within_a_second(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", sums(2))
    recipe = {"model": {"model_name_or_path": "Qwen/Qwen3-0.6B"}, "data": {"train": [{"path": "train.jsonl"}]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(tmp_path / "run")}))
    script = "import sys, lorafit.cli\ntry: lorafit.cli.main()\nfinally: print('torch' in sys.modules)"
    with holding(tmp_path / "run") as holder:
        first_line(holder)
        started = time.monotonic()
        second = subprocess.run(
            [sys.executable, "-c", script, "train", str(tmp_path / "recipe.yaml")], capture_output=True, text=True
        )
        seconds = time.monotonic() - started
    assert (second.returncode, second.stdout) == (4, "False\n"), second.stderr
    assert f"in use by process {holder.pid} on {socket.gethostname()} since " in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert seconds < 6, "under a second on an idle machine"


def test_the_lock_of_a_killed_process_is_taken_over_at_once_even_while_its_child_lives(tmp_path: Path) -> None:
    with holding(tmp_path / "run", "fork") as holder:
        first_line(holder)
        while not psutil.Process(holder.pid).children():
            time.sleep(0.01)
        holder.kill()
        holder.wait()
        lock = RunLock(RunDir(tmp_path / "run"))
        before = lock.take()
        assert before is not None and before.pid == holder.pid
        lock.release()


def test_the_lock_outlasts_what_its_process_becomes(tmp_path: Path) -> None:
    with holding(tmp_path / "run", "exec") as holder:
        assert (first_line(holder), first_line(holder)) == ("held", "again")
        with pytest.raises(RunDirError, match=f"process {holder.pid} "):
            RunLock(RunDir(tmp_path / "run")).take()


def test_a_child_knows_that_its_parent_holds_the_directory(tmp_path: Path) -> None:
    lock = RunLock(RunDir(tmp_path / "run"))
    lock.take()
    script = f"import sys; from pathlib import Path; {HOLD.splitlines()[3]}; {HOLD.splitlines()[4]}\n"
    script += "print(RunLock(RunDir(Path(sys.argv[1]))).is_held_by_launcher())"
    command = [sys.executable, "-c", script]
    words = [subprocess.run([*command, str(tmp_path / run)], capture_output=True, text=True).stdout for run in "ab"]
    words += [subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True).stdout]
    lock.release()
    assert words == ["False\n", "False\n", "True\n"]


@pytest.mark.parametrize(
    "changes",
    [{"pid": 2**22 + 1}, {"process_started": 5.0}, {"pid": "?", "host": None, "more": 1}],
    ids=["dead", "pid used again", "not a lock"],
)
def test_a_stale_lock_is_taken_over(changes: dict[str, object], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    write_lock(run, **changes)
    lock = RunLock(run)
    before = lock.take()
    assert (before is None) == ("more" in changes)
    assert json.loads(run.lock.read_text())["pid"] == os.getpid()
    lock.release()


def test_a_lock_of_another_machine_holds_until_it_is_silent(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    write_lock(run, host="elsewhere", pid=2**22 + 1)
    with pytest.raises(RunDirError, match=r"on elsewhere since then; .*, or delete .*run\.lock"):
        RunLock(run).take()
    long_ago = time.time() - SILENCE_SECONDS - 5
    os.utime(run.lock, (long_ago, long_ago))
    lock = RunLock(run)
    assert str(lock.take()) == f"process {2**22 + 1} on elsewhere since then"
    lock.release()


def test_a_holder_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.storage.lease.BEAT_SECONDS", 0.05)
    run = RunDir(tmp_path / "run")
    lock = RunLock(run)
    lock.take()
    os.utime(run.lock, (0, 0))
    time.sleep(0.3)
    assert run.lock.stat().st_mtime > 0
    lock.release()


def test_without_locks_in_the_file_system_the_text_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    run = RunDir(tmp_path / "run")
    parent = psutil.Process(os.getppid())
    write_lock(run, pid=parent.pid, process_started=parent.create_time())
    with pytest.raises(RunDirError, match=f"in use by process {parent.pid} "):
        RunLock(run).take()
    write_lock(run, pid=2**22 + 1)
    lock = RunLock(run)
    assert lock.take() is not None
    lock.release()
