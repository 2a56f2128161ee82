"""Signs of life of what takes long: when a line is due, and a count that goes up, as a bar or in lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

Counted = Callable[[int], None]
"""Takes how many more are done since it was last called."""
Counting = Callable[[str, int], Counted]
"""Given what is counted (`adapter: sequences scored`) and how many there are."""

LEAST_SECONDS = 5.0
"""Between two lines with news: a log stays readable."""
MOST_SECONDS = 30.0
"""Without a line: whoever looks knows that it goes on."""


class Pulse:
    """Tells when a line is due."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._is_first = True

    def has_news(self) -> bool:
        """Whether to say something new now: the first at once, later ones no oftener than every five seconds."""
        return self._beat(LEAST_SECONDS) if not self._is_first else self._beat(0.0)

    def is_silent(self) -> bool:
        """Whether nothing was said for half a minute."""
        return self._beat(MOST_SECONDS)

    def _beat(self, seconds: float) -> bool:
        now = time.monotonic()
        if now - self._last < seconds:
            return False
        self._last, self._is_first = now, False
        return True


def counting_in_lines(what: str, total: int) -> Counted:
    """Where there is no terminal: every half a minute, how many are done and how long the rest takes at that rate."""
    pulse, started, done = Pulse(), time.monotonic(), 0

    def counted(more: int) -> None:
        nonlocal done
        done += more
        if done < total and pulse.is_silent():
            left = (time.monotonic() - started) / max(done, 1) * (total - done)
            logger.info(f"{what}: {done:,} of {total:,}, {duration(left)} left")

    return counted


def uncounted(more: int) -> None:
    """For what nobody watches."""


def counting_unseen(what: str, total: int) -> Counted:
    """For who watches nothing."""
    return uncounted


def duration(seconds: float) -> str:
    """`38.5 s`, `3 min 49 s`, `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
