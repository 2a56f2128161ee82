"""What a broken rule says."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lorafit.recipe.recipe import Recipe


@dataclass(frozen=True)
class Broken:
    """One rule between fields that does not hold."""

    key: str
    """Where it is reported: `lora.target_modules`, `data.train.0.path`."""
    message: str
    """What is wrong, with the value, and what to write instead."""
    others: tuple[str, ...] = ()
    """The other keys it looked at; it is not reported while one of them is wrong in itself."""


Rule = Callable[[Recipe], Iterator[Broken]]
