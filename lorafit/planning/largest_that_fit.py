"""The largest micro-batch, the longest sequence and the highest rank that still fit."""

from __future__ import annotations

from collections.abc import Callable

from lorafit.planning.estimate import Estimator
from lorafit.planning.plan_result import Largest
from lorafit.planning.recipe_changes import Changes, changed
from lorafit.recipe import Recipe

LENGTH_STEP = 256
MOST = {"training.per_device_train_batch_size": 512, "training.max_length": 2**20, "lora.r": 1024}
"""Where the search ends."""


def largest_that_fit(estimator: Estimator, recipe: Recipe, *, longest: int) -> tuple[Largest, ...]:
    """Each alone, all other keys as they are; memory grows with each of them. `longest`: the model's positions."""

    # Left to decide, checkpointing is on at the limit, where it matters here.
    is_open = recipe.training.gradient_checkpointing == "auto"
    settled: Changes = {"training.gradient_checkpointing": True} if is_open else {}

    def fits(key: str) -> Callable[[int], bool]:
        def check(value: int) -> bool:
            made = changed(recipe, settled | {key: value})
            return made is not None and estimator.estimate(made).verdict == "fits"

        return check

    batch, length, rank = MOST
    longest = min(longest, MOST[length])
    return (
        Largest(batch, search(fits(batch), step=1, most=MOST[batch])),
        Largest(length, search(fits(length), step=LENGTH_STEP, most=longest)),
        Largest(rank, _highest_power(fits(rank), most=MOST[rank]) if recipe.adalora is None else None),
    )


def search(fits: Callable[[int], bool], *, step: int, most: int) -> int | None:
    """The largest multiple of `step` up to `most` that fits, by doubling and halving; None where not even one does."""
    most = most // step * step
    if most < step or not fits(step):
        return None
    low, high = step, 2 * step
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + step)
    while high - low > step:
        middle = (low + high) // (2 * step) * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _highest_power(fits: Callable[[int], bool], *, most: int) -> int | None:
    """The largest power of 2, which ranks usually are."""
    exponent = search(lambda one: fits(2 ** (one - 1)), step=1, most=most.bit_length())
    return None if exponent is None else 2 ** (exponent - 1)
