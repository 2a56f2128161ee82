"""The three shapes every format becomes: a conversation, a prompt with its completion, or text."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any, NamedTuple

Message = dict[str, Any]
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Where templates look for the thoughts before an answer."""
Place = tuple[int, int]
"""Index of the file, and the line (the row number in Parquet files and Hub data sets)."""


class Chat(NamedTuple):
    """A conversation; answers are the assistant's messages from `first_answer` on, without those in `untrained`."""

    place: Place
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    first_answer: int
    untrained: frozenset[int] = frozenset()
    """The messages that the user marked as not to be trained."""


class Pair(NamedTuple):
    """A prompt and its completion; `input` is the second part of an Alpaca instruction."""

    place: Place
    system: str
    prompt: str
    input: str
    completion: str


class Text(NamedTuple):
    """Running text, trained as a whole."""

    place: Place
    text: str


Row = Chat | Pair | Text


def answers(chat: Chat, *, only_last: bool = False) -> list[int]:
    """The messages to train on: the assistant's that say something, have something to answer and are not marked.

    Of these only the row's last answer where that alone is wanted; when it is marked, there is none.
    """
    possible = possible_answers(chat)
    return [index for index in (possible[-1:] if only_last else possible) if index not in chat.untrained]


def possible_answers(chat: Chat) -> list[int]:
    """The messages that would be trained on if none were marked."""
    found = []
    is_asked = False
    for index, message in enumerate(chat.messages):
        role = message["role"]
        if role != "assistant":
            is_asked = is_asked or role in ("user", "tool")
        elif is_asked and index >= chat.first_answer and says_something(message):
            found.append(index)
    return found


def says_something(message: Message) -> bool:
    """Whether there is text, a tool call or, of the assistant, a thought in the message."""
    return bool(message.get("content", "").strip() or message.get("tool_calls") or thinks(message))


def thinks(message: Message) -> bool:
    """Whether it is the assistant's and has thoughts."""
    return message["role"] == "assistant" and any(message.get(key, "").strip() for key in REASONING)


def as_chat(row: Chat | Pair) -> Chat:
    """A pair as the conversation a chat template can render; an Alpaca input follows its instruction."""
    if isinstance(row, Chat):
        return row
    prompt = f"{row.prompt}\n\n{row.input}" if row.input else row.prompt
    messages: list[Message] = [{"role": "system", "content": row.system}] if row.system else []
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": row.completion}]
    return Chat(row.place, messages, None, 0)


def system_merged(chat: Chat) -> Chat | None:
    """The conversation with its system text before the first user's message, a blank line between; None without both.

    What Gemma and the first Mistral models are given, whose templates know no system message.
    """
    said, *rest = chat.messages
    asked = next((index for index, message in enumerate(rest) if message["role"] == "user"), None)
    if said["role"] not in ("system", "developer") or asked is None:
        return None
    rest[asked] = {**rest[asked], "content": f"{said['content']}\n\n{rest[asked]['content']}"}
    untrained = frozenset(index - 1 for index in chat.untrained if index)
    return chat._replace(messages=rest, first_answer=max(0, chat.first_answer - 1), untrained=untrained)


def texts(row: Row) -> tuple[str, ...]:
    """Every text the user wrote into the row."""
    if isinstance(row, Chat):
        return tuple(message["content"] for message in row.messages if "content" in message)
    return tuple(row[1:])


def alike_key(row: Row) -> Hashable:
    """What makes two rows the same but for case and white space."""
    folded = tuple("".join(str(text).casefold().split()) for text in texts(row))
    if not isinstance(row, Chat):
        return folded
    calls = [message.get("tool_calls") for message in row.messages]
    return (
        folded,
        tuple(message["role"] for message in row.messages),
        repr((row.tools, calls) if any(calls) else row.tools),
    )


def content_key(row: Row) -> Hashable:
    """What makes two rows the same row, wherever they stand."""
    if isinstance(row, Chat):
        return json.dumps((row.messages, row.tools, sorted(row.untrained)), sort_keys=True, default=str)
    return tuple(row[1:])
