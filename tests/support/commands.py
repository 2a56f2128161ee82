"""Real `lorafit` processes: as a user starts them, or in no time, forked from one that has imported everything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from support import ROOT

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "WANDB_MODE": ""}


def command(directory: Path, *words: str) -> subprocess.Popen[str]:
    """`python -m WORDS` as a user starts it, in a process group of its own, with an empty cache."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        env=os.environ | ENVIRONMENT | {"LORAFIT_CACHE": str(directory / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has asked for its exit code does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def finished(process: subprocess.Popen[str], *, others: Sequence[int] = ()) -> tuple[int, str, str]:
    """Exit code, stdout, stderr; nothing of its process group, and none of the `others`, is left running."""
    try:
        out, err = process.communicate(timeout=150)
        end = time.monotonic() + 5  # what is killed with its parent is gone a moment later
        while (alive := [pid for pid in others if is_alive(pid)]) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive, (alive, out, err)
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            pass
        else:
            raise AssertionError("something of its process group is left")
    finally:
        for pid in others:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, out, err


@dataclass(frozen=True)
class Ended:
    """What one command came to."""

    code: int
    """Of the process; negative when a signal killed it."""
    out: str
    err: str
    seconds: float
    """From the last signal that was sent, or the start, to the end."""


class Command:
    """One `lorafit ARGUMENTS` under way."""

    def __init__(self, starter: Starter, directory: Path, request: dict[str, Any]) -> None:
        self._starter, self._directory = starter, directory
        self.pid = int(starter.ask(request)["pid"])
        self._since = time.monotonic()

    def until(self, happened: Callable[[], bool], *, seconds: float = 60) -> None:
        """Wait for something that the command does."""
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, self.texts()
            assert Path(f"/proc/{self.pid}").exists(), self.texts()
            time.sleep(0.005)

    def paused(self) -> None:
        """Wait until it has come to where it was asked to pause."""
        self.until((self._directory / "paused").exists)

    def send(self, number: int) -> None:
        """A signal, from which the time to the end counts."""
        self._since = time.monotonic()
        os.kill(self.pid, number)

    def send_to_all(self, number: int) -> None:
        """A signal to the process and those it has started, as a scheduler sends it."""
        self._since = time.monotonic()
        process = psutil.Process(self.pid)
        for one in [*process.children(recursive=True), process]:
            one.send_signal(number)

    def texts(self) -> tuple[str, str]:
        """stdout and stderr so far."""
        out, err = ((self._directory / name).read_text("utf-8") for name in ("stdout", "stderr"))
        return out, err

    def ended(self) -> Ended:
        """Wait for the end; nothing it started is left."""
        code = int(self._starter.ask({"wait": self.pid})["code"])
        seconds = time.monotonic() - self._since
        return Ended(code, *self.texts(), seconds)


class Starter:
    """A process with everything imported, that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._read() == {"ready": True}

    def start(
        self, directory: Path, *arguments: str, pause: str = "", seconds: float = 60, nohup: bool = False
    ) -> Command:
        """`lorafit ARGUMENTS`, its streams in files of `directory`. It pauses for `seconds` before it calls
        `pause` (`module:function`), and then goes on. With `nohup` it ignores SIGHUP from the start."""
        directory.mkdir(exist_ok=True)
        (directory / "paused").unlink(missing_ok=True)
        request = {"arguments": arguments, "directory": str(directory), "pause": pause, "seconds": seconds}
        return Command(self, directory, request | {"nohup": nohup})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End it, and whatever it started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def _serve() -> None:
    """Fork for each line that asks for it; wait for each that asks for that."""
    import lorafit.cli
    import lorafit.training.train  # noqa: F401 - what takes its time

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                _run(request)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _run(request: dict[str, Any]) -> None:
    """Be the command."""
    from importlib import import_module

    import lorafit.cli

    place = Path(request["directory"])
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        flags = os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open("/dev/null" if name == "stdin" else place / name, flags), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if request["nohup"] else signal.SIG_DFL)
    os.environ["LORAFIT_CACHE"] = str(place / "cache")
    sys.argv = ["lorafit", *request["arguments"]]
    if request["pause"]:
        module_name, _, name = request["pause"].partition(":")
        module = import_module(module_name)
        paused = getattr(module, name)

        def pausing(*rest: Any, **named: Any) -> Any:
            (place / "paused").touch()
            end = time.monotonic() + request["seconds"]
            while time.monotonic() < end:
                time.sleep(0.01)
            return paused(*rest, **named)

        setattr(module, name, pausing)
    try:
        lorafit.cli.main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    finally:
        os._exit(1)


if __name__ == "__main__":
    _serve()


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
