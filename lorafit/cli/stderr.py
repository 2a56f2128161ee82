"""What a command says while it works: on stderr, so that stdout holds the result alone."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lorafit.lines import SILENCE, heard
from lorafit.report.escape_control import inert


@contextmanager
def lines_on_stderr() -> Iterator[None]:
    """In this block what lorafit says is printed, until `keep_quiet`."""
    logger = logging.getLogger("lorafit")
    before = logger.propagate
    logger.propagate = False  # some libraries print what reaches the root logger, which would say each line again
    try:
        with heard(lambda line: print(inert(line), file=sys.stderr, flush=True)):
            yield
    finally:
        logger.propagate = before


def keep_quiet(is_asked_for: bool = True) -> bool:
    """From here on the command says nothing but its result and errors, where that is asked for."""
    if is_asked_for:
        logging.getLogger("lorafit").setLevel(SILENCE)
    return is_asked_for
