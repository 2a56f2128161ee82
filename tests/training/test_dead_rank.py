"""Two processes stop together: on request with a checkpoint, and when one of them dies without a word."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorafit.launching import launch
from lorafit.training.checkpoints import newest_verified
from support.commands import command, finished
from support.runs import small_recipe

SHARED = {"training": {"max_steps": 10**6, "per_device_train_batch_size": 2}, "launch": {"num_processes": 2}}


@dataclass(frozen=True)
class Together:
    """A run in two processes."""

    directory: Path
    launcher: subprocess.Popen[str]
    workers: list[int]

    def ended(self) -> tuple[int, str, str, float]:
        """Exit code, stdout, stderr and the seconds it took from now; none of the processes is left."""
        began = time.monotonic()
        code, out, err = finished(self.launcher, others=self.workers)
        return code, out, err, time.monotonic() - began

    def outcome(self) -> str:
        outcome: str = json.loads((self.directory / "run" / "manifest.json").read_text("utf-8"))["outcome"]
        return outcome


def started(directory: Path, base: Path, **sections: Any) -> subprocess.Popen[str]:
    path = small_recipe(directory, base, **(SHARED | sections)).path
    return command(directory, "lorafit", "train", str(path), "--quiet")


def training(directory: Path, base: Path, **sections: Any) -> Together:
    """It has begun."""
    process = started(directory, base, **sections)
    metrics = directory / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text("utf-8").count('"loss"') < 3:
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(finished(process))
        time.sleep(0.05)
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    assert len(workers) == 2
    return Together(directory, process, workers)


LOADED = 25
"""Seconds in which all is over also where ten others want the same cores; torch's launcher would kill after 30."""


def assert_stopped(run: Together) -> None:
    code, out, err, seconds = run.ended()
    newest = newest_verified(run.directory / "run" / "checkpoints").newest
    assert newest is not None
    message = (
        f"stopped at {newest.step}/1000000; go on with `lorafit train {run.directory}/recipe.yaml --quiet --resume`"
    )
    assert (code, out, err) == (75, "", f"error: {run.directory}/run: {message}\n")
    assert seconds < LOADED
    assert run.outcome() == message
    assert {path.name for path in (run.directory / "run").iterdir()} == {
        *("recipe.yaml", "manifest.json", "metrics.jsonl", "events.jsonl", "checkpoints")
    }
    assert [path.name for path in newest.path.glob("rng_state_*.pth")] != []


def test_a_request_to_one_process_stops_both_at_one_step(tmp_path: Path, tiny_base: Path) -> None:
    run = training(tmp_path, tiny_base)
    os.kill(run.workers[1], signal.SIGTERM)
    assert_stopped(run)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_ends_the_run_and_is_named_once(rank: int, tmp_path: Path, tiny_base: Path) -> None:
    run = training(tmp_path, tiny_base)
    by_rank = {int(psutil.Process(pid).environ()["RANK"]): pid for pid in run.workers}
    os.kill(by_rank[rank], signal.SIGKILL)
    code, out, err, seconds = run.ended()
    killed = f"process {rank} was killed by SIGKILL (out of memory?); the others were ended"
    assert (code, out, err) == (4, "", f"error: launch: {killed}\n")
    assert seconds < LOADED
    # Killed, the first process can say nothing.
    assert run.outcome().startswith("ended after step " if rank else "running")
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("target", ["launcher", "its group", "process 0"])
def test_a_request_is_one_request_wherever_it_is_heard(target: str, name: str, tmp_path: Path, tiny_base: Path) -> None:
    run = training(tmp_path, tiny_base)
    number = signal.Signals[name]
    if target == "its group":  # Ctrl-C, or a terminal that closes
        os.killpg(run.launcher.pid, number)
    else:
        os.kill(run.launcher.pid if target == "launcher" else run.workers[0], number)
    assert_stopped(run)


@pytest.mark.slow
def test_a_second_ctrl_c_kills_all(tmp_path: Path, tiny_base: Path) -> None:
    run = training(tmp_path, tiny_base)
    for pid in run.workers:
        os.kill(pid, signal.SIGSTOP)  # they will not stop by themselves
    os.kill(run.launcher.pid, signal.SIGINT)
    time.sleep(0.5)
    assert run.launcher.poll() is None
    os.kill(run.launcher.pid, signal.SIGINT)
    code, out, err, seconds = run.ended()
    assert (code, out, err) == (75, "", "\nleft at once; the last checkpoint is what it was\n")
    assert seconds < 3


@pytest.mark.slow
def test_no_process_outlives_the_launcher(tmp_path: Path, tiny_base: Path) -> None:
    run = training(tmp_path, tiny_base)
    run.launcher.kill()
    time.sleep(1)
    assert run.ended()[0] == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, 4, 6, 8, 12])
def test_a_request_at_any_time_of_the_start_ends_all(seconds: float, tmp_path: Path, tiny_base: Path) -> None:
    process = started(tmp_path, tiny_base)
    time.sleep(seconds)
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    process.send_signal(signal.SIGTERM)
    code, out, err, took = Together(tmp_path, process, workers).ended()
    assert (code, out) == (75, "")
    assert len(err.splitlines()) == 1 and "stopped" in err
    assert took < LOADED


FAILS = """
import sys
import lorafit.cli
from lorafit.launching import launch
from lorafit.errors import DataError
from lorafit.tasks.causal_lm_trainer import CausalLm
step = CausalLm.training_step
def failing(self, *rest, **named):
    if self.state.global_step == 3 and launch.rank() == {rank}:
        raise {error}
    return step(self, *rest, **named)
CausalLm.training_step = failing
lorafit.cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("DataError('is wrong', where='row')", 3, "error: process {rank}: row: is wrong"),
        ("KeyError('a bug')", 1, "[rank{rank}]: KeyError: 'a bug'"),
    ],
)
def test_what_one_process_alone_fails_of_is_said_once(
    error: str, code: int, said: str, rank: int, tmp_path: Path, tiny_base: Path
) -> None:
    path = small_recipe(tmp_path, tiny_base, **SHARED).path
    (tmp_path / "fails.py").write_text(FAILS.format(error=error, rank=rank), encoding="utf-8")
    process = command(
        tmp_path,
        *("lorafit", "processes", "--num_processes", "2", "--config_file", str(Path("configs/ddp.yaml").resolve())),
        *("--main_process_port", "0", str(tmp_path / "fails.py"), "train", str(path), "--quiet"),
    )
    began = time.monotonic()
    ended, out, err = finished(process)
    assert (ended, out) == (code, "")
    assert time.monotonic() - began < 60
    assert err.splitlines()[-1] == said.format(rank=rank)
    assert err.count("Traceback") == (code == 1)
    # The first process says what it failed of, if it is a user's; a bug of its own has a traceback instead.
    outcome = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))["outcome"]
    if rank == 1:
        assert outcome.startswith("ended after step 3 of 1000000: another process ended")
    else:
        assert outcome == ("stopped: row: is wrong" if code == 3 else "running")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_process_that_waits_for_others_who_never_come_stops_on_request(
    name: str, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    port = launch.free_port()
    for variable, text in (others | {"MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(variable, text)
    path = small_recipe(tmp_path, tiny_base).path
    process = command(tmp_path, "lorafit", "train", str(path), "--quiet")
    end = time.monotonic() + 100
    while not any(one.laddr and one.laddr.port == port for one in psutil.Process(process.pid).net_connections()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.Signals[name])
    began = time.monotonic()
    code, out, err = finished(process)
    assert (code, out, err) == (75, "", "error: stopped on request; nothing was written\n")
    assert time.monotonic() - began < 10
    assert not (tmp_path / "run").exists()
