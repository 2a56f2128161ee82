"""One parsed row -> a Chat, Pair or Text, checked field by field.

The format is the recipe's, or the only one the columns fit; a row that fits two is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from lorafit.data.columns import (
    FORMATS,
    columns_of_other_things,
    familiar_columns,
    first_role,
    fitting_formats,
    in_braces,
    missing,
    no_format,
    pair_of_preference,
    preference_problem,
)
from lorafit.data.content import refuse_placeholders
from lorafit.data.conversation import conversation, listed_messages
from lorafit.data.findings import Findings
from lorafit.data.problems import NO_CHARACTER, RowProblem, is_unicode, listed, shown
from lorafit.data.row_marks import PREFERENCE, ROW_MARKS, TEMPLATE_KWARGS, refuse_mark
from lorafit.data.rows import Chat, Message, Pair, Place, Row, Text, as_chat, texts
from lorafit.data.tool_calls import Schema, function_schemas, parsed, schemas
from lorafit.data.trainable import is_trainable
from lorafit.recipe.sections import DataSection, Source

A_TURN = "write two texts, the question first"


class _Known(NamedTuple):
    """What rows with the same columns have in common."""

    format: str
    marks: tuple[str, ...]
    """Columns that may say what is learnt."""
    not_text: tuple[str, ...]


class Shaper:
    """Turns the rows of one source into ours, and remembers which columns nothing read."""

    def __init__(self, source: Source, findings: Findings, *, section: DataSection) -> None:
        self._given = source.format
        self._columns = source.columns
        self._findings = findings
        self._train_on = section.train_on
        self._template_kwargs = section.template_kwargs
        self._format: str | None = source.format
        self._known: dict[tuple[str, ...], _Known | RowProblem] = {}
        self._not_read: tuple[str, ...] = ()
        self._unused: dict[str, None] = {}

    def needed(self, columns: Iterable[str]) -> list[str]:
        """Those columns of a file that a row is made of or checked by: readers need not read the others."""
        names = list(columns)
        self._not_read = tuple(columns_of_other_things(names))
        fits = [name for name in fitting_formats(names, self._columns) if self._given in (None, name)]
        if len(fits) != 1:
            return [name for name in names if name not in self._not_read]
        fields = FORMATS[fits[0]]
        read = {self._columns.get(field, field) for field in fields.required + fields.optional} | ROW_MARKS
        read.update(pair_of_preference(names) or ())
        self._note_unused(names, fits[0])
        return [name for name in names if name in read]

    def shape(self, raw: Any, place: Place) -> Row | None:
        """The row, or None when it was reported as a finding."""
        try:
            if not isinstance(raw, dict):
                raise RowProblem(f"{shown(raw)} where a row (an object) belongs; write {{column: text, ...}}")
            keys = tuple(raw)
            known = self._known.get(keys)
            if isinstance(known, RowProblem):
                self._findings.add(known.kind, place, is_repeated=True)
                return None
            if known is None:
                known = self._look_at(raw, keys)
            for column in known.marks:
                refuse_mark(
                    column,
                    raw[column],
                    template_kwargs=self._template_kwargs,
                    has_own_format=self._given is not None,
                )
            row = self._read(known.format, raw, place)
            if known.not_text:
                there = [name for name in known.not_text if name not in raw or raw[name]]
                refuse_placeholders(texts(row), there) if there else None
        except RowProblem as problem:
            self._findings.add(problem.kind, place, problem.message)
            return None
        return row if is_trainable(row, self._findings, train_on=self._train_on) else None

    @property
    def format(self) -> str:
        """The format the rows turned out to have."""
        return self._format or "unknown"

    def _look_at(self, raw: dict[str, Any], keys: tuple[str, ...]) -> _Known:
        """What is common to rows with these columns; what is wrong with the columns is said once, then counted."""
        try:
            row_format = self._only_format(raw, keys)
        except RowProblem as problem:
            self._known[keys] = problem
            raise
        mapped = set(self._columns.values())
        # Beside text alone a label is mostly a class.
        may_mark = ROW_MARKS - PREFERENCE if row_format == "text" else ROW_MARKS
        marks = tuple(key for key in keys if key in may_mark and key not in mapped)
        not_text = tuple(dict.fromkeys((*columns_of_other_things(keys), *self._not_read)))
        known = self._known[keys] = _Known(row_format, marks, not_text)
        return known

    def _only_format(self, raw: dict[str, Any], keys: tuple[str, ...]) -> str:
        self._refuse_preference(raw, keys)
        fits = [self._given] if self._given else fitting_formats(keys, self._columns)
        if len(fits) > 1:
            raise RowProblem(
                f"the columns {listed(keys)} fit {' and '.join(fits)}; say which is meant with format:",
                kind="ambiguous",
            )
        if not fits:
            not_text = [name for name in columns_of_other_things(keys) if raw[name]] or self._not_read
            raise no_format(raw, not_text=not_text)
        if self._format not in (None, fits[0]):
            raise RowProblem(
                f"this row is {fits[0]}, the rows before it are {self._format}; set format:, or keep them apart",
                kind="ambiguous",
            )
        self._format = fits[0]
        absent = [name for name in FORMATS[fits[0]].required if self._columns.get(name, name) not in keys]
        pair = pair_of_preference(keys)
        if absent and pair:
            raise preference_problem(raw, *pair)
        if absent:
            found = familiar_columns(raw)
            mapping = in_braces(found["columns"]) if found.get("format") == fits[0] and not self._columns else ""
            raise RowProblem(missing(absent[0], self._columns.get(absent[0], absent[0]), keys, mapping=mapping))
        self._note_unused(keys, fits[0])
        return fits[0]

    def _refuse_preference(self, raw: dict[str, Any], keys: tuple[str, ...]) -> None:
        """Two answers to choose from are no rows to learn; that the better one is meant must be said."""
        pair = pair_of_preference(keys)
        mapped = self._columns.values()
        if pair and (pair[1] in mapped or not (self._given or pair[0] in mapped)):
            raise preference_problem(raw, *pair)

    def _note_unused(self, keys: Collection[str], row_format: str) -> None:
        fields = FORMATS[row_format]
        read = {self._columns.get(name, name) for name in fields.required + fields.optional} | TEMPLATE_KWARGS
        # Where the better answers are learnt nobody should map the worse ones.
        _, worse = pair_of_preference(keys) or ("", "")
        self._unused.update(dict.fromkeys(key for key in keys if key not in read and key != worse))

    def report_columns(self, place: Place) -> None:
        """Count what no row was made of."""
        not_text = columns_of_other_things(self._unused)
        unused = [name for name in self._unused if name not in not_text]
        if not_text:
            self._findings.add("not_learnt", place, listed(not_text))
        if unused:
            self._findings.add("unused_columns", place, listed(unused))

    def _read(self, row_format: str, raw: dict[str, Any], place: Place) -> Row:
        if row_format == "text":
            return Text(place, self._text(raw, "text"))
        if row_format == "alpaca":
            return self._pair(raw, place, prompt="instruction", completion="output")
        if row_format == "prompt_completion":
            return self._prompt_completion(raw, place)
        field = "messages" if row_format == "messages" else "conversations"
        return self._chat(raw, place, self._column(raw, field), field)

    def _pair(self, raw: dict[str, Any], place: Place, *, prompt: str, completion: str) -> Row:
        """A question and its answer; a conversation where there are earlier ones, or tools."""
        pair = Pair(
            place,
            self._optional_text(raw, "system"),
            self._text(raw, prompt),
            self._optional_text(raw, "input") if prompt == "instruction" else "",
            self._text(raw, completion),
        )
        earlier, tools = self._history(raw), self._tools(raw)
        if not earlier and tools is None:
            return pair
        messages = as_chat(pair).messages
        start = 1 if pair.system else 0
        return Chat(place, [*messages[:start], *earlier, *messages[start:]], tools, 0)

    def _history(self, raw: dict[str, Any]) -> list[Message]:
        """The earlier turns: pairs of a question and its answer."""
        column = self._columns.get("history", "history")
        history = raw.get(column)
        if isinstance(history, str):
            history = parsed(history, column) if history.strip() else None
        if history is None:
            return []
        if not isinstance(history, list):
            raise RowProblem(f"{column}: {shown(history)} where a list of [question, answer] belongs; {A_TURN}")
        turns: list[Message] = []
        for index, pair in enumerate(history):
            if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(_is_text(text) for text in pair)):
                raise RowProblem(f"{column}[{index}]: {shown(pair)} where [question, answer] belongs; {A_TURN}")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        return turns

    def _prompt_completion(self, raw: dict[str, Any], place: Place) -> Row:
        prompt, completion = self._column(raw, "prompt"), self._column(raw, "completion")
        if first_role(prompt) and first_role(completion):
            prompt, completion = (
                listed_messages(part, self._columns.get(name, name))
                for name, part in (("prompt", prompt), ("completion", completion))
            )
        if isinstance(prompt, list) or isinstance(completion, list):
            both = [
                [{"role": role, "content": part}] if isinstance(part, str) else part
                for role, part in (("user", prompt), ("assistant", completion))
            ]
            for name, part in zip(("prompt", "completion"), both, strict=True):
                if not isinstance(part, list):
                    column = self._columns.get(name, name)
                    raise RowProblem(f"{column}: {shown(part)} where a list of messages belongs; write it as text")
            if self._history(raw):
                column = self._columns.get("history", "history")
                raise RowProblem(f"{column}: stands beside a list of messages; write the earlier ones into it")
            return self._chat(raw, place, both[0] + both[1], "prompt", first_answer=len(both[0]))
        return self._pair(raw, place, prompt="prompt", completion="completion")

    def _chat(self, raw: dict[str, Any], place: Place, messages: Any, field: str, *, first_answer: int = 0) -> Chat:
        column = self._columns.get(field, field)
        checked, untrained = conversation(
            listed_messages(messages, column),
            column,
            place,
            findings=self._findings,
            first_answer=first_answer,
            is_all_trained=self._train_on == "all",
        )
        system = self._optional_text(raw, "system")
        if system and checked[0]["role"] in ("system", "developer"):
            if checked[0]["content"] != system:
                name = self._columns.get("system", "system")
                raise RowProblem(
                    f"{name}: {shown(system)}, but {column}[0] is a {checked[0]['role']} message of another text; "
                    "keep one of them"
                )
        elif system:
            checked = [{"role": "system", "content": system}, *checked]
            first_answer, untrained = first_answer + 1, frozenset(index + 1 for index in untrained)
        return Chat(place, checked, self._tools(raw), first_answer, untrained)

    def _tools(self, raw: dict[str, Any]) -> list[Schema] | None:
        """The schemas of `tools`, or of OpenAI's older `functions`."""
        names = [self._columns.get(field, field) for field in ("tools", "functions")]
        tools = schemas(raw.get(names[0]), names[0])
        functions = function_schemas(raw.get(names[1]), names[1])
        if tools and functions:
            raise RowProblem(f"{names[0]} and {names[1]} both hold schemas; keep one of them")
        return tools or functions

    def _column(self, raw: dict[str, Any], field: str) -> Any:
        column = self._columns.get(field, field)
        if raw.get(column) is None:
            if column in raw:
                raise RowProblem(f"{column}: null where {_wanted(field)} belongs; fill it in or remove the row")
            raise RowProblem(missing(field, column, raw))
        return raw[column]

    def _text(self, raw: dict[str, Any], field: str) -> str:
        value = raw.get(self._columns.get(field, field))
        if isinstance(value, str):
            if value.isascii() or is_unicode(value):
                return value
            raise RowProblem(f"{self._columns.get(field, field)}: {NO_CHARACTER}")
        value = self._column(raw, field)
        column = self._columns.get(field, field)
        raise RowProblem(f"{column}: {shown(value)} where {_wanted(field)} belongs; write it as text")

    def _optional_text(self, raw: dict[str, Any], field: str) -> str:
        return "" if raw.get(self._columns.get(field, field)) is None else self._text(raw, field)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_unicode(value)


def _wanted(field: str) -> str:
    return "a list of messages" if field in ("messages", "conversations") else "text"
