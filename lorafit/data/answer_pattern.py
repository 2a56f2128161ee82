"""What `lorafit init` makes of answers that end in a marked result, such as `#### 42`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LOOKED_AT = 50
"""Rows: a habit of the whole file shows in them."""

LEAST_ROWS = 3
"""Fewer agree by chance."""

BOXED = r"\\boxed\{([^{}]*)\}"
"""LaTeX's frame around a result, anywhere in the answer."""


def answer_pattern(answers: Sequence[str]) -> str | None:
    """The `eval.generate.answer` that finds the result in every one of these answers; None where they have no habit.

    A habit is a frame, or a last line that begins alike in all of them, behind a text that does not.
    """
    if len(answers) < LEAST_ROWS:
        return None
    if all(re.search(BOXED, answer) for answer in answers):
        return BOXED
    lines = [answer.strip().splitlines() for answer in answers]
    if any(len(of_answer) < 2 for of_answer in lines):
        return None
    marker = _common_start([of_answer[-1] for of_answer in lines]).rstrip("0123456789.,+-")  # 12 and 15 share a digit
    results = [of_answer[-1][len(marker) :].strip() for of_answer in lines]
    if not marker.strip() or not all(results) or len(set(results)) == 1:
        return None
    result = r"(\S+)" if not any(" " in one for one in results) else "(.+)"
    return re.escape(marker.rstrip()).replace(r"\#", "#").replace(r"\ ", " ") + r"\s*" + result


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # what these share, all between them do
    same = next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:same]


def answers_of(rows: Iterable[Mapping[str, Any]], completion: str | None) -> list[str]:
    """The answers as they stand in rows of a file: the completion, or the last message."""
    names = [completion] if completion else ["completion", "output"]
    found = []
    for row in rows:
        turns = row.get("messages", row.get("conversations"))
        last = turns[-1] if isinstance(turns, list) and turns else None
        candidates = [row.get(name) for name in names]
        candidates += [last.get("content"), last.get("value")] if isinstance(last, dict) else []
        found += [text for text in candidates if isinstance(text, str) and text.strip()][:1]
    return found
