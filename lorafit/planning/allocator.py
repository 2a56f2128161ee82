"""What CUDA's caching allocator reserves for a sequence of allocations: a replay of its rules without a GPU.

After c10/cuda/CUDACachingAllocator.cpp (torch 2.13): blocks of up to 1 MiB come from a pool of 2 MiB segments, others
from segments of 20 MiB or, from 10 MiB on, of their own size; the smallest free block that is large enough is split
when enough is left; neighbours that are free melt together. With expandable segments each pool is one segment that
grows by pages.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20
SMALL = 1 * MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB
LEAST_REST = 512


@dataclass(eq=False)
class _Block:
    size: int
    segment: int
    offset: int
    is_small: bool
    is_free: bool = False
    before: _Block | None = None
    after: _Block | None = None


class CachingAllocator:
    """The pools; `reserved` is what they hold, `peak` the most they held."""

    def __init__(self, *, expandable: bool) -> None:
        self.reserved = self.peak = 0
        self._expandable = expandable
        self._free: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._taken: dict[int, _Block] = {}
        self._last: dict[bool, _Block] = {}
        """The end of each expandable segment."""
        self._segments = 0

    def take(self, number: int, size: int) -> None:
        """Allocate `size` bytes, a multiple of 512, as block `number`."""
        is_small = size <= SMALL
        free = self._free[is_small]
        place = bisect_left(free, (size,))
        if place < len(free):
            block = self._blocks[free.pop(place)[1:]]
        else:
            block = self._grown(size, is_small) if self._expandable else self._new_segment(size, is_small)
            self.peak = max(self.peak, self.reserved)
        block.is_free = False
        rest = block.size - size
        if rest >= LEAST_REST if is_small or self._expandable else rest > SMALL:
            self._split(block, size)
        self._taken[number] = block

    def give_back(self, number: int) -> None:
        """Free block `number`; it stays reserved."""
        block = self._taken.pop(number)
        block.is_free = True
        if block.after is not None and block.after.is_free:
            self._melt(block, block.after)
        if block.before is not None and block.before.is_free:
            block = self._melt(block.before, block)
        self._offer(block)

    def _new_segment(self, size: int, is_small: bool) -> _Block:
        if is_small:
            segment = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
        self.reserved += segment
        self._segments += 1
        return self._put(_Block(segment, self._segments, 0, is_small))

    def _grown(self, size: int, is_small: bool) -> _Block:
        page = SMALL_SEGMENT if is_small else LARGE_SEGMENT
        last = self._last.get(is_small)
        if last is None or not last.is_free:
            offset = last.offset + last.size if last else 0
            block = self._put(_Block(0, -1 if is_small else -2, offset, is_small, before=last))
            if last is not None:
                last.after = block
            self._last[is_small] = last = block
        else:
            self._withdraw(last)
        more = -(-(size - last.size) // page) * page
        self.reserved += more
        last.size += more
        return last

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(
            block.size - size,
            block.segment,
            block.offset + size,
            block.is_small,
            is_free=True,
            before=block,
            after=block.after,
        )
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = size, rest
        if self._last.get(block.is_small) is block:
            self._last[block.is_small] = rest
        self._put(rest)
        self._offer(rest)

    def _melt(self, first: _Block, second: _Block) -> _Block:
        """`second`, which follows `first`, becomes part of it. Whichever is on offer is withdrawn."""
        for block in (first, second):
            self._withdraw(block)
        del self._blocks[second.segment, second.offset]
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        if self._last.get(first.is_small) is second:
            self._last[first.is_small] = first
        return first

    def _put(self, block: _Block) -> _Block:
        self._blocks[block.segment, block.offset] = block
        return block

    def _offer(self, block: _Block) -> None:
        insort(self._free[block.is_small], (block.size, block.segment, block.offset))

    def _withdraw(self, block: _Block) -> None:
        free = self._free[block.is_small]
        entry = (block.size, block.segment, block.offset)
        place = bisect_left(free, entry)
        if place < len(free) and free[place] == entry:
            free.pop(place)


def most_reserved(trace: Iterable[tuple[int, int]], *, expandable: bool) -> int:
    """Peak of the reserved bytes for a trace of (block, bytes) allocations and (block, -bytes) releases."""
    allocator = CachingAllocator(expandable=expandable)
    for number, size in trace:
        if size > 0:
            allocator.take(number, size)
        else:
            allocator.give_back(number)
    return allocator.peak
