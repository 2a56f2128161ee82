"""How sure a difference between two models is: both saw the same sequences, so the difference of each one counts.

Everything that is compared is a function of sums over sequences: a loss is nats by tokens, an accuracy right answers by
answers, BLEU matches by n-grams. The bootstrap (Efron 1979) draws the sequences anew, with replacement, and asks how
far the figure moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lorafit.tasks.score import Floats, Statistic, ratio
from lorafit.tasks.sequences import SequenceLosses

DRAWS_AT_ONCE = 2**22
"""Sequences drawn at a time: 32 MiB."""


@dataclass(frozen=True)
class Interval:
    """A difference and the range that it lies in with the confidence asked for."""

    mean: float
    """The difference itself, of all sequences as they are."""
    low: float
    high: float


def paired_difference(
    a: SequenceLosses, b: SequenceLosses, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """loss(b) - loss(a) in nats per token; negative where `b` is better."""
    _refuse_other_sequences(a, b)
    sums = np.stack([b.nll - a.nll, a.tokens], axis=1)
    return bootstrap(sums, ratio, seed=seed, resamples=resamples, level=level)


def standard_error(a: SequenceLosses, b: SequenceLosses) -> float:
    """Of loss(b) - loss(a), in nats per token: the linearised error of a ratio of sums (delta method)."""
    _refuse_other_sequences(a, b)
    count = len(a.tokens)
    if count < 2:
        return math.inf
    difference = b.nll - a.nll
    residual = difference - difference.sum() / a.tokens.sum() * a.tokens
    return float(math.sqrt(count / (count - 1) * np.square(residual).sum()) / a.tokens.sum())


def _refuse_other_sequences(a: SequenceLosses, b: SequenceLosses) -> None:
    if not np.array_equal(a.tokens, b.tokens):
        raise ValueError("the losses are of other sequences: nothing to pair")


def bootstrap(
    values: Floats, statistic: Statistic, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """The statistic of the sums of `values` [S, K], with its percentile interval.

    The percentiles are spread by what Student's t and S - 1 ask for (Hesterberg 2015, "expanded percentile"): plain
    ones are too narrow, and call equal models different 6 times in 100 at 30 sequences. One sequence says nothing of
    another: its interval is endless.
    """
    mean = float(statistic(values.sum(axis=0, keepdims=True))[0])
    count = len(values)
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    figures = np.concatenate([statistic(sums) for sums in _resampled_sums(values, seed=seed, resamples=resamples)])
    tail = _expanded_tail((1 - level) / 2, count)
    # Sums in another order differ in their last bits: a difference of exactly nothing stays one.
    low, high = (0.0, 0.0) if not figures.any() else np.quantile(figures, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def _resampled_sums(values: Floats, *, seed: int, resamples: int) -> Iterator[Floats]:
    """[R, K] in parts: the sums of `values` over as many sequences, drawn with replacement."""
    random, count = np.random.default_rng(seed), len(values)
    left = resamples
    while left > 0:
        size = min(left, max(1, DRAWS_AT_ONCE // count))
        drawn = random.integers(count, size=(size, count))
        drawn += np.arange(size)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        yield times.astype(np.float64) @ values
        left -= size


def _expanded_tail(tail: float, count: int) -> float:
    """The share of resamples to leave out at either end, for `tail` of the truth to lie beyond."""
    reach = math.sqrt(count / (count - 1)) * -_student_quantile(tail, count - 1)
    return 0.5 * math.erfc(reach / math.sqrt(2))


def _student_quantile(tail: float, degrees: int) -> float:
    """t with `tail` below it: Cornish-Fisher from the normal (Hill 1970); within 1 % from 4 degrees on."""
    z = NormalDist().inv_cdf(tail)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))
