"""The replay of CUDA's caching allocator, by its rules."""

from __future__ import annotations

import random

from lorafit.planning.allocator import LARGE_SEGMENT, MIB, SMALL_SEGMENT, CachingAllocator, most_reserved


def test_small_blocks_share_segments_of_two_mebibytes() -> None:
    assert most_reserved([(1, 512)], expandable=False) == SMALL_SEGMENT
    assert most_reserved([(number, 1 * MIB) for number in range(4)], expandable=False) == 2 * SMALL_SEGMENT


def test_larger_blocks_share_segments_of_twenty_and_large_ones_have_their_own() -> None:
    assert most_reserved([(1, 2 * MIB), (2, 9 * MIB), (3, 9 * MIB)], expandable=False) == LARGE_SEGMENT
    assert most_reserved([(1, 11 * MIB + 512)], expandable=False) == 12 * MIB


def test_what_is_given_back_is_used_again() -> None:
    assert most_reserved([(1, 30 * MIB), (1, -30 * MIB), (2, 30 * MIB)], expandable=False) == 30 * MIB
    # A rest of up to 1 MiB stays with its block, a larger one is split off.
    assert most_reserved([(1, 32 * MIB), (1, -32 * MIB), (2, 20 * MIB), (3, 12 * MIB)], expandable=False) == 32 * MIB


def test_neighbours_that_are_free_melt_together() -> None:
    trace = [(1, 20 * MIB), (1, -20 * MIB), (2, 10 * MIB), (3, 10 * MIB), (2, -10 * MIB), (3, -10 * MIB), (4, 20 * MIB)]
    assert most_reserved(trace, expandable=False) == 20 * MIB


def test_blocks_never_overlap_and_nothing_is_lost() -> None:
    for expandable in (False, True):
        chance = random.Random(1)
        allocator, live = CachingAllocator(expandable=expandable), 0
        taken: dict[int, int] = {}
        for number in range(2000):
            if taken and chance.random() < 0.5:
                gone = chance.choice(list(taken))
                live -= taken.pop(gone)
                allocator.give_back(gone)
            else:
                size = 512 * chance.choice((1, 5, 300, 3000, 40_000, chance.randint(1, 60_000)))
                taken[number] = size
                live += size
                allocator.take(number, size)
            assert live <= allocator.reserved <= allocator.peak
        blocks = allocator._blocks.values()
        assert sum(block.size for block in blocks) == allocator.reserved
        assert sum(block.size for block in blocks if not block.is_free) >= live
