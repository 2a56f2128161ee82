"""Figures of a model, each a function of sums over sequences: so all of them have paired intervals alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Sums over sequences [R, K] to the figure [R] they make."""


@dataclass(frozen=True)
class Score:
    """One figure of one model."""

    values: Floats
    """[S, K], of which the sums make the figure."""
    figure: Statistic
    higher_is_better: bool

    @property
    def value(self) -> float:
        """Of all sequences."""
        return float(self.figure(self.values.sum(axis=0, keepdims=True))[0])


def ratio(sums: Floats) -> Floats:
    """First column by second; 0 where there is nothing to divide by."""
    return sums[:, 0] / np.maximum(sums[:, 1], 1e-300)
