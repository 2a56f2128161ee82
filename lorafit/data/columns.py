"""Which format the columns of a row have, and what to write where that is not plain."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from lorafit.data.content import ONLY_TEXT, OTHER_THAN_TEXT
from lorafit.data.conversation import ROLES, role_of
from lorafit.data.problems import RowProblem, listed, shown
from lorafit.data.strict_json import DECODER

PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input", "user", "human")
COMPLETIONS = ("completion", "response", "output", "answer", "solution", "target", "answers", "assistant")
CONTEXTS = ("context", "input", "passage")
BETTER, WORSE = ("chosen", "accepted", "preferred"), ("reject", "dispreferred")
SYSTEMS = ("system_prompt", "system_message")
"""What well-known data sets call what our formats read; of each there is mostly one."""


class Fields(NamedTuple):
    """What a format reads from a row."""

    required: tuple[str, ...]
    optional: tuple[str, ...]


FORMATS = {
    "messages": Fields(("messages",), ("system", "tools", "functions")),
    "prompt_completion": Fields(("prompt", "completion"), ("system", "history", "tools", "functions")),
    "alpaca": Fields(("instruction", "output"), ("input", "system", "history", "tools", "functions")),
    "sharegpt": Fields(("conversations",), ("system", "tools", "functions")),
    "text": Fields(("text",), ()),
}


def fitting_formats(keys: Collection[str], columns: dict[str, str]) -> list[str]:
    """Formats all of whose required fields are there. Columns mapped in the recipe count under the field's name."""
    mapped = set(columns.values())
    there = {key for key in keys if key not in mapped} | {field for field in columns if columns[field] in keys}
    return [
        name
        for name, fields in FORMATS.items()
        if there.issuperset(fields.required) and set(columns) <= set(fields.required + fields.optional)
    ]


def missing(field: str, column: str, keys: Collection[str], *, mapping: str = "") -> str:
    """That the column is not there, and what to write: the mapping, if one is familiar."""
    near = difflib.get_close_matches(column, [key for key in keys if not key.lower().startswith(WORSE)], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    name = f"column {column}" if field == column else f"column {column} (for {field})"
    mend = f"write columns: {mapping}" if mapping else f"{hint}map it with columns: {{{field}: ...}}"
    return f"no {name} (there are {listed(keys)}); {mend}"


def familiar_columns(row: dict[str, Any]) -> dict[str, Any]:
    """`format` and `columns` for a row whose columns have names that many data sets use.

    Empty where they fit one format as they are, and where nothing is familiar or two columns could be meant.
    """
    fits = fitting_formats(row, {})
    structured = [name for name in fits if name != "text"]
    if fits:
        # Beside columns of their own, `text` mostly holds the same once more, laid out.
        return {"format": structured[0]} if len(structured) == 1 < len(fits) else {}
    if pair_of_preference(row):
        return {}
    chats = [name for name, value in row.items() if first_role(value)]
    if len(chats) == 1:
        return _mapping("messages", {"messages": chats[0]}, row)
    readable = {name.lower(): name for name in row if row[name] is None or isinstance(row[name], str) or name in chats}
    prompts = _named(PROMPTS, readable)
    if len(prompts) > 1:
        prompts = [name for name in prompts if name.lower() != "input"]
    completions = _named(COMPLETIONS, readable)
    if len(prompts) != 1 or len(completions) != 1:
        return _mapping("text", {"text": next(iter(row))}, row) if len(row) == len(readable) == 1 else {}
    context = next((name for name in _named(CONTEXTS, readable) if name not in prompts), None)
    if context:
        return _mapping("alpaca", {"instruction": prompts[0], "input": context, "output": completions[0]}, row)
    return _mapping("prompt_completion", {"prompt": prompts[0], "completion": completions[0]}, row)


def _named(names: Iterable[str], columns: dict[str, str]) -> list[str]:
    """The columns, by their names in small letters, that have one of the names."""
    return [columns[name] for name in names if name in columns]


def _mapping(row_format: str, columns: dict[str, str], row: dict[str, Any]) -> dict[str, Any]:
    """A source's `format` and `columns`, without those that have the format's own names."""
    system = next(iter(_named(SYSTEMS, {name.lower(): name for name in row})), None)
    named = columns | ({"system": system} if system and row_format != "text" else {})
    return {"format": row_format, "columns": {field: name for field, name in named.items() if field != name}}


def first_role(value: Any) -> str | None:
    """Who speaks first, if the value is a list of messages or the JSON text of one."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = DECODER.decode(value)
        except (ValueError, RecursionError):
            return None
    first = value[0] if isinstance(value, list) and value else None
    role = role_of(first) if isinstance(first, dict) else None
    return role if role in ROLES else None


def no_format(row: dict[str, Any], *, not_text: Collection[str]) -> RowProblem:
    """The columns of the row are those of no format: what to write in the recipe, or that nothing can be."""
    columns = f"the columns {listed(row)} fit no format"
    if not_text:
        columns += f", and {ONLY_TEXT}: {' and '.join(not_text)} would not be learnt"
    if "input_ids" in row:
        return RowProblem(f"{columns}; name rows with their text: tokens are made of it here", kind="ambiguous")
    only = next(iter(row)) if len(row) == 1 else ""
    if ";" in only or "\t" in only:
        return RowProblem(f"{columns}; write the CSV with commas between its fields", kind="ambiguous")
    found = familiar_columns(row)
    written = in_recipe(found) if found else "format: prompt_completion, columns: {prompt: ..., completion: ...}"
    how = "set format: and map them, e.g." if not not_text else "if the text is enough to learn from, write"
    other = "" if found else _what_is_no_text(row)
    return RowProblem(f"{columns}{other}; {how} {written}", kind="ambiguous")


def _what_is_no_text(row: dict[str, Any]) -> str:
    """Which of the familiar columns holds what no format reads."""
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f", and the objects of {name} have no role and content (there are {listed(value[0])})"
        if name.lower() in PROMPTS + COMPLETIONS and not isinstance(value, str):
            return f", and {name} is {shown(value)} where text belongs"
    return ""


def in_recipe(mapping: dict[str, Any]) -> str:
    """`format` and `columns` as they stand in a recipe."""
    columns = f", columns: {in_braces(mapping['columns'])}" if mapping["columns"] else ""
    return f"format: {mapping['format']}{columns}"


def in_braces(columns: dict[str, str]) -> str:
    """A mapping of columns on one line of YAML."""
    pairs = (f"{field}: {name if _PLAIN.fullmatch(name) else json.dumps(name)}" for field, name in columns.items())
    return f"{{{', '.join(pairs)}}}"


_PLAIN = re.compile(r"(?!(?:true|false|null)$)[a-zA-Z_][\w./ -]*[\w]|[a-zA-Z_]", re.ASCII | re.IGNORECASE)


def pair_of_preference(keys: Collection[str]) -> tuple[str, str] | None:
    """The columns of the better and of the worse answer; None where the data is no preference data."""
    chosen = min((key for key in keys if key.lower().startswith(BETTER)), key=len, default=None)
    rejected = min((key for key in keys if key.lower().startswith(WORSE)), key=len, default=None)
    return (chosen, rejected) if chosen and rejected else None


def preference_problem(row: dict[str, Any], chosen: str, rejected: str) -> RowProblem:
    """Why the row is not trained, and how to learn its better answer."""
    what = f"{chosen} and {rejected} make this preference data (task: preference), which lorafit does not train"
    return RowProblem(f"{what}; {_how_to_learn(row, chosen)}", kind="preference")


def _how_to_learn(row: dict[str, Any], chosen: str) -> str:
    answer = row[chosen]
    there = {name.lower(): name for name, value in row.items() if value is not None}
    speaker = first_role(answer)
    if speaker not in (None, "assistant"):
        return f"to learn the better answers, write {in_recipe(_mapping('messages', {'messages': chosen}, row))}"
    prompt = next(iter(_named(PROMPTS, there)), None)
    if isinstance(answer, dict) or (speaker and prompt is None):
        return f"to learn the better answers, write a column messages: the earlier messages, then {chosen}"
    if prompt is None:
        return f"to learn the better texts whole, write {in_recipe(_mapping('text', {'text': chosen}, row))}"
    context = next((name for name in _named(CONTEXTS, there) if name != prompt), None)
    mapping = (
        _mapping("alpaca", {"instruction": prompt, "input": context, "output": chosen}, row)
        if context
        else _mapping("prompt_completion", {"prompt": prompt, "completion": chosen}, row)
    )
    return f"to learn the better answers, write {in_recipe(mapping)}"


def columns_of_other_things(keys: Collection[str]) -> list[str]:
    """The columns that hold pictures, sounds or films."""
    return [key for key in keys if key in OTHER_THAN_TEXT]
