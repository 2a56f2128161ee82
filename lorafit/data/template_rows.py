"""Rows that a chat template may refuse, or write only in part: whether it does takes the template. No torch."""

from __future__ import annotations

from lorafit.data.rows import REASONING, Chat, Message, Pair, Row

_MORE = frozenset(("tool_calls", *REASONING))


class TemplateRows:
    """Counts, of the rows that pass by, those with more than the user's and the assistant's texts."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, row: Row) -> None:
        """Look at one row."""
        if isinstance(row, Chat):
            self.count += bool(row.tools) or any(_is_special(message) for message in row.messages)
        elif isinstance(row, Pair):
            self.count += bool(row.system)


def _is_special(message: Message) -> bool:
    return message["role"] not in ("user", "assistant") or not _MORE.isdisjoint(message)
