"""The elements of one JSON array, however long it is: read as far as the next element needs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from lorafit.data.streams import CHUNK, LONGEST_LINE, TOO_LONG
from lorafit.data.strict_json import DECODER, json_problem

_BLANK = re.compile(r"[ \t\n\r\ufeff]*")
_LONGEST_WORD = len("-Infinity")
"""A JSON text that breaks off is found wrong at its end, or at most at the beginning of its last word."""


class _Window:
    """The part of the text that is looked at, and where it stands in the file."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.held = ""
        self.at = 0
        self.is_whole = False
        self._line, self._column = 1, 1
        self._counted = 0

    def more(self) -> None:
        """Let go of what was read and hold twice as much of the rest; `is_whole` says that there is no more."""
        self.line()
        passed = self.held[: self.at]
        self._column = len(passed) - passed.rfind("\n") if "\n" in passed else self._column + len(passed)
        read = self._text.read(max(CHUNK, len(self.held) - self.at))
        self.held, self.at, self._counted, self.is_whole = self.held[self.at :] + read, 0, 0, not read

    def skip_blank(self) -> str:
        """Go to the next character that is not blank: what it is, or nothing at the end."""
        while True:
            blank = _BLANK.match(self.held, self.at)
            self.at = blank.end() if blank else self.at
            if self.at < len(self.held) or self.is_whole:
                return self.held[self.at : self.at + 1]
            self.more()

    def line(self, at: int | None = None) -> int:
        """The line of a place in `held`, from where we are on."""
        self._line += self.held.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line if at is None else self._line + self.held.count("\n", self.at, at)

    def column(self, at: int) -> int:
        """The column of a place in `held`."""
        start = self.held.rfind("\n", 0, at)
        return at - start if start >= 0 else self._column + at


def json_array_rows(text: io.TextIOWrapper, *, broken: Callable[[int, str], None]) -> Iterator[tuple[int, Any]]:
    """The elements of the array that the text is, each with the line it starts on."""
    window = _Window(text)
    window.skip_blank()
    window.at += 1  # the bracket
    is_first = True
    while (follows := window.skip_blank()) != "]":
        if not is_first:
            if follows != ",":
                message = "broken JSON: expected , or ] after an element of the array; what follows was not read"
                broken(window.line(), message)
                return
            window.at += 1
            window.skip_blank()
        is_first = False
        line = window.line()
        try:
            row = _next_element(window)
        except (ValueError, RecursionError) as error:
            at = window.line(error.pos) if isinstance(error, json.JSONDecodeError) else line
            broken(at, _problem(error, window))
            return
        yield line, row
    window.at += 1
    if window.skip_blank():
        broken(window.line(), "text after the end of the array; remove it")


def _next_element(window: _Window) -> Any:
    """The element that begins here. Raises what the decoder raises for one that is broken, not only cut off."""
    while True:
        try:
            row, end = DECODER.raw_decode(window.held, window.at)
        except json.JSONDecodeError as error:
            is_cut = error.msg.startswith("Unterminated") or error.pos >= len(window.held) - _LONGEST_WORD
            if window.is_whole or not is_cut:
                raise
        else:
            follows = window.held[end : end + 1]
            may_go_on = not follows or (isinstance(row, int | float) and follows in ".eE")
            if window.is_whole or not may_go_on:
                window.at = end
                return row
        if len(window.held) - window.at > LONGEST_LINE:
            raise ValueError(f"an element {TOO_LONG}")
        window.more()


def _problem(error: Exception, window: _Window) -> str:
    if isinstance(error, json.JSONDecodeError):
        message = f"broken JSON: {error.msg.removesuffix(' at')} at column {window.column(error.pos)}"
    else:
        message = json_problem(error)
    return f"{message}; what follows was not read"
