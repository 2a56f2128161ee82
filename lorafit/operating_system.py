"""What systems do differently, and what is done where one of them cannot do it. Nothing above asks by itself.

    wanted                              Linux               where that is missing
    ---------------------------------   -----------------   -----------------------------------------------
    a process ends with its parent      prctl               a thread of it looks every second
    a copy of a process computes        fork                a new process: libraries of macOS die in a copy, and
                                                            drivers of GPUs do not know it
    cores that this process may use     sched_getaffinity   all cores
    peak memory begins anew             /proc               the peak stays that of the whole process
    freed memory stays with a process   glibc's mallopt     the system takes and clears it again each step
    name of the processor               /proc               its architecture
    which processes see each other      /proc               all of one host do
    whether an NVIDIA driver is there   /proc               by nvidia-smi alone
    data only is flushed                fdatasync           all of the file is
    a file is flushed                   fsync               F_FULLFSYNC where there is that, too: macOS's fsync ends
                                                            at the drive's cache
    the kernel copies between files     copy_file_range     read and written
    a file is read into a buffer        preadv              read and copied

Whether something is there is asked of the system, not concluded from its name. Memory is asked of psutil everywhere.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PROC = Path("/proc")
AMD_DRIVER = Path("/dev/kfd")
PARENT_SECONDS = 1.0
"""Between two looks at whether the parent is still there."""

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_BY_ITSELF = 32 * 2**20
"""Bytes of glibc's DEFAULT_MMAP_THRESHOLD_MAX: where its thresholds end that grow with what is freed."""
_FULL_FLUSH: int | None = vars(fcntl).get("F_FULLFSYNC")
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in one of `ru_maxrss`: kernels do not agree on it."""


def end_with(parent: int) -> None:
    """From now on this process is killed when `parent`, which started it, is gone, however that ended.

    Linux counts the thread that started this process for its parent: start it in one that stays.
    """
    if not _is_killed_with_parent():
        threading.Thread(target=_end_after, args=(parent,), name="parent", daemon=True).start()
    if os.getppid() != parent:  # it ended before that was settled
        sys.exit(1)


def _is_killed_with_parent() -> bool:
    try:
        prctl = ctypes.CDLL(None).prctl
    except AttributeError:
        return False
    return bool(prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0)


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def can_copy_processes() -> bool:
    """Whether a copy of a process computes as that does."""
    return sys.platform != "darwin" and not has_nvidia_driver() and not AMD_DRIVER.exists()


def usable_cores() -> int:
    """Cores that this process may use, where that is limited (taskset, a job of SLURM); else those there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def memory_bytes() -> int:
    """Of this machine."""
    return int(psutil.virtual_memory().total)


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def resident_bytes() -> int:
    """Memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most memory that this process has had, since it began or since `forget_peak`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT


def forget_peak() -> None:
    """Let the next peak be of what comes now."""
    forget = PROC / "self/clear_refs"
    if forget.exists():
        forget.write_text("5", encoding="ascii")


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """What is freed meanwhile is not handed back to the system: a step takes what the last one left.

    Else glibc unmaps it, and every page of the next step is cleared by the kernel first: 6 % of a step of the speed
    benchmark. The most memory that a process takes at once stays what it is.
    """
    library = ctypes.CDLL(None)
    try:
        mallopt, trim = library.mallopt, library.malloc_trim
    except AttributeError:
        mallopt = None
    if mallopt is None:  # not glibc
        yield
        return
    # glibc before 2.35 refuses more than the most that it comes to by itself.
    if not mallopt(_M_MMAP_THRESHOLD, 2**30):
        mallopt(_M_MMAP_THRESHOLD, _MOST_BY_ITSELF)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _MOST_BY_ITSELF)
        mallopt(_M_TRIM_THRESHOLD, 2 * _MOST_BY_ITSELF)
        trim(0)


def processor_name() -> str:
    """`AMD EPYC 9B14`, or `arm64 CPU` where the system does not say."""
    try:
        lines = (PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, f"{platform.machine()} CPU")


def process_space() -> int:
    """What those processes of a host have in common that see each other by number: a container has its own."""
    space = PROC / "self/ns/pid"
    return space.stat().st_ino if space.exists() else 0


def has_nvidia_driver() -> bool:
    """Whether the kernel has loaded one, where it says so."""
    return (PROC / "driver/nvidia/version").exists()


def flush(descriptor: int) -> None:
    """What was written to a file, or the names in a directory, is on the disk, also after a loss of power."""
    if _FULL_FLUSH is not None:
        with suppress(OSError):  # a network disk has no such thing
            fcntl.fcntl(descriptor, _FULL_FLUSH)
            return
    os.fsync(descriptor)


def flush_data(descriptor: int) -> None:
    """Set the disk to work on what was written so far, beside what is computed next."""
    try:
        os.fdatasync(descriptor)
    except AttributeError:
        os.fsync(descriptor)


def kernel_copy(source: int, target: int, count: int, *, start: int, offset: int) -> int:
    """Bytes that the kernel copied, from `start` of one file to `offset` of another; 0 where it does not copy."""
    try:
        return os.copy_file_range(source, target, count, start, offset)
    except AttributeError:
        return 0
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
        return 0


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Bytes read from `offset` of a file into `view`; 0 at its end."""
    try:
        return os.preadv(descriptor, [view], offset)
    except AttributeError:
        data = os.pread(descriptor, len(view), offset)
        view[: len(data)] = data
        return len(data)
