"""A disk without room, or one that is read-only, said in one line wherever nobody nearer says what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from lorafit.errors import DiskError

NO_ROOM = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


@contextmanager
def no_room_is_said() -> Iterator[None]:
    """In this block an error of the system that comes of such a disk becomes a DiskError; others stay."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        mend = "free some space or choose another output_dir"
        raise DiskError(f"{error.strerror}; {mend}", where=str(error.filename or "")) from error
