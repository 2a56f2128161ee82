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

RANGE = 30
"""Logged steps of which a divergence must leave all but one below it."""

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
    losses: list[float] = field(default_factory=list)
    """The finite training losses."""

    def add(self, logs: dict[str, Any], *, step: int) -> Point | Evaluation | None:
        """Take in what the trainer logs: the figures of training steps or an evaluation, None for anything else."""
        epoch = float(logs.get("epoch") or 0.0)
        if "loss" in logs:
            norm = logs.get("grad_norm")
            point = Point(
                step, float(logs["loss"]), None if norm is None else float(norm), logs["learning_rate"], epoch
            )
            self.points.append(point)
            if math.isfinite(point.loss):
                self.losses.append(point.loss)
            return point
        if "eval_loss" in logs:
            self.evaluations.append(Evaluation(step, float(logs["eval_loss"]), epoch))
            return self.evaluations[-1]
        return None


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

    A jump exceeds the median of the `WINDOW` values before it by 8 robust standard deviations, by `least_rise` of that
    median, and by twice as much as the largest of them does. It is over when the newest value is in its lower half.
    """
    newest = len(values) - 1
    for first in range(max(LEAST_BASELINE, newest - SUSTAINED + 1), newest + 1):
        before = values[max(0, first - WINDOW) : first]
        level, deviation = median(before), spread(before)
        limit = level + max(8 * deviation, least_rise(level), 2 * (max(before) - level))
        high = [value > limit for value in values[first:]]
        height = max(values[first:])
        if all(high) and len(high) == SUSTAINED:
            return Jump(first, level, height, is_over=False)
        if len(high) > 1 and all(high[:-1]) and values[newest] < (level + limit) / 2:
            return Jump(first, level, height, is_over=True)
    return None


def highest_healthy(values: Sequence[float]) -> float:
    """What a loss must stay above to be called diverging, by the values before.

    The lowest median of five in a row and 0.5, a fifth, and 8 robust deviations, and all but one of the `RANGE` before;
    where they are few, half as much again as the largest, and 1.
    """
    if len(values) < LEAST_BASELINE:
        return max(values) + max(1.0, max(values) / 2)
    recent = sorted(values[-RANGE:])
    best = lowest_level(values)
    return max(best + max(0.5, 0.2 * best, 8 * spread(values[-RANGE:])), recent[-2])


def lowest_level(values: Sequence[float]) -> float:
    """The lowest median of five values in a row of the last `MEMORY`, or of those there are."""
    recent = values[-MEMORY:]
    return min(median(recent[max(0, end - 5) : end]) for end in range(min(5, len(recent)), len(recent) + 1))
