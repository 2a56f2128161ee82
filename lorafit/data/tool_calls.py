"""Tool calls and tool schemas, from every spelling of them to the one that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from lorafit.data.problems import NO_CHARACTER, RowProblem, is_unicode, listed, shown
from lorafit.data.rows import Message
from lorafit.data.strict_json import DECODER, json_problem

ToolCall = dict[str, Any]
Schema = dict[str, Any]

OTHER_NAMES_OF_ARGUMENTS = ("parameters", "args", "kwargs", "input")
EXAMPLE = '{"city": "Rome"}'
A_SCHEMA = '{"name": "weather", "parameters": {...}}'
A_CALL = f'{{"name": "weather", "arguments": {EXAMPLE}}}'


class Arguments(dict[str, Any]):
    """The arguments of a call that came as JSON text: as an object, and as they were written."""

    __slots__ = ("_text",)  # hidden from templates, for which `arguments.text` may be an argument

    def __init__(self, text: str, parsed: dict[str, Any]) -> None:
        self._text = text
        super().__init__(parsed)

    def as_text(self) -> str:
        """The text that the user wrote."""
        return self._text


def with_argument_text(messages: list[Message]) -> list[Message]:
    """The messages with the arguments of every call as JSON text, for templates that append them to a text.

    As the user wrote it, where it was text.
    """
    return [
        message | {"tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_text(call: ToolCall) -> ToolCall:
    if "function" in call:
        return call | {"function": _with_text(call["function"])}
    arguments = call["arguments"]
    text = arguments.as_text() if isinstance(arguments, Arguments) else json.dumps(arguments, ensure_ascii=False)
    return call | {"arguments": text}


def tool_calls(calls: Any, where: str) -> list[ToolCall]:
    """Tool calls with arguments as objects: templates print them with `tojson`, which would quote a text twice.

    Raises RowProblem.
    """
    if isinstance(calls, str) and calls.lstrip()[:1] in ("[", "{"):
        calls = parsed(calls, where)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise RowProblem(f"{where}: {shown(calls)} where a list of calls belongs; write [{A_CALL}]")
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def function_calls(calls: Any, where: str) -> list[ToolCall]:
    """The same from one `{"name": ..., "arguments": ...}`, a list of them, or the JSON text of either."""
    return [call if "function" in call else {"type": "function", "function": call} for call in tool_calls(calls, where)]


def _tool_call(call: Any, where: str) -> ToolCall:
    if isinstance(call, str) and call.lstrip().startswith("{"):
        call = parsed(call, where)
    if not isinstance(call, dict):
        raise RowProblem(f"{where}: {shown(call)} where a call belongs; write {A_CALL}")
    if call.get("function") is not None:
        return call | {"function": _tool_call(call["function"], f"{where}.function")}
    name = call.get("name")
    if not isinstance(name, str) or not name:
        what = f".name: {shown(name)}" if "name" in call else f": no name (there are {listed(call)})"
        raise RowProblem(f"{where}{what}; write the name of the tool as text")
    other = next((key for key in OTHER_NAMES_OF_ARGUMENTS if call.get(key) and not call.get("arguments")), None)
    if other:
        raise RowProblem(f"{where}.{other}: {shown(call[other])}, which nothing reads; name it arguments")
    _refuse_what_is_no_json({key: value for key, value in call.items() if key != "arguments"}, where)
    return call | {"arguments": _arguments(call.get("arguments"), f"{where}.arguments")}


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    """An object, whatever it came as; nothing in its many spellings is the empty object."""
    found = arguments
    if isinstance(arguments, str) and arguments.strip():
        found = parsed(arguments, where)
        if isinstance(found, dict):
            found = Arguments(arguments, found)
    if found is None or found == "" or found == [] or (isinstance(found, str) and not found.strip()):
        return {}
    if not isinstance(found, dict):
        raise RowProblem(f"{where}: {shown(arguments)} where an object belongs; write the arguments as {EXAMPLE}")
    _refuse_what_is_no_json(found, where)
    return found


def schemas(tools: Any, column: str) -> list[Schema] | None:
    """Tool schemas: a list, or the JSON text of one (as CSV and TRL have it), or a list of JSON texts.

    Raises RowProblem.
    """
    if isinstance(tools, str):
        tools = parsed(tools, column) if tools.strip() else None
    if not tools:
        return None
    if isinstance(tools, list):
        tools = [
            parsed(tool, f"{column}[{index}]") if isinstance(tool, str) and tool.lstrip().startswith("{") else tool
            for index, tool in enumerate(tools)
        ]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowProblem(f"{column}: {shown(tools)} where a list of schemas belongs; write [{{...}}]")
    for index, tool in enumerate(tools):
        if not isinstance(tool.get("function", {}), dict):
            function = shown(tool["function"])
            raise RowProblem(f"{column}[{index}].function: {function} where a schema belongs; write {A_SCHEMA}")
    _refuse_what_is_no_json(tools, column)
    return tools


def function_schemas(functions: Any, column: str) -> list[Schema] | None:
    """The schemas of OpenAI's older `functions`, as tools."""
    found = schemas(functions, column)
    return [{"type": "function", "function": function} for function in found] if found else None


def parsed(text: str, where: str) -> Any:
    """The value of a JSON text. Raises RowProblem."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        is_python = text.lstrip()[:2] in ("[{", "{'", "['")
        mend = "write it with json.dumps, not with str" if is_python and "'" in text else "write JSON"
        raise RowProblem(f"{where}: {shown(text)}: {json_problem(error)}; {mend}") from None


def _refuse_what_is_no_json(value: Any, where: str) -> None:
    """What a column of a Parquet file may hold and JSON cannot: templates would write `Infinity`, or fail."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except ValueError:
        raise RowProblem(f"{where}: holds a number that is not finite; write a number, null or text") from None
    except (TypeError, RecursionError) as error:
        what = "is nested too deeply" if isinstance(error, RecursionError) else f"is no JSON ({error})"
        raise RowProblem(f"{where}: {what}; write text, numbers, lists and objects") from None
    if not is_unicode(text):
        raise RowProblem(f"{where}: {NO_CHARACTER}")
