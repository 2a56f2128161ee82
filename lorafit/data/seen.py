"""Whether what a row hands to the template is in what the template writes: text, reasoning, tools and their calls.

Looked for up to white space and the quoting of JSON. Of a call the name and every argument are looked for outside the
message's own text, which may speak of both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from lorafit.data.rows import REASONING, Message


def missing(message: Message, text: str, *, with_reasoning: bool, before: str = "") -> str | None:
    """What of the message the rendered text does not hold: "text", "reasoning" or a tool call; None when all is there.

    Templates strip the reasoning of earlier answers on purpose; it is looked for only where the answer is learnt. What
    stands before the answer may hold its beginning: some prompts of generation end with `<think>`.
    """
    content = (message.get("content") or "").strip()
    if content and not holds(text, content, before=before):
        # What is left of an earlier answer once its inline reasoning is stripped.
        told = content if with_reasoning else content.rpartition("</think>")[2].strip()
        if told is content or not holds(text, told):
            return "text"
    thought = reasoning(message).strip() if with_reasoning else ""
    if thought and not holds(text, thought):
        return "reasoning"
    if calls := message.get("tool_calls"):
        for said in (content, thought):
            text = text.replace(said, "", 1) if said else text
        for call in calls:
            function = call.get("function", call)
            name = str(function.get("name", ""))
            if name not in text or not _holds_arguments(text, function.get("arguments")):
                return f"tool call {name}"
    return None


def missing_tool(tools: list[dict[str, Any]], text: str, without_tools: Callable[[], str]) -> str | None:
    """The first tool that the rendered text does not name; the one without tools tells names in the messages apart."""
    plain = None
    for tool in tools:
        function = tool.get("function", tool)
        name, description = function.get("name"), function.get("description")
        if not isinstance(name, str) or not name:
            continue
        if name not in text:
            return name
        if isinstance(description, str) and description and description in text:
            continue
        plain = without_tools() if plain is None else plain
        if text.count(name) <= plain.count(name):
            return name
    return None


def reasoning(message: Message) -> str:
    """The message's reasoning, under whichever name; empty without."""
    return next((message[name] for name in REASONING if isinstance(message.get(name), str)), "")


def has_objects_as_arguments(message: Message) -> bool:
    """Whether a call of the message has arguments that are an object."""
    return any(_arguments(call) for call in message.get("tool_calls") or ())


def writes_python(message: Message, text: str) -> bool:
    """Whether the text holds arguments as Python writes them (`{'city': 'Rome'}`): the template wants text there."""
    return any(str(dict(_arguments(call))) in text for call in message.get("tool_calls") or () if _arguments(call))


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call.get("function", call).get("arguments")
    return arguments if isinstance(arguments, dict) else {}


def holds(text: str, part: str, *, before: str = "") -> bool:
    """Whether the part is in the text, up to white space and JSON quoting, or begins before it and ends in it."""
    if part in text:
        return True
    start = len(_squeezed(before))
    squeezed = _squeezed(before + text)
    spellings = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
    return any(squeezed.rfind(spelt) + len(spelt) > start for spelt in map(_squeezed, spellings) if spelt in squeezed)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _holds_arguments(text: str, arguments: Any) -> bool:
    """Whether every key and value stands there: as JSON, or one by one in whatever layout the template has."""
    if arguments is None or json.dumps(arguments, ensure_ascii=False) in text:
        return True
    return all(holds(text, leaf) for leaf in _leaves(arguments))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
