"""Held-out rows that are nearly a row to train on: by the runs of words that both have.

The held-out rows are looked at first; of each row to train on nothing is kept. What is compared is a sample: about a
quarter of a row's runs of `RUN` words, chosen by their first word, so that a row with a few words changed, or with
something put before or behind, still has most of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from zlib import crc32

from lorafit.data.rows import Place, Row, texts

RUN = 5
"""Words: two texts that were written apart share few runs of as many."""
FEWEST = 8
"""Runs of a row: fewer say nothing. They are those of about 35 words."""
SHARE = 0.8
"""Of a row's runs, in one row to train on."""
MOST_ROWS = 20_000
"""Held-out rows that are looked at, the first ones: each takes about a kilobyte."""


class NearRows:
    """Takes held-out rows, then rows to train on, and tells the pairs."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._owner: dict[str, int] = {}
        """Of a run, the held-out row that has it. What several have is boilerplate and no sign: such a run has none."""
        self._runs: Counter[int] = Counter()
        self._anchors: frozenset[str] = frozenset()
        self._best: dict[int, tuple[int, Place]] = {}

    def hold(self, rows: Iterator[Row]) -> None:
        """The held-out rows, all at once."""
        shared: set[str] = set()
        for number, row in enumerate(rows):
            for run in {run for words in _words(row) for run in _runs(words)}:
                if self._owner.setdefault(run, number) != number:
                    shared.add(run)
            self._places.append(row.place)
            if number + 1 == MOST_ROWS:
                break
        for run in shared:
            del self._owner[run]
        if len(self._places) > 1:  # what is boilerplate in a single row cannot be told
            self._runs = Counter(self._owner.values())
            enough = (run for run, number in self._owner.items() if self._runs[number] >= FEWEST)
            self._anchors = frozenset(run.partition(" ")[0] for run in enough)

    def see(self, row: Row) -> None:
        """A row to train on."""
        anchors, owner = self._anchors, self._owner
        if not anchors:
            return
        found: list[int] = []
        for words in _words(row):
            starts = [start for start, word in enumerate(words) if word in anchors]
            runs = [" ".join(words[start : start + RUN]) for start in starts]
            found += [owner[run] for run in runs if run in owner]
        for number, count in Counter(found).items() if found else ():
            if number not in self._best or count > self._best[number][0]:
                self._best[number] = (count, row.place)

    def pairs(self) -> Iterator[tuple[Place, Place]]:
        """Of each held-out row that is nearly one to train on both places, in the order of the held-out rows."""
        for number, (count, place) in sorted(self._best.items()):
            if self._runs[number] >= FEWEST and count >= SHARE * self._runs[number]:
                yield self._places[number], place


def _words(row: Row) -> Iterator[list[str]]:
    """Of each text that the user wrote."""
    return (str(text).casefold().split() for text in texts(row))


def _runs(words: list[str]) -> Iterator[str]:
    for start in range(len(words) - RUN + 1):
        if _is_chosen(words[start]):
            yield " ".join(words[start : start + RUN])


@lru_cache(maxsize=2**16)
def _is_chosen(word: str) -> bool:
    """A quarter of all words, in every process the same."""
    return crc32(word.encode(errors="surrogatepass")) % 4 == 0
