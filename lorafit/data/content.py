"""The content of a message that comes in parts: their text, joined; pictures and sounds are refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lorafit.data.problems import RowProblem, listed, shown

TEXT_PARTS = ("text", "input_text", "output_text")
OTHER_THAN_TEXT = frozenset(
    ("image", "images", "image_path", "image_url", "img", "picture", "audio", "audios", "speech", "video", "videos")
)
"""Columns, and keys of a message, that hold what is no text."""

_MEDIA = re.compile(r"image|audio|video|picture|file", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"<(?:image|audio|video)(?:[_ -]?\d+)?>|<\|(?:image|audio|video|vision)[a-z_]*(?:\|>|_\d+\|>)", re.I
)


def joined(parts: list[Any], where: str) -> str:
    """The texts one after the other, as the templates that know parts write them. Raises RowProblem."""
    return "".join(_text_of(part, f"{where}[{index}]") for index, part in enumerate(parts))


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowProblem(f"{where}: {shown(part)} where text belongs; write it as text")
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS:
        if isinstance(kind, str) and _MEDIA.search(kind):
            raise RowProblem(f'{where}: a part of type "{kind}"; {ONLY_TEXT}, so remove such rows', kind="not_text")
        raise RowProblem(f"{where}: a part of type {shown(kind)}, which nothing reads; write it as text")
    text = part.get("text")
    if not isinstance(text, str):
        what = f"text: {shown(text)}" if "text" in part else f"no text (there are {listed(part)})"
        raise RowProblem(f"{where}: {what}; write it as text")
    return text


ONLY_TEXT = "lorafit trains text"


def refuse_placeholders(texts: Iterable[str], columns: Iterable[str]) -> None:
    """Raises RowProblem for a text that speaks of what one of the columns holds."""
    for text in texts:
        found = _PLACEHOLDER.search(text)
        if found:
            raise RowProblem(
                f"the text has {found[0]} for what is in {' and '.join(columns)}; {ONLY_TEXT}, so remove such rows",
                kind="not_text",
            )
