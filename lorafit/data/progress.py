"""How far a pass over the rows is, for who waits at a terminal: rows per second and the time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
SECONDS_BEFORE_SHOWN = 2
ROWS_BETWEEN_LOOKS = 1000


def watched(
    items: Iterable[Item], doing: str, *, is_shown: bool, total: int | Callable[[int], int | None]
) -> Iterator[Item]:
    """The items, with a bar on stderr where that is a terminal and the pass takes more than a moment.

    `total` is how many there will be, or says it from how many there were.
    """
    if not is_shown or not sys.stderr.isatty():
        yield from items
        return
    from tqdm import tqdm  # 0.05 s that only a terminal is worth

    with tqdm(desc=doing, unit=" rows", unit_scale=True, delay=SECONDS_BEFORE_SHOWN, leave=False) as bar:
        for number, item in enumerate(items, 1):
            yield item
            if number % ROWS_BETWEEN_LOOKS == 0:
                bar.total = total if isinstance(total, int) else total(number)
                bar.update(ROWS_BETWEEN_LOOKS)
