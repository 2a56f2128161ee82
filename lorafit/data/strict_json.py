"""JSON as it is written down: no key twice, no NaN, no number that is infinite once it is read."""

from __future__ import annotations

import json
import math
from typing import Any


def _without_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" stands twice in one object; keep one')
    return row


def _no_nan(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON; write a number, null or text")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number} is beyond what a number can hold; write it as text")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicate_keys, parse_constant=_no_nan, parse_float=_finite)


def json_problem(error: Exception) -> str:
    """What is wrong with a JSON text, from what DECODER raised for it."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "broken JSON: nested too deeply"
    # Python's limit of digits, which it words for programmers.
    if "int_max_str_digits" in str(error):
        return "a number with thousands of digits; write it as text"
    return str(error)
