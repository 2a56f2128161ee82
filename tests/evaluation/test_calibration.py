"""Adapters that change nothing are called different as rarely as promised; benchmarks/eval_calibration.py has 200."""

from __future__ import annotations

import pytest
from eval_calibration import TINY, flagged


def test_an_adapter_of_zero_is_never_flagged() -> None:
    found = flagged(5, sequences=30, size=0.0)
    assert (found.loss, found.token_accuracy, found.outside_99, found.outside_95) == (0, 0, 0, 0)


def test_adapters_that_change_nothing_but_for_noise_are_rarely_flagged() -> None:
    found = flagged(40, sequences=60, size=TINY)
    assert found.loss <= 0.05
    assert found.token_accuracy <= 0.05
    assert found.outside_99 <= 0.05
    assert found.outside_95 <= 0.15  # 5 %, and three standard errors of 40 trials


def test_adapters_that_do_change_the_model_are_found() -> None:
    assert flagged(5, sequences=60, size=0.3).loss == 1


@pytest.mark.slow
def test_two_hundred_trials_flag_at_most_5_percent() -> None:
    found = flagged(200, sequences=100, size=TINY)
    assert found.loss <= 0.05
    assert found.token_accuracy <= 0.05
