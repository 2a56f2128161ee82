"""JSON of files that may hold anything."""

import json
from typing import Any


def parsed(text: str | bytes) -> Any:
    """What a JSON text holds. Raises ValueError, also for what is nested deeper than anything real is."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
