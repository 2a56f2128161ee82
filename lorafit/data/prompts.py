"""A few prompts of every shape of row, kept to be held against the chat template that is saved with the adapter."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from lorafit.data.rows import Message, Place
from lorafit.data.tokens import TextTokenizer
from lorafit.data.turns import Rendered

KEPT_OF_A_SHAPE = 2
LONGEST_KEPT = 200_000
"""Characters; a shape of which every row is longer has none of its prompts looked at."""
ANSWER_KEPT = 64
"""Characters of the answer that stay, since the tokens at the end of a prompt depend on what follows."""


class Prompt(NamedTuple):
    """The messages before an answer, and the tokens that the answer was trained after."""

    place: Place
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    ids: list[int]
    is_shared: bool
    """Whether the token after them holds the end of the prompt and the beginning of the answer."""


class _Kept(NamedTuple):
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    rendered: Rendered
    """With one span: the beginning of the answer."""
    is_generations: bool


class Prompts:
    """The first prompts of each shape: with a system text, with tools, with earlier turns, and without.

    One that generation sees otherwise, which the audit has said of its row, is kept only where its shape has no other.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[bool, ...], list[_Kept]] = {}

    def wants(self, messages: list[Message], tools: list[dict[str, Any]] | None, *, is_generations: bool) -> bool:
        """Whether more of this shape are wanted."""
        kept = self._kept.get(_shape(messages, tools), [])
        return not kept or (is_generations and (len(kept) < KEPT_OF_A_SHAPE or not kept[0].is_generations))

    def keep(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        rendered: Rendered,
        *,
        start: int,
        is_generations: bool,
    ) -> None:
        """Keep a prompt that is wanted: the text up to `start`, where the answer begins."""
        kept = self._kept.setdefault(_shape(messages, tools), [])
        if not self.wants(messages, tools, is_generations=is_generations):
            return
        if kept and not kept[0].is_generations:
            kept.clear()
        is_known = any(one.rendered.place == rendered.place for one in kept)
        # transformers leaves out keys without a value, so that it cannot render what holds them.
        if start <= LONGEST_KEPT and not is_known and not _has_nulls(messages):
            text = rendered.text[: start + ANSWER_KEPT]
            beginning = rendered._replace(text=text, spans=((start, len(text)),), is_whole=False, left_out=())
            kept.append(_Kept(messages, tools, beginning, is_generations))

    def encoded(self, text_tokenizer: TextTokenizer) -> tuple[Prompt, ...]:
        """Those that are kept, in the order of their rows."""
        kept = sorted((one for some in self._kept.values() for one in some), key=lambda one: one.rendered.place)
        return tuple(
            Prompt(one.rendered.place, one.messages, one.tools, *text_tokenizer.prompt_ids(one.rendered))
            for one in kept
        )


def _shape(messages: list[Message], tools: list[dict[str, Any]] | None) -> tuple[bool, ...]:
    return messages[0]["role"] == "system", bool(tools), len(messages) > 2


def _has_nulls(messages: list[Message]) -> bool:
    return any(value is None for message in messages for value in message.values())


def as_json(prompts: Iterable[Prompt]) -> list[Any]:
    """For JSON; `from_json` reads it back."""
    return list(json.loads(json.dumps(list(prompts), default=str)))


def from_json(facts: Iterable[Any]) -> tuple[Prompt, ...]:
    """The prompts that `as_json` wrote."""
    return tuple(Prompt((file, line), *rest) for (file, line), *rest in facts)
