"""A few prompts of every shape of row, kept to be held against the chat template that is saved with the adapter."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NamedTuple

from lorafit.data.rows import Message, Place
from lorafit.data.turns import Rendered

KEPT_OF_A_SHAPE = 2
LONGEST_KEPT = 200_000
"""Characters; a shape of which every row is longer has none of its prompts looked at."""
ANSWER_KEPT = 64
"""Characters of the answer that stay, since the tokens at the end of a prompt depend on what follows."""


class Prompt(NamedTuple):
    """The messages before an answer, and the text that the answer was trained after."""

    place: Place
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    rendered: Rendered
    """With one span: the beginning of the answer."""
    is_generations: bool
    """Whether rendering found the prompt to be what generation sees; else the audit has said so of the row."""


class Prompts:
    """The first prompts of each shape: with a system text, with tools, with earlier turns, and without."""

    def __init__(self) -> None:
        self._kept: dict[tuple[bool, ...], list[Prompt]] = {}

    def wants(self, messages: list[Message], tools: list[dict[str, Any]] | None, *, is_generations: bool) -> bool:
        """Whether more of this shape are wanted; what generation sees is preferred."""
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
        """Keep the prompt if more of its shape are wanted; one that is not what generation sees gives way to others."""
        kept = self._kept.setdefault(_shape(messages, tools), [])
        if (kept and not is_generations) or any(prompt.place == rendered.place for prompt in kept):
            return
        if kept and not kept[0].is_generations:
            kept.clear()
        # transformers leaves out keys without a value, so that it cannot render what holds them.
        if len(kept) < KEPT_OF_A_SHAPE and start <= LONGEST_KEPT and not _has_nulls(messages):
            text = rendered.text[: start + ANSWER_KEPT]
            beginning = rendered._replace(text=text, spans=((start, len(text)),), is_whole=False, left_out=())
            kept.append(Prompt(rendered.place, messages, tools, beginning, is_generations))

    def all(self) -> tuple[Prompt, ...]:
        """Those that are kept."""
        return tuple(sorted((prompt for kept in self._kept.values() for prompt in kept), key=lambda one: one.place))


def _shape(messages: list[Message], tools: list[dict[str, Any]] | None) -> tuple[bool, ...]:
    return messages[0]["role"] == "system", bool(tools), len(messages) > 2


def _has_nulls(messages: list[Message]) -> bool:
    return any(value is None for message in messages for value in message.values())


def as_json(prompts: Collection[Prompt]) -> list[Any]:
    """For JSON; `from_json` reads it back."""
    return list(json.loads(json.dumps(list(prompts), default=str)))


def from_json(facts: list[Any]) -> tuple[Prompt, ...]:
    """The prompts that `as_json` wrote."""
    made = []
    for place, messages, tools, (_, text, spans, is_whole, _, needs_opening), is_generations in facts:
        file, line = place
        (start, end), *_ = spans
        rendered = Rendered((file, line), text, ((start, end),), is_whole, needs_opening=needs_opening)
        made.append(Prompt((file, line), messages, tools, rendered, is_generations))
    return tuple(made)
