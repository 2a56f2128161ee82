"""Processes that a command starts for a part of its work end with it, say what went wrong, and leave nothing behind."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest

import lorafit
from lorafit import operating_system
from lorafit.errors import DataError, MachineError, Problem, VerificationError
from lorafit.launching import fork
from lorafit.launching.child import Child, ChildFailed
from lorafit.merging.child_answer import child_answer
from lorafit.planning import ask_planner as planning
from support import ROOT
from support.commands import ENVIRONMENT, is_alive
from support.merge_cases import random_adapter
from support.reports import write_run
from support.runs import small_recipe

WORK = """
import os, pathlib, sys, time
from lorafit.errors import DataError, Problem
def sleep(started):
    pathlib.Path(started).write_text(str(os.getpid()))
    time.sleep(60)
def add(one, other):
    print("libraries print what they like")
    return one + other
def refuse(message):
    raise DataError([Problem("rows.jsonl:3", message), Problem("rows.jsonl:4", message)])
def fail(): raise ValueError("no such layer")
def die(): os.abort()
def leave(): sys.exit(3)
def count(many):
    yield from range(many)
    time.sleep(60)
def variables():
    return dict(os.environ)
def has_imported():
    return imported
"""
PARENT = """
import sys, tempfile
from lorafit.launching import launch
from lorafit.launching.child import Child
from lorafit.launching.signals import ends_clean
launch.end_with_launcher()
with ends_clean(), tempfile.TemporaryDirectory(dir=sys.argv[1]):
    Child("work:sleep", sys.argv[2]).answer()
"""
PARENT_OF_COPY = PARENT.replace(
    'Child("work:sleep", sys.argv[2]).answer()',
    'child = Child("work:sleep", waits=True, copied=True)\n    child.call(sys.argv[2])\n    child.answer()',
)
COPIES = """
import json, os, sys, time
import work
from lorafit.errors import DataError
from lorafit.launching.child import Child, ChildFailed
work.imported = "once"
os.environ["ACCELERATE_USE_FSDP"] = "true"
def found(function, *arguments, seconds=None):
    child = Child(f"work:{function}", waits=True, copied=True)
    child.call(*arguments)
    try:
        return child.answer(seconds=seconds)
    except (ChildFailed, DataError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
with Child("work:add", waits=True, copied=True) as unused:
    pid = unused._process.pid
print("printed before", end="")
print(json.dumps({
    "unused": unused._process.returncode,
    "sum": found("add", "a" * 300_000, "b")[-2:],
    "shared": found("has_imported"),
    "refused": found("refuse", "is empty"),
    "failed": found("fail"),
    "died": found("die"),
    "late": found("sleep", "started", seconds=0.2),
    "counted": found("count", 0, seconds=0.5),
    "variables": "ACCELERATE_USE_FSDP" in found("variables"),
}))
"""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of functions for a child."""
    (tmp_path / "work.py").write_text(WORK, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def parent_of_sleeper(directory: Path, source: str = PARENT) -> tuple[subprocess.Popen[bytes], int]:
    """A process that waits for a child, and the number of that."""
    work, started = directory / "work", directory / "started"
    work.mkdir()
    path = f"{directory}:{ROOT}"
    parent = subprocess.Popen(
        [sys.executable, "-c", source, str(work), str(started)],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while not (started.is_file() and started.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    return parent, int(started.read_text())


def ends(pid: int) -> bool:
    until = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_alive(pid)


@pytest.mark.parametrize("source", [PARENT, PARENT_OF_COPY], ids=["new", "copy"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_child_ends_with_its_parent(tmp_path: Path, number: signal.Signals, source: str) -> None:
    parent, child = parent_of_sleeper(tmp_path, source)
    assert is_alive(child)
    parent.send_signal(number)
    parent.wait(timeout=30)
    assert ends(child)
    assert number == signal.SIGKILL or not any((tmp_path / "work").iterdir())


def test_a_child_ends_with_its_parent_where_the_kernel_does_not_see_to_it(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import ctypes; ctypes.CDLL = lambda name: None\n", encoding="utf-8")
    parent, child = parent_of_sleeper(tmp_path)
    parent.kill()
    parent.wait()
    assert ends(child)


@pytest.mark.parametrize("source", [PARENT, PARENT_OF_COPY], ids=["new", "copy"])
def test_a_request_to_stop_is_for_the_one_who_waits(tmp_path: Path, source: str) -> None:
    parent, child = parent_of_sleeper(tmp_path, source)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a terminal and a scheduler send it to all
        os.kill(child, number)
    time.sleep(0.2)
    assert is_alive(child) and is_alive(parent.pid)
    parent.terminate()
    parent.wait(timeout=30)
    assert ends(child)


def test_what_a_function_returns_comes_back_and_nothing_else(tmp_path: Path) -> None:
    assert Child("work:add", (1,), ("two", Path("x"))).answer() == (1, "two", Path("x"))


def test_a_child_that_waits_is_called_later_and_ended_where_it_is_not_needed() -> None:
    with Child("work:add", waits=True) as child, Child("work:add", waits=True) as other:
        child.call(1, 2)
        assert child.answer() == 3
        assert is_alive(other._process.pid)
    assert other._process.returncode == -signal.SIGKILL
    with child:  # has ended
        pass


def test_a_child_that_ended_before_it_was_called_says_why() -> None:
    with Child("work:nothing", waits=True) as child:
        child._process.wait(timeout=60)
        child.call(1)
        with pytest.raises(ChildFailed, match="has no attribute 'nothing'"):
            child.answer()


def test_a_copy_of_a_process_answers_and_fails_as_a_new_one_does(tmp_path: Path) -> None:
    """What it has imported is there, and what a launcher has left in the environment is not."""
    path = f"{tmp_path}:{Path(__file__).parent.parent}"
    command = [sys.executable, "-W", "error", "-c", COPIES]
    environment = {name: text for name, text in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed, found = done.stdout[:14], json.loads(done.stdout[14:])
    assert printed == "printed before"
    assert found.pop("failed").splitlines()[-1] == "ValueError: no such layer"
    assert found.pop("died").startswith("ChildFailed: ")
    assert found == {
        "unused": -signal.SIGKILL,
        "sum": "ab",
        "shared": "once",
        "refused": "DataError: rows.jsonl:3: is empty\nrows.jsonl:4: is empty",
        "late": "TimeoutError: ",
        "counted": "TimeoutError: ",
        "variables": False,
    }


def test_a_copy_is_made_only_of_a_process_that_has_computed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operating_system, "PROC", tmp_path)
    monkeypatch.setattr(operating_system, "AMD_DRIVER", tmp_path / "kfd")
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert fork.is_safe()
    with monkeypatch.context() as more:
        more.setattr(threading, "active_count", lambda: 2)
        assert not fork.is_safe()
    with monkeypatch.context() as more:
        more.setitem(sys.modules, "torch", fork)
        assert not fork.is_safe()
    for driver in (tmp_path / "kfd", tmp_path / "driver/nvidia/version"):
        driver.parent.mkdir(parents=True, exist_ok=True)
        driver.touch()
        assert not fork.is_safe()
        driver.unlink()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not fork.is_safe()


def test_an_error_of_the_users_goes_through_with_all_its_problems() -> None:
    with pytest.raises(DataError) as caught:
        Child("work:refuse", "is empty").answer()
    assert caught.value.problems == (Problem("rows.jsonl:3", "is empty"), Problem("rows.jsonl:4", "is empty"))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("fail", "ValueError: no such layer"),
        ("die", "it was killed; the machine may have run out of memory"),
        ("leave", "it gave no reason"),
        ("missing", "AttributeError: module 'work' has no attribute 'missing'"),
    ],
)
def test_what_goes_wrong_in_a_child_is_told_in_a_line(tmp_path: Path, function: str, reason: str) -> None:
    with pytest.raises(ChildFailed) as caught:
        Child(f"work:{function}").answer()
    assert caught.value.reason == reason
    with pytest.raises(VerificationError, match=f"it failed: {reason}"):
        child_answer(Child(f"work:{function}"), what="it failed", where=tmp_path)


def test_a_plan_that_was_killed_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "begin", lambda question: Child("work:die"))
    with pytest.raises(MachineError, match="it was killed; the machine may have run out of memory"):
        planning.ask(None)  # type: ignore[arg-type]
    monkeypatch.setattr(planning, "begin", lambda question: Child("work:fail"))
    with pytest.raises(ChildFailed, match=r"Traceback(.|\n)*no such layer"):
        planning.ask(None)  # type: ignore[arg-type]


def test_what_takes_too_long_is_ended_and_what_it_said_is_kept() -> None:
    ended = Child("work:count", 3).ended(seconds=3)
    assert ended.messages == (0, 1, 2) and ended.is_late and ended.code == -signal.SIGKILL
    with pytest.raises(TimeoutError):
        Child("work:count", 3).answer(seconds=0.01)


def test_a_child_trains_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    theirs |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "TORCHELASTIC_RUN_ID": "1"}
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    seen = Child("work:variables", environment={"CUDA_VISIBLE_DEVICES": ""}).answer()
    assert not theirs.keys() & seen.keys() and "LORAFIT_LAUNCHER" not in seen
    assert seen["CUDA_VISIBLE_DEVICES"] == "" and seen["PATH"] == os.environ["PATH"]


def test_a_library_is_not_taken_from_the_directory_that_the_user_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/pickle.py").write_text("raise ImportError('not a library')")
    monkeypatch.chdir(tmp_path / "here")
    assert Child("work:add", 1, 2).answer() == 3


def named_functions() -> Iterator[str]:
    """What the package hands to children."""
    for file in Path(lorafit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Child":
                assert isinstance(node.args[0], ast.Constant)
                yield str(node.args[0].value)


def test_every_function_that_a_child_is_to_call_is_there() -> None:
    named = set(named_functions())
    assert len(named) == 8
    for place in named:
        module, _, name = place.partition(":")
        function: Any = vars(import_module(module))[name]
        assert callable(function), place


def plan_of(directory: Path, base: Path) -> list[str]:
    small_recipe(directory, base)
    return ["plan", "recipe.yaml", "--gpu", "24GiB"]


def report_of(directory: Path, base: Path) -> list[str]:
    write_run(directory / "run", steps=5)
    return ["report", "run"]


def doctor_of(directory: Path, base: Path) -> list[str]:
    return ["doctor"]


def sweep_of(directory: Path, base: Path) -> list[str]:
    small_recipe(directory, base, launch={"num_processes": 2}, rank_sweep={"ranks": [2, 4]})
    return ["rank-sweep", "recipe.yaml"]


def merge_of(directory: Path, base: Path) -> list[str]:
    random_adapter(base, directory / "adapter")
    return ["merge", "adapter", "--base", str(base)]


@pytest.mark.parametrize("command", [plan_of, report_of, doctor_of, sweep_of, merge_of])
def test_a_command_that_is_killed_leaves_no_process_behind(
    tmp_path: Path, tiny_base: Path, command: Callable[[Path, Path], list[str]]
) -> None:
    arguments = [sys.executable, "-m", "lorafit", *command(tmp_path, tiny_base)]
    environment = os.environ | ENVIRONMENT | {"LORAFIT_CACHE": str(tmp_path / "cache")}
    process = psutil.Popen(
        arguments, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not (children := process.children(recursive=True)) and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)  # one that has just begun looks at its parent first
    process.kill()
    process.wait()
    assert children and all(ends(child.pid) for child in children)
