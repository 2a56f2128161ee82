"""A list of messages, in any spelling, checked: roles, order, contents, tool calls, marks."""

from __future__ import annotations

import difflib
import itertools
from typing import Any

from lorafit.data.content import ONLY_TEXT, OTHER_THAN_TEXT, joined
from lorafit.data.findings import Findings
from lorafit.data.marks import MARKS, REFUSED_MARKS, is_left_out
from lorafit.data.problems import NO_CHARACTER, RowProblem, is_unicode, listed, shown
from lorafit.data.rows import REASONING, Message, Place, thinks
from lorafit.data.tool_calls import function_calls, parsed, tool_calls

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "gemini": "assistant",
    "claude": "assistant",
    "chatbot": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function": "tool",
    "function_response": "tool",
    "function-response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "function-call": "assistant",
    "tool_call": "assistant",
}
"""What other data sets call the roles, in small letters."""
CALLS = ("function_call", "function-call", "tool_call")
"""The roles of messages whose text is a tool call."""
READ_KEYS = frozenset(("role", "content", "name", "tool_calls", "tool_call_id", *REASONING))
A_MESSAGE = '{"role": "user", "content": "..."}'
_MARKED = frozenset((*MARKS, *REFUSED_MARKS))


def conversation(
    messages: Any, column: str, place: Place, *, findings: Findings, first_answer: int = 0, is_all_trained: bool = False
) -> tuple[list[Message], frozenset[int]]:
    """The messages with `role` and `content`, and which of them are marked as not to be trained.

    What is odd but usable is counted. Raises RowProblem.
    """
    messages = listed_messages(messages, column)
    if not messages:
        raise RowProblem(f"{column}: an empty list; write at least one message, or remove the row")
    checked, untrained = [], []
    for index, message in enumerate(messages):
        if _is_plain(message):
            checked.append(message)
            continue
        where = f"{column}[{index}]"
        read = _message(message, where)
        can_be_trained = is_all_trained or (read["role"] == "assistant" and index >= first_answer)
        if not _MARKED.isdisjoint(read) and is_left_out(read, where, can_be_trained=can_be_trained):
            untrained.append(index)
        unread = [key for key in read if key not in READ_KEYS]
        if unread:
            findings.add("unread_message_key", place, ", ".join(unread))
        checked.append(read)
    oddity = unusual_order([message["role"] for message in checked])
    if oddity:
        findings.add("unusual_order", place, oddity)
    return checked, frozenset(untrained)


def listed_messages(messages: Any, column: str) -> list[Any]:
    """The list, which CSV files and some data sets have as JSON text or as an object of lists. Raises RowProblem."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = parsed(messages, column)
    if isinstance(messages, dict) and is_object_of_lists(messages):
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    if not isinstance(messages, list):
        raise RowProblem(f"{column}: {shown(messages)} where a list of messages belongs; write [{A_MESSAGE}, ...]")
    return messages


def is_object_of_lists(messages: dict[str, Any]) -> bool:
    """How `datasets` stores a sequence of objects: `{"role": ["user", ...], "content": ["Hello", ...]}`."""
    return all(isinstance(values, list) for values in messages.values()) and len({*map(len, messages.values())}) == 1


def role_of(message: Message) -> Any:
    """The role of a message in our words, or as it stands there where it is none."""
    role = next((message[key] for key in ("role", "from") if message.get(key) is not None), None)
    return OTHER_NAMES.get(role.lower(), role.lower()) if isinstance(role, str) else role


def _is_plain(message: Any) -> bool:
    """Whether there is nothing to do, as with most messages: every row passes here."""
    if not isinstance(message, dict) or len(message) != 2 or message.get("role") not in ROLES:
        return False
    content = message.get("content")
    return isinstance(content, str) and (content.isascii() or is_unicode(content))


def _message(message: Any, where: str) -> Message:
    if isinstance(message, str) and message.lstrip().startswith("{"):
        message = parsed(message, where)
    if not isinstance(message, dict):
        raise RowProblem(f"{where}: {shown(message)} where a message (an object) belongs; write {A_MESSAGE}")
    given = {key: value for key, value in message.items() if value is not None}
    role = _one_of(given, "role", "from", where)
    content = _one_of(given, "content", "value", where)
    known = OTHER_NAMES.get(role.lower(), role.lower()) if isinstance(role, str) else None
    if known not in ROLES:
        raise RowProblem(f"{where}: {_unknown_role(role, message)}", kind="unknown_role")
    kept: Message = {"role": known, "content": content, **given}
    if isinstance(role, str) and role.lower() in CALLS:
        kept["tool_calls"], content = function_calls(content, f"{where}.content"), None
    elif "tool_calls" in kept or "function_call" in kept:
        _read_calls(kept, where)
    if isinstance(content, list):
        kept["content"] = content = joined(content, f"{where}.content")
    for key in (*REASONING, "name"):
        if key in kept:
            _check_content(kept[key], message, where, key=key)
    if content is None and known == "assistant" and (kept.get("tool_calls") or thinks(kept)):
        del kept["content"]
    else:
        _check_content(kept["content"], message, where)
    media = None if OTHER_THAN_TEXT.isdisjoint(kept) else next((key for key in OTHER_THAN_TEXT if kept.get(key)), None)
    if media:
        raise RowProblem(f"{where}.{media}: {shown(kept[media])}; {ONLY_TEXT}, so remove such rows", kind="not_text")
    return kept


def _one_of(given: Message, name: str, other: str, where: str) -> Any:
    """The value under either name, taken out."""
    values = [given.pop(key) for key in (name, other) if key in given]
    if len(values) == 2 and values[0] != values[1]:
        raise RowProblem(f"{where}: {name} and {other} differ; keep one of them")
    return values[0] if values else None


def _read_calls(kept: Message, where: str) -> None:
    """Makes `tool_calls` what templates take; a list without calls, as clients write it, is none."""
    call = kept.pop("function_call", None)
    calls = tool_calls(kept.pop("tool_calls", []), f"{where}.tool_calls")
    if call and calls:
        raise RowProblem(f"{where}: function_call and tool_calls; keep one of them")
    if call:
        calls = function_calls(call, f"{where}.function_call")
    if calls:
        kept["tool_calls"] = calls


def _check_content(content: Any, message: Message, where: str, *, key: str = "content") -> None:
    if not isinstance(content, str):
        if content is None and not {"content", "value"} & message.keys():
            raise RowProblem(f"{where}: no content (there are {listed(message)}); write the text as content")
        raise RowProblem(f"{where}.{key}: {shown(content)} where text belongs; write it as text")
    if not content.isascii() and not is_unicode(content):
        raise RowProblem(f"{where}.{key}: {NO_CHARACTER}")


def _unknown_role(role: Any, message: Message) -> str:
    if role is None:
        return f"no role (there are {listed(message)}); write one of {', '.join(ROLES)}"
    near = next(iter(difflib.get_close_matches(str(role).lower(), [*ROLES, *OTHER_NAMES], n=1)), None)
    hint = f"did you mean {near}?" if near else f"write one of {', '.join(ROLES)}"
    return f"{shown(role)} is no role; {hint}"


def unusual_order(roles: list[str]) -> str | None:
    """What is odd about the order of the roles; None when it is system, then user and assistant in turn."""
    turns = roles[1:] if roles[0] in ("system", "developer") else roles
    if not turns or turns[-1] != "assistant":
        return f"ends with {roles[-1]}"
    if "system" in turns or "developer" in turns:
        return "a system message after the first message"
    if turns[0] != "user":
        return f"the first turn is {turns[0]}"
    for earlier, later in itertools.pairwise(turns):
        if later == "tool" and earlier not in ("assistant", "tool"):
            return f"tool follows {earlier}"
        if later == earlier and later in ("user", "assistant"):
            return f"{later} follows {earlier}"
        if (earlier, later) == ("tool", "user"):
            return "user follows tool"
    return None
