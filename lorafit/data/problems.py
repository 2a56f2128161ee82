"""What is wrong with one row, and how a value is shown in one line."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any


class RowProblem(Exception):
    """What is wrong with one row, and the kind of finding it is."""

    def __init__(self, message: str, *, kind: str = "wrong_type") -> None:
        self.message, self.kind = message, kind
        super().__init__(message)


NO_CHARACTER = "holds half of a surrogate pair (\\ud800-\\udfff), which is no character; remove it"
_JSON_TYPES = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def shown(value: Any) -> str:
    """A value and its JSON type, short enough for one line."""
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False, default=str).replace("\n", " ")
    return f"{_JSON_TYPES.get(type(value), type(value).__name__)} ({text if len(text) <= 40 else text[:37] + '...'})"


def listed(names: Collection[str]) -> str:
    """The names with commas, at most eight."""
    first = list(names)[:8]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "") if names else "(none)"


def is_unicode(text: str) -> bool:
    """Whether every code point is a character: half a surrogate pair cannot be encoded, nor tokenised."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
