"""What a value of an open mapping may be: the libraries look at it when the model is loaded, or never."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Takes:
    """Values that an argument takes, and what is said of others."""

    kind: type[bool] | type[int] | type[float] | type[str]
    """`float` takes whole numbers, too; nothing but `bool` takes true and false."""
    least: float = -math.inf
    most: float = math.inf
    is_above: bool = False
    """Whether `least` itself is left out."""
    is_below: bool = False
    """Whether `most` itself is left out."""
    choices: tuple[str, ...] = ()
    """Of a text; any, where there are none."""
    or_null: bool = False
    or_text: str | None = None
    """A word that is taken beside the numbers."""

    def refused(self, value: Any) -> str | None:
        """What is wrong with `value`, and what is taken instead; None where nothing is."""
        if (value is None and self.or_null) or (value is not None and value == self.or_text) or self._holds(value):
            return None
        other = f', or "{self.or_text}"' if self.or_text else ", or null" if self.or_null else ""
        quoted = ", without quotes" * self._is_quoted(value)
        return f"{json.dumps(value, default=str)} is not taken; write {self._described()}{other}{quoted}"

    def _holds(self, value: Any) -> bool:
        if self.kind in (bool, str):
            return isinstance(value, self.kind) and (not self.choices or value in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if self.kind is int and not isinstance(value, int):
            return False
        return (self.least < value if self.is_above else self.least <= value) and (
            value < self.most if self.is_below else value <= self.most
        )

    def _described(self) -> str:
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return f"one of {', '.join(self.choices)}" if len(self.choices) > 1 else (*self.choices, "a text")[0]
        bounds = []
        if self.least > -math.inf:
            bounds.append(f"{'above' if self.is_above else 'from'} {_shown(self.least)}{' on' * (not self.is_above)}")
        if self.most < math.inf:
            bounds.append(f"{'below' if self.is_below else 'at most'} {_shown(self.most)}")
        kind = f"a {'whole ' * (self.kind is int)}number"
        return f"{kind}{' ' * bool(bounds)}{' and '.join(bounds)}"

    def _is_quoted(self, value: Any) -> bool:
        """Whether a text holds such a number: YAML reads what is quoted as text."""
        try:
            return self.kind in (int, float) and isinstance(value, str) and self._holds(self.kind(value))
        except ValueError:
            return False


def _shown(bound: float) -> str:
    return f"{bound:,.0f}" if float(bound).is_integer() else f"{bound:g}"


def refused_values(given: Mapping[str, Any], takes: Mapping[str, Takes]) -> dict[str, str]:
    """What is wrong, by key, of those that are known; the others are refused elsewhere."""
    said = {key: takes[key].refused(value) for key, value in given.items() if key in takes}
    return {key: message for key, message in said.items() if message is not None}
