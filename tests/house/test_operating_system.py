"""Nothing that only Linux has, or an x86 processor, is needed: what a Mac lacks is taken away, and all goes on."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import platform
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lorafit
from lorafit import operating_system
from support import ROOT
from support.runs import small_recipe

ANOTHER_SYSTEM = """
import ctypes, multiprocessing, os, signal, sys
import psutil  # is made for each system

ONLY_LINUX = '''
    sched_getaffinity sched_setaffinity copy_file_range fdatasync preadv pwritev posix_fadvise posix_fallocate
    memfd_create eventfd pidfd_open splice setns unshare O_TMPFILE O_PATH O_DIRECT O_LARGEFILE POSIX_FADV_DONTNEED
'''.split()
for name in ONLY_LINUX:
    if hasattr(os, name):
        delattr(os, name)
if hasattr(os, "process_cpu_count"):  # of Python 3.13: where there is no affinity it is the other
    os.process_cpu_count = os.cpu_count
for name in ("sigtimedwait", "sigwaitinfo", "SIGPWR", "SIGSTKFLT", "SIGRTMIN", "SIGRTMAX"):
    delattr(signal, name)

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name in ("prctl", "renameat2", "unshare", "memfd_create", "mallopt", "malloc_trim"):
            raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = Library
multiprocessing.set_start_method("spawn")

def refuse(path):
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(("/proc", "/sys/", "/dev/shm")):
        frame, files = sys._getframe(2), []
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        if not any("psutil" in file for file in files):
            raise FileNotFoundError(2, "this system has no such file", os.fspath(path))

def look(event, arguments):
    if event in ("open", "os.listdir", "os.scandir"):
        refuse(arguments[0])

def stat(path, *rest, of=os.stat, **named):
    refuse(path)
    return of(path, *rest, **named)

sys.addaudithook(look)
os.stat = stat
"""

ALL_GOES_ON = """
import json, sys
from lorafit import operating_system
from lorafit.cli import _exit_code
recipe, adapter, merged = sys.argv[1:]
assert operating_system.processor_name().endswith(" CPU")
assert not operating_system._is_killed_with_parent()
assert _exit_code(["validate", recipe]) == 0
assert _exit_code(["preview", recipe, "--rows", "1"]) == 0
import torch
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True  # the GPU of a Mac, which is not used
torch.mps.empty_cache = lambda: None
assert _exit_code(["train", recipe]) == 0
assert _exit_code(["merge", adapter, "--no-verify", "--out", merged]) == 0
"""


@pytest.fixture
def another_system(tmp_path: Path) -> dict[str, str]:
    """The environment of processes that find what a Mac lacks missing, on a processor without vector instructions."""
    (tmp_path / "sitecustomize.py").write_text(ANOTHER_SYSTEM, encoding="utf-8")
    paths = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "LORAFIT_CACHE": str(tmp_path / "cache")}
    return dict(os.environ) | paths | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}


def test_what_only_linux_has_is_not_needed(tmp_path: Path, tiny_base: Path, another_system: dict[str, str]) -> None:
    loaded = small_recipe(tmp_path, tiny_base, data={"eval": []}, training={"dataloader_num_workers": 1})
    command = [sys.executable, "-c", ALL_GOES_ON, str(loaded.path), str(tmp_path / "run"), str(tmp_path / "merged")]
    done = subprocess.run(command, env=another_system, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["outcome"] == "finished"
    assert (tmp_path / "merged/model.safetensors").is_file()


def test_peak_memory_is_in_bytes_whatever_the_kernel_counts_in(monkeypatch: pytest.MonkeyPatch) -> None:
    here = operating_system.peak_bytes()
    assert 2**25 < here < operating_system.memory_bytes()
    monkeypatch.setattr(sys, "platform", "darwin")
    of_a_mac = runpy.run_path(str(operating_system.__file__))["peak_bytes"]
    assert of_a_mac() * 1024 == pytest.approx(here, rel=0.1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are not told")
def test_freed_memory_stays_with_the_process_and_goes_back_afterwards() -> None:
    def pages_cleared() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            parts = [torch.ones(2**22) for _ in range(8)]
            del parts
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    resident = operating_system.resident_bytes()
    with operating_system.freed_memory_kept():
        pages_cleared()
        assert pages_cleared() < 100
    assert operating_system.resident_bytes() < resident + 2**26
    assert pages_cleared() > 8 * 2**24 / resource.getpagesize()


def test_a_file_is_flushed_to_the_drive_where_the_system_can_be_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F_GETFD stands for the request, which Linux does not have."""
    asked: list[int] = []
    monkeypatch.setattr(os, "fsync", asked.append)
    with (tmp_path / "file").open("wb") as file:
        monkeypatch.setattr(operating_system, "_FULL_FLUSH", fcntl.F_GETFD)
        operating_system.flush(file.fileno())
        assert asked == []
        monkeypatch.setattr(operating_system, "_FULL_FLUSH", 10**6)  # refused, as by a network disk
        operating_system.flush(file.fileno())
        assert asked == [file.fileno()]


def test_bytes_are_read_and_copied_where_the_kernel_does_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("preadv", "copy_file_range", "fdatasync", "sched_getaffinity"):
        monkeypatch.delattr(os, name)
    (tmp_path / "file").write_bytes(b"0123456789")
    with (tmp_path / "file").open("r+b") as file:
        number, buffer = file.fileno(), bytearray(6)
        assert operating_system.read_into(number, memoryview(buffer), 7) == 3 and buffer == b"789\0\0\0"
        assert operating_system.read_into(number, memoryview(buffer), 10) == 0
        assert operating_system.kernel_copy(number, number, 4, start=0, offset=20) == 0
        operating_system.flush_data(number)
    assert operating_system.usable_cores() == os.cpu_count()


def test_a_kernel_that_does_not_name_the_processor_leaves_its_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Model: 9\n")
    monkeypatch.setattr(operating_system, "PROC", tmp_path)
    assert operating_system.processor_name() == "Model: 9"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU part\t: 0xd4f\n")  # of aarch64
    assert operating_system.processor_name() == f"{platform.machine()} CPU"
    assert operating_system.process_space() == 0 and not operating_system.has_nvidia_driver()
    operating_system.forget_peak()


def test_nothing_but_that_module_asks_for_what_only_some_systems_have() -> None:
    """Names that stand for Linux, or for one kernel; read as words of the code, not of what explains it."""
    theirs = {"prctl", "sched_getaffinity", "copy_file_range", "fdatasync", "preadv", "ru_maxrss", "F_FULLFSYNC"}
    files = sorted(Path(lorafit.__file__).parent.rglob("*.py"))
    assert len(files) > 200
    for file in files:
        if file == Path(operating_system.__file__):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        texts = {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not names & theirs, file
        assert not any(text.startswith(("/proc", "/sys/", "/dev/shm")) for text in texts), file
