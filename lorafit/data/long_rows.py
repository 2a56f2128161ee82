"""Rows that are surely too long, found without a template: their own texts alone are too much. No torch."""

from __future__ import annotations

import heapq
import json
from itertools import accumulate, count
from pathlib import Path
from typing import NamedTuple

from lorafit.data.rows import Chat, Pair, Place, Row, Text, answers, texts
from lorafit.errors import ModelError

CHARACTERS_AT_ONCE = 4_000_000
"""Tokenized in all, of the longest rows: about a second."""
CHARACTERS_OF_A_TOKEN = 8
"""So many times `max_length` characters of a row are looked at: few texts of that length have fewer tokens."""
TEMPLATE_TOKENS, TOKENS_OF_A_TURN = 128, 16
"""More than the chat templates of the well-known families write besides the texts."""


class _Doubtful(NamedTuple):
    """A row that may be too long; the shortest compares as the least."""

    size: int
    order: int
    place: Place
    kept: list[str]
    besides: int
    """Tokens that may come to those of `kept`."""


class Lengths(NamedTuple):
    """What the tokenizer says of the doubtful rows."""

    too_long: list[tuple[Place, int]]
    """Place of each that is surely too long, with the tokens it has at least; by place."""
    doubtful: int
    """Rows of which only the template can tell."""


class LongRows:
    """The longest rows that pass by, as far as they could be longer than `max_length` tokens."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._order = count()
        self._longest: list[_Doubtful] = []
        self._characters = 0
        self._let_go = 0

    def add(self, row: Row) -> None:
        """Look at one more. A token is a byte at least, so that most rows are surely short enough."""
        whole = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts(row)) + _bytes_of_tools(row)
        turns = len(row.messages) if isinstance(row, Chat) else 2
        besides = TEMPLATE_TOKENS + TOKENS_OF_A_TURN * turns
        if whole + besides <= self._max_length:
            return
        kept = kept_by_any_template(row)
        besides += whole - sum(len(text.encode("utf-8", "surrogatepass")) for text in kept)
        kept = _beginning(kept, CHARACTERS_OF_A_TOKEN * self._max_length)
        heapq.heappush(self._longest, _Doubtful(whole, next(self._order), row.place, kept, besides))
        self._characters += sum(map(len, kept))
        while self._characters > CHARACTERS_AT_ONCE and len(self._longest) > 1:
            self._characters -= sum(map(len, heapq.heappop(self._longest).kept))
            self._let_go += 1

    def lengths(self, tokenizer_file: Path | None) -> Lengths:
        """How long they are, without a template. Where two texts meet a token may belong to both: one less for each."""
        doubtful = self._let_go + len(self._longest)
        if tokenizer_file is None or not self._longest:
            return Lengths([], doubtful)
        from tokenizers import Tokenizer  # not before it is needed: most rows are short

        try:
            core = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # what tokenizers raises has no type of its own
            message = f"is not a tokenizer that can be read ({error}): copy the file again"
            raise ModelError(message, where=str(tokenizer_file)) from None
        core.no_truncation()
        core.no_padding()
        counted = [
            len(one.ids)
            for one in core.encode_batch_fast(
                [text for row in self._longest for text in row.kept], add_special_tokens=False
            )
        ]
        ends = list(accumulate(len(row.kept) for row in self._longest))
        too_long = []
        for row, end in zip(self._longest, ends, strict=True):
            tokens = sum(counted[end - len(row.kept) : end])
            if tokens - len(row.kept) > self._max_length:
                too_long.append((row.place, tokens - len(row.kept)))
            elif tokens + row.besides <= self._max_length:
                doubtful -= 1
        return Lengths(sorted(too_long), doubtful)


def kept_by_any_template(row: Row) -> list[str]:
    """What a row's last answer is trained after, and the answer: without what some templates leave out (system texts,
    tools, thoughts), up to white space at the ends."""
    match row:
        case Text():
            spoken = [row.text]
        case Pair():
            spoken = [row.prompt, row.input, row.completion]
        case Chat():
            trained = answers(row)
            messages = row.messages[: trained[-1] + 1] if trained else []
            contents = [str(one.get("content") or "") for one in messages if one["role"] in ("user", "assistant")]
            spoken = [content.rpartition("</think>")[2] for content in contents]
    return [stripped for text in spoken if (stripped := text.strip())]


def _bytes_of_tools(row: Row) -> int:
    if not isinstance(row, Chat):
        return 0
    calls = [message["tool_calls"] for message in row.messages if message.get("tool_calls")]
    return len(json.dumps([row.tools, calls], default=str)) if row.tools or calls else 0


def _beginning(texts: list[str], characters: int) -> list[str]:
    """As many of the texts as have so many characters in all, the last of them cut."""
    kept = []
    for text in texts:
        if characters <= 0:
            break
        kept.append(text[:characters])
        characters -= len(text)
    return kept
