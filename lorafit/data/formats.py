"""One parsed row -> a Chat, Pair or Text, checked field by field.

The format is the recipe's, or the only one the columns fit; a row that fits two is refused, never guessed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from typing import Any, NamedTuple

from lorafit.data.conversation import conversation
from lorafit.data.findings import Findings
from lorafit.data.problems import RowProblem, is_unicode, listed, shown
from lorafit.data.rows import Chat, Pair, Place, Row, Text, possible_answers
from lorafit.recipe.sections import Source


class Fields(NamedTuple):
    """What a format reads from a row."""

    required: tuple[str, ...]
    optional: tuple[str, ...]


FORMATS = {
    "messages": Fields(("messages",), ("tools",)),
    "prompt_completion": Fields(("prompt", "completion"), ("system", "tools")),
    "alpaca": Fields(("instruction", "output"), ("input", "system")),
    "sharegpt": Fields(("conversations",), ("system", "tools")),
    "text": Fields(("text",), ()),
}


class Shaper:
    """Turns the rows of one source into ours, and remembers which columns nothing read."""

    def __init__(self, source: Source, findings: Findings) -> None:
        self._given = source.format
        self._columns = source.columns
        self._findings = findings
        self._format: str | None = source.format
        self._formats_by_keys: dict[tuple[str, ...], str | RowProblem] = {}
        self.unused: dict[str, None] = {}

    def shape(self, raw: Any, place: Place) -> Row | None:
        """The row, or None when it was reported as a finding."""
        try:
            if not isinstance(raw, dict):
                raise RowProblem(f"{shown(raw)} where a row (an object) belongs")
            keys = tuple(raw)
            known = self._formats_by_keys.get(keys)
            if isinstance(known, RowProblem):
                self._findings.add(known.kind, place, is_repeated=True)
                return None
            if known is None:
                known = self._format_of(keys)
                self._formats_by_keys[keys] = known
            return self._read(known, raw, place)
        except RowProblem as problem:
            self._findings.add(problem.kind, place, problem.message)
            return None

    @property
    def format(self) -> str:
        """The format the rows turned out to have."""
        return self._format or "unknown"

    def _format_of(self, keys: tuple[str, ...]) -> str:
        """The one format rows with these columns have; what is wrong with the columns is said once, then counted."""
        try:
            return self._only_format(keys)
        except RowProblem as problem:
            self._formats_by_keys[keys] = problem
            raise

    def _only_format(self, keys: tuple[str, ...]) -> str:
        fits = [self._given] if self._given else fitting_formats(keys, self._columns)
        if len(fits) > 1:
            raise RowProblem(
                f"the columns {listed(keys)} fit {' and '.join(fits)}; say which is meant with format:",
                kind="ambiguous",
            )
        if not fits:
            raise RowProblem(f"the columns {listed(keys)} fit no format; {_way_out(keys)}", kind="ambiguous")
        if self._format not in (None, fits[0]):
            raise RowProblem(
                f"this row is {fits[0]}, the rows before it are {self._format}; set format:, or keep them apart",
                kind="ambiguous",
            )
        self._format = fits[0]
        fields = FORMATS[fits[0]]
        missing = [name for name in fields.required if self._columns.get(name, name) not in keys]
        if missing:
            raise RowProblem(_missing(missing[0], self._columns.get(missing[0], missing[0]), keys))
        read = {self._columns.get(name, name) for name in fields.required + fields.optional}
        self.unused.update(dict.fromkeys(key for key in keys if key not in read))
        return fits[0]

    def _read(self, row_format: str, raw: dict[str, Any], place: Place) -> Row:
        if row_format == "text":
            return Text(place, self._text(raw, "text"))
        if row_format == "alpaca":
            return Pair(
                place,
                self._optional_text(raw, "system"),
                self._text(raw, "instruction"),
                self._optional_text(raw, "input"),
                self._text(raw, "output"),
            )
        if row_format == "prompt_completion":
            return self._prompt_completion(raw, place)
        field = "messages" if row_format == "messages" else "conversations"
        return self._chat(raw, place, self._column(raw, field), field)

    def _prompt_completion(self, raw: dict[str, Any], place: Place) -> Row:
        prompt, completion = self._column(raw, "prompt"), self._column(raw, "completion")
        if isinstance(prompt, list) or isinstance(completion, list):
            both = [
                [{"role": role, "content": part}] if isinstance(part, str) else part
                for role, part in (("user", prompt), ("assistant", completion))
            ]
            for part in both:
                if not isinstance(part, list):
                    raise RowProblem(f"{shown(part)} where text or a list of messages belongs")
            return self._chat(raw, place, both[0] + both[1], "prompt", first_answer=len(both[0]))
        system = self._optional_text(raw, "system")
        tools = self._tools(raw)
        pair = Pair(place, system, self._text(raw, "prompt"), "", self._text(raw, "completion"))
        if tools is None:
            return pair
        turns = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.completion}]
        return self._chat(raw, place, turns, "prompt")

    def _chat(self, raw: dict[str, Any], place: Place, messages: Any, field: str, *, first_answer: int = 0) -> Chat:
        system = "" if field == "messages" else self._optional_text(raw, "system")
        if system and isinstance(messages, list):
            messages = [{"role": "system", "content": system}, *messages]
            first_answer += 1
        checked, untrained = conversation(messages, self._columns.get(field, field), place, findings=self._findings)
        chat = Chat(place, checked, self._tools(raw), first_answer, untrained)
        for _ in untrained.intersection(possible_answers(chat)):
            self._findings.add("left_out", place)
        return chat

    def _tools(self, raw: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Tool schemas: a list, or the JSON text of one (as CSV and TRL have it)."""
        tools = raw.get(self._columns.get("tools", "tools"))
        if isinstance(tools, str) and tools.strip():
            try:
                tools = json.loads(tools)
            except ValueError as error:
                raise RowProblem(f"tools: {error}; write a JSON list of schemas") from None
        if not tools:
            return None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise RowProblem(f"tools: {shown(tools)} where a list of schemas belongs")
        return tools

    def _column(self, raw: dict[str, Any], field: str) -> Any:
        column = self._columns.get(field, field)
        if raw.get(column) is None:
            if column in raw:
                raise RowProblem(f"{column}: null where {_wanted(field)} belongs; fill it in or remove the row")
            raise RowProblem(_missing(field, column, raw))
        return raw[column]

    def _text(self, raw: dict[str, Any], field: str) -> str:
        value = raw.get(self._columns.get(field, field))
        if isinstance(value, str):
            if value.isascii() or is_unicode(value):
                return value
            raise RowProblem(f"{field}: holds half of a surrogate pair (\\ud800-\\udfff), which is no character")
        value = self._column(raw, field)
        column = self._columns.get(field, field)
        raise RowProblem(f"{column}: {shown(value)} where {_wanted(field)} belongs; write it as text")

    def _optional_text(self, raw: dict[str, Any], field: str) -> str:
        return "" if raw.get(self._columns.get(field, field)) is None else self._text(raw, field)


def fitting_formats(keys: Collection[str], columns: dict[str, str]) -> list[str]:
    """Formats all of whose required fields are there. Columns mapped in the recipe count under the field's name."""
    mapped = set(columns.values())
    there = {key for key in keys if key not in mapped} | {field for field in columns if columns[field] in keys}
    return [
        name
        for name, fields in FORMATS.items()
        if there.issuperset(fields.required) and set(columns) <= set(fields.required + fields.optional)
    ]


def _way_out(keys: Collection[str]) -> str:
    only = next(iter(keys)) if len(keys) == 1 else ""
    if ";" in only or "\t" in only:
        return "write the CSV with commas between its fields"
    columns = list(keys)
    example = f"columns: {{prompt: {columns[0]}, completion: {columns[1]}}}" if len(columns) > 1 else "columns:"
    return f"set format: and map them, e.g. format: prompt_completion, {example}"


def _missing(field: str, column: str, keys: Collection[str]) -> str:
    near = difflib.get_close_matches(column, list(keys), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    name = f"column {column}" if field == column else f"column {column} (for {field})"
    return f"no {name} (there are {listed(keys)}); {hint}map it with columns: {{{field}: ...}}"


def _wanted(field: str) -> str:
    return "a list of messages" if field in ("messages", "conversations") else "text"
