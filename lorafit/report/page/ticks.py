"""Round numbers for the axes of a plot, and numbers in few letters."""

from __future__ import annotations

import math


def ticks(low: float, high: float, *, most: int) -> list[float]:
    """At most `most` multiples of 1, 2, 2.5 or 5 times a power of ten within the range."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if (high - low) / (power * factor) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the range, few of them; where there is hardly one, 1, 2 and 5 times them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 6))
    powers = [10.0**power for power in range(first, last + 1, every)]
    fine = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    found = [value for value in powers if low <= value <= high]
    return found if len(found) > 2 else [value for value in fine if low <= value <= high][:6]


def short(value: float) -> str:
    """At most four figures: 2.431, 12.4 k, 0.0002, 1.5e-7."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, letter in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if size >= unit:
            return f"{value / (1e3 if letter == ' k' else unit):.4g}{letter}"
    return f"{value:.4g}" if size >= 1e-4 else f"{value:.3g}".replace("e-0", "e-")
