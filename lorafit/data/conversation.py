"""A list of messages, in either spelling, checked: roles, order, contents, tool calls."""

from __future__ import annotations

import difflib
import itertools
import json
from typing import Any

from lorafit.data.findings import Findings
from lorafit.data.marks import MARKS, is_left_out
from lorafit.data.problems import RowProblem, is_unicode, shown
from lorafit.data.rows import Message, Place

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
READ_KEYS = frozenset(
    ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "reasoning")
)


def conversation(
    messages: Any, column: str, place: Place, *, findings: Findings
) -> tuple[list[Message], frozenset[int]]:
    """The messages with `role` and `content`, and which of them are marked as not to be trained.

    What is odd but usable is counted. Raises RowProblem.
    """
    if not isinstance(messages, list):
        raise RowProblem(f"{column}: {shown(messages)} where a list of messages belongs")
    if not messages:
        raise RowProblem(f"{column}: an empty list; write at least one message, or remove the row")
    untrained = []
    checked = []
    for index, message in enumerate(messages):
        where = f"{column}[{index}]"
        read = _message(message, where, place, findings)
        if is_left_out(read, where):
            untrained.append(index)
        checked.append(read)
    oddity = unusual_order([message["role"] for message in checked])
    if oddity:
        findings.add("unusual_order", place, oddity)
    return checked, frozenset(untrained)


def _message(message: Any, where: str, place: Place, findings: Findings) -> Message:
    if not isinstance(message, dict):
        raise RowProblem(f"{where}: {shown(message)} where a message (an object) belongs")
    if "from" in message and "role" not in message:
        renamed = {"from": "role", "value": "content"}
        message = {renamed.get(key, key): value for key, value in message.items()}
        message["role"] = SHAREGPT_ROLES.get(message["role"], message["role"]) if message["role"] else None
    kept = {key: value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if role not in ROLES:
        raise RowProblem(f"{where}: {_unknown_role(role, kept)}", kind="unknown_role")
    content = kept.get("content")
    if "tool_calls" in kept:
        kept["tool_calls"] = _tool_calls(kept["tool_calls"], where)
    if not isinstance(content, str) and not (content is None and kept.get("tool_calls")):
        belongs = f"{where}.content: {shown(content)} where text belongs"
        raise RowProblem(f"{belongs}; write it as text")
    if content is not None and not content.isascii() and not is_unicode(content):
        raise RowProblem(f"{where}.content: holds half of a surrogate pair (\\ud800-\\udfff), which is no character")
    unread = [key for key in kept if key not in READ_KEYS and key not in MARKS]
    if unread:
        findings.add("unread_message_key", place, ", ".join(unread))
    return kept


def _unknown_role(role: Any, message: Message) -> str:
    if role is None:
        return f"no role (there are {', '.join(message) or 'no keys'}); write one of {', '.join(ROLES)}"
    near = {"model": "assistant", "bot": "assistant", "ai": "assistant", "function": "tool"}.get(str(role).lower())
    if near is None:
        near = next(iter(difflib.get_close_matches(str(role).lower(), ROLES, n=1)), None)
    hint = f"did you mean {near}?" if near else f"write one of {', '.join(ROLES)}"
    return f"{shown(role)} is no role; {hint}"


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with arguments as objects: templates print them with `tojson`, which would quote a text twice."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowProblem(f"{where}.tool_calls: {shown(calls)} where a list of calls belongs")
    return [_tool_call(call) for call in calls]


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _tool_call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return call
        if isinstance(parsed, dict):
            return {**call, "arguments": parsed}
    return call


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
