"""Which rows are the same: 24 bytes for each row that is looked at, whatever it holds."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from hashlib import blake2b

KEY = 16
"""Bytes of a key: among 10^9 rows two that differ share one with a chance of 10^-21."""
BUCKETS = 256


class Groups:
    """Numbers rows in the order they are added, and tells the first with the same content.

    Keys lie in buckets by their first byte, so that only one bucket at a time needs Python objects.
    """

    def __init__(self) -> None:
        self._count = 0
        self._keys = [bytearray() for _ in range(BUCKETS)]
        self._rows = [array("I") for _ in range(BUCKETS)]

    def add(self, content: Hashable) -> None:
        """One more row."""
        key = blake2b(repr(content).encode(errors="surrogatepass"), digest_size=KEY).digest()
        self._keys[key[0]] += key
        self._rows[key[0]].append(self._count)
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def firsts(self) -> array[int]:
        """For each row the number of the first row that is the same: its own when there is none before it."""
        firsts = array("I", bytes(4 * self._count))
        for keys, rows in zip(self._keys, self._rows, strict=True):
            known: dict[bytes, int] = {}
            for index, row in enumerate(rows):
                firsts[row] = known.setdefault(bytes(keys[KEY * index : KEY * (index + 1)]), row)
        return firsts
