"""The figures of a run as its rules see them, and the robust statistics they judge by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

WINDOW = 20
"""Logged steps that a level and its noise are taken from."""

LEAST_BASELINE = 8
"""Logged steps without which nothing is called a jump that came back: LoRA's first steps are unlike the others."""

SUSTAINED = 3
"""Logged steps in a row after which a jump is no longer called a spike."""

MEMORY = 200
"""Logged steps in which the lowest level of the loss is looked for."""


@dataclass(frozen=True)
class Point:
    """One logged training step. With `logging_steps` above 1 the loss is the mean since the last, the norm the last."""

    step: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    epoch: float


@dataclass(frozen=True)
class Evaluation:
    """One held-out loss."""

    step: int
    loss: float
    epoch: float


@dataclass
class History:
    """All that was logged, in order."""

    points: list[Point] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    def add(self, logs: dict[str, Any], *, step: int) -> Point | Evaluation | None:
        """Take in what the trainer logs: the figures of training steps or an evaluation, None for anything else."""
        epoch = float(logs.get("epoch") or 0.0)
        if "loss" in logs:
            norm = logs.get("grad_norm")
            point = Point(
                step, float(logs["loss"]), None if norm is None else float(norm), logs["learning_rate"], epoch
            )
            self.points.append(point)
            return point
        if "eval_loss" in logs:
            self.evaluations.append(Evaluation(step, float(logs["eval_loss"]), epoch))
            return self.evaluations[-1]
        return None

    def losses(self) -> list[float]:
        """The finite training losses, in order."""
        return [point.loss for point in self.points if math.isfinite(point.loss)]


def noise(values: Sequence[float]) -> float:
    """Robust standard deviation of the noise of a series that may have a trend: MAD of its first differences."""
    steps = [abs(after - before) for before, after in pairwise(values)]
    return 1.4826 * median(steps) / math.sqrt(2) if steps else 0.0


def spread(values: Sequence[float]) -> float:
    """Robust standard deviation: the larger of the noise and the MAD around the median."""
    middle = median(values)
    return max(noise(values), 1.4826 * median(abs(value - middle) for value in values))


@dataclass(frozen=True)
class Jump:
    """A rise out of the noise: `first` is the index of its first value."""

    first: int
    level: float
    height: float
    is_over: bool


def jump(values: Sequence[float], *, least_rise: Callable[[float], float]) -> Jump | None:
    """The jump that the newest value ends, or that it shows to last; None for all else.

    A jump exceeds the median of the `WINDOW` values before it by 8 robust standard deviations and by `least_rise` of
    that median, and the largest of them by 2. It is over when the newest value is back in the lower half of it.
    """
    newest = len(values) - 1
    for first in range(max(LEAST_BASELINE, newest - SUSTAINED + 1), newest + 1):
        before = values[max(0, first - WINDOW) : first]
        level, deviation = median(before), spread(before)
        limit = max(level + max(8 * deviation, least_rise(level)), max(before) + 2 * deviation)
        high = [value > limit for value in values[first:]]
        height = max(values[first:])
        if all(high) and len(high) == SUSTAINED:
            return Jump(first, level, height, is_over=False)
        if len(high) > 1 and all(high[:-1]) and values[newest] < (level + limit) / 2:
            return Jump(first, level, height, is_over=True)
    return None


def best_level(values: Sequence[float]) -> tuple[float, float]:
    """The lowest median of five values in a row (or the first value) of the last `MEMORY`, and the noise until then.

    The noise of what comes after would be that of the very rise one looks for.
    """
    recent = values[-MEMORY:]
    medians = [(recent[0], 1), *((median(recent[end - 5 : end]), end) for end in range(5, len(recent) + 1))]
    level, end = min(medians)
    return level, noise(recent[max(0, end - WINDOW) : max(end, LEAST_BASELINE)])
