"""Fewer points for the same picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def thinned(points: Sequence[tuple[float, float]], *, columns: int) -> list[tuple[float, float]]:
    """Of each of `columns` equal stretches of x the first, lowest, highest and last point, in their order.

    A spike of one step stays; the drawn outline is that of all points. `points` are in order of x.
    """
    if len(points) <= 4 * columns:
        return list(points)
    start, width = points[0][0], (points[-1][0] - points[0][0]) / columns or 1.0
    kept: list[tuple[float, float]] = []
    for _, group in groupby(points, key=lambda point: min(columns - 1, int((point[0] - start) / width))):
        some = list(group)
        values = [value for _, value in some]
        chosen = {0, values.index(min(values)), values.index(max(values)), len(some) - 1}
        kept += [some[index] for index in sorted(chosen)]
    return kept
