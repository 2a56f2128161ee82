"""The locks of the operating system, by which others know that who holds one is alive; gone when it is.

Two kinds. One of an opened file is shared by whoever inherits that: forked children hold it, too. One of a process is
no child's, and lasts through `exec`, but closing any descriptor of the file drops it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOT_LOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What file systems without locks answer (Lustre mounted so, some FUSE); the last two are one number on Linux."""


def lock_opened(descriptor: int) -> None:
    """Lock the file until `descriptor` and what it was inherited as are closed. Not where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NOT_LOCKABLE:
            raise


@contextmanager
def locked_by_nobody(file: Path) -> Iterator[None]:
    """With the lock of an opened file. Raises OSError where another holds it, or no lock can say whether one does."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def lock_for_process(descriptor: int) -> bool:
    """Lock the file for this process; False where another has. Where there are no locks nobody has."""
    os.set_inheritable(descriptor, True)  # `exec` would close it, and with it drop the lock
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in NOT_LOCKABLE:
            raise
    return True
