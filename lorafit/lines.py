"""The lines that lorafit says while it works.

Each module logs its own, by `logging.getLogger(__name__)`: what is amiss at WARNING, all else at INFO. Who hears them
is settled at the edges: a command prints them (`cli/stderr.py`), a program that imports lorafit configures logging.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SILENCE = logging.CRITICAL + 1
"""The level of a logger that says nothing."""


class _Hearer(logging.Handler):
    def __init__(self, take: Callable[[str], object]) -> None:
        super().__init__()
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        """What goes wrong is raised where the line was said."""
        line = record.getMessage()
        self._take(f"warning: {line}" if record.levelno >= logging.WARNING else line)


@contextmanager
def heard(take: Callable[[str], object]) -> Iterator[None]:
    """In this block `take` is called with each line, as a command prints it."""
    logger, hearer = logging.getLogger("lorafit"), _Hearer(take)
    before = logger.level
    logger.addHandler(hearer)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(hearer)
        logger.setLevel(before)


@contextmanager
def unsaid(room: str) -> Iterator[None]:
    """What the modules of `room` (`lorafit.training`) would say in this block goes unsaid."""
    logger = logging.getLogger(room)
    before = logger.level
    logger.setLevel(SILENCE)
    try:
        yield
    finally:
        logger.setLevel(before)
