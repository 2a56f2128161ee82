"""Intervals of paired differences: how wide, how often wrong, and what equal models give."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorafit.evaluation.intervals import (
    _expanded_tail,
    _student_quantile,
    bootstrap,
    paired_difference,
    standard_error,
)
from lorafit.tasks.score import ratio
from lorafit.tasks.sequences import SequenceLosses


def losses(nll: np.ndarray, tokens: np.ndarray) -> SequenceLosses:
    return SequenceLosses(nll.astype(float), tokens.astype(np.int64), np.zeros(len(tokens), np.int64))


def a_pair(random: np.random.Generator, *, shift: float, count: int) -> tuple[SequenceLosses, SequenceLosses]:
    """Losses whose difference is `shift` nats per token in the mean."""
    tokens = random.integers(5, 60, size=count)
    before = random.gamma(4, 0.5, size=count) * tokens
    return losses(before, tokens), losses(before + tokens * (shift + 0.3 * random.standard_normal(count)), tokens)


def test_the_difference_is_per_token_and_negative_where_the_second_is_better() -> None:
    one, other = a_pair(np.random.default_rng(0), shift=-0.3, count=400)
    found = paired_difference(one, other)
    assert found.mean == pytest.approx(other.loss - one.loss)
    assert found.low < found.mean < found.high < 0
    assert paired_difference(other, one).low == pytest.approx(-found.high, abs=2e-3)


def test_equal_models_differ_by_nothing_at_all() -> None:
    one, _ = a_pair(np.random.default_rng(0), shift=0, count=50)
    found = paired_difference(one, one)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_the_same_seed_gives_the_same_interval() -> None:
    pair = a_pair(np.random.default_rng(0), shift=0.1, count=40)
    assert paired_difference(*pair) == paired_difference(*pair)
    assert paired_difference(*pair, seed=1) != paired_difference(*pair)


def test_the_width_is_that_of_the_standard_error() -> None:
    pair = a_pair(np.random.default_rng(0), shift=0.1, count=400)
    found, error = paired_difference(*pair), standard_error(*pair)
    assert (found.high - found.low) / error == pytest.approx(2 * 1.966, rel=0.05)
    wider = paired_difference(*pair, level=0.99)
    assert (wider.high - wider.low) / error == pytest.approx(2 * 2.588, rel=0.05)


def test_pairing_makes_the_interval_narrow() -> None:
    """Sequences differ from each other far more than two models do on one of them."""
    one, other = a_pair(np.random.default_rng(0), shift=0.1, count=400)
    shuffled = np.random.default_rng(1).permutation(400)
    strangers = other.nll[shuffled] / other.tokens[shuffled] - one.nll / one.tokens
    unpaired = bootstrap(np.stack([strangers, np.ones(400)], axis=1), ratio)
    paired = paired_difference(one, other)
    assert (unpaired.high - unpaired.low) > 3 * (paired.high - paired.low)


@pytest.mark.parametrize("count", [10, 30, 100])
def test_equal_models_are_told_apart_as_rarely_as_the_level_says(count: int) -> None:
    random = np.random.default_rng(count)
    trials = 1000
    wrong = 0
    for _ in range(trials):
        found = paired_difference(*a_pair(random, shift=0, count=count), resamples=1000)
        wrong += not found.low <= 0 <= found.high
    # 5 %, and up to 7 % of 10 sequences of unequal lengths; three standard errors of 1,000 trials are 2 %.
    assert 0.03 <= wrong / trials <= 0.09


def test_one_sequence_says_nothing_of_another() -> None:
    one, other = a_pair(np.random.default_rng(0), shift=1, count=1)
    found = paired_difference(one, other)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert standard_error(one, other) == math.inf


def test_losses_of_other_sequences_are_not_compared() -> None:
    one, _ = a_pair(np.random.default_rng(0), shift=0, count=5)
    other, _ = a_pair(np.random.default_rng(1), shift=0, count=5)
    with pytest.raises(ValueError, match="other sequences"):
        paired_difference(one, other)


def test_many_sequences_do_not_take_much_memory() -> None:
    import tracemalloc

    pair = a_pair(np.random.default_rng(0), shift=0.1, count=20_000)
    tracemalloc.start()
    paired_difference(*pair, resamples=1000)
    assert tracemalloc.get_traced_memory()[1] < 200e6  # all draws at once would take 160 MB, three times over
    tracemalloc.stop()


@pytest.mark.parametrize(("degrees", "t"), [(4, -2.776), (9, -2.262), (29, -2.045), (399, -1.966)])
def test_students_t(degrees: int, t: float) -> None:
    assert _student_quantile(0.025, degrees) == pytest.approx(t, rel=0.01)
    assert _expanded_tail(0.025, degrees + 1) < 0.025
