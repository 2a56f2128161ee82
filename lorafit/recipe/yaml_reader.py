"""YAML text -> plain values with the line and column of every key and value.

YAML 1.2 core scalars: `2e-4` is a number, `no` is text, `0o17` is fifteen. What makes two readers disagree about a
file is refused with its place: duplicate keys, anchors, tags, tabs in indentation, several documents. PyYAML (its C
parser where it was built) only splits the text into events; values are made here.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lorafit.errors import Problem, RecipeError

KeyPath = tuple[str | int, ...]
"""Where a value is: `("data", "train", 0, "path")`."""

MAX_BYTES = 1_000_000
MAX_DEPTH = 32

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_TAB_INDENT = re.compile(r"^ *\t[ \t]*[^\s#]", re.MULTILINE)

_INDENT = "this line is indented unlike its neighbours, or a quote or bracket before it is open"
_SYNTAX = (
    ("mapping values are not allowed", "a second `: ` in one value; put text with a colon in quotes"),
    ("could not find expected ':'", "a line without `key: value`, or an open quote"),
    ("',' or", "a bracket that is not closed, or a comma is missing in it"),
    ("unexpected end of stream", "a quote that is not closed"),
    ("did not find expected key", _INDENT),
    ("did not find expected '-' indicator", _INDENT),
    ("expected <block end>", _INDENT),
    ("cannot start any token", "text that starts with @, `, % or a comma needs quotes"),
    ("block sequence entries are not allowed", "a list entry (`- `) cannot stand here; put it on a line of its own"),
    ("<document start>", "text after the end of the recipe; a recipe is one mapping"),
    ("node content", "a bracket, comma or quote is out of place"),
    ("unknown escape character", "an unknown escape after \\; use single quotes for text with backslashes"),
)
"""Pieces of what the parsers say (the C one, the Python one) and what it means."""

_STARTS = ("could not find expected ':'", "',' or", "unexpected end of stream")
"""Where these are said, the parser has read on; the mistake is where it began."""


@dataclass(frozen=True)
class Spot:
    """A place in a file, both counted from 1."""

    line: int
    column: int


@dataclass
class Document:
    """One file's values, and where each key and value stands (list entries have only a value)."""

    value: Any = None
    keys: dict[KeyPath, Spot] = field(default_factory=dict)
    values: dict[KeyPath, Spot] = field(default_factory=dict)


def read_file(path: Path) -> Document:
    """The document in `path`. Raises RecipeError if it is not one mapping in a UTF-8 file of at most 1 MB."""
    document = parse(_text(path), name=str(path))
    if document.value is None:
        raise RecipeError("is empty; a recipe needs at least model.model_name_or_path and data.train", where=str(path))
    if not isinstance(document.value, dict):
        raise RecipeError("is not a mapping; a recipe is made of `key: value` lines", where=f"{path}:1")
    return document


def parse(text: str, *, name: str) -> Document:
    """The document in `text`; `name` stands in the errors. Raises RecipeError with every problem."""
    if found := _UNPRINTABLE.search(text):
        code = f"U+{ord(found[0]):04X}"
        raise RecipeError(_at(name, _spot_of(text, found.start()), f"the unprintable character {code}; delete it"))
    if found := _TAB_INDENT.search(text):
        spot = _spot_of(text, text.index("\t", found.start()))
        raise RecipeError(_at(name, spot, "a tab in the indentation; YAML is indented with spaces"))
    composer = _Composer(name)
    try:
        composer.compose(_events(text))
    except yaml.MarkedYAMLError as error:
        composer.problems.append(_syntax_problem(name, error))
    except _TooDeepError:
        pass
    if composer.problems:
        raise RecipeError(sorted(composer.problems, key=lambda problem: problem.line))
    return composer.document


def _syntax_problem(name: str, error: yaml.MarkedYAMLError) -> Problem:
    said = str(error.problem)
    began = any(piece in said for piece in _STARTS)
    mark = (error.context_mark if began else None) or error.problem_mark or error.context_mark
    meaning = next((words for piece, words in _SYNTAX if piece in said), None)
    return _at(
        name,
        Spot(mark.line + 1, mark.column + 1) if mark else Spot(1, 1),
        meaning or f"not YAML ({said}); check quotes and indentation",
    )


def plain_value(text: str) -> Any:
    """An unquoted scalar by the YAML 1.2 core schema. Raises ValueError for infinities, NaN and what overflows."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        whole = int(text, 0) if text[:2] in ("0o", "0x") else int(text) if len(text) < 100 else 2**63
        if abs(whole) >= 2**63:
            raise ValueError(f"{text[:20]}{'...' * (len(text) > 20)} is too large for a whole number")
        return whole
    if FLOAT.fullmatch(text):
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise ValueError(f"{text} is too large for a number")
        return number
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number; put it in quotes if text is meant")
    return text


def _text(path: Path) -> str:
    where = str(path)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise RecipeError("no such file", where=where) from None
    except OSError as error:
        raise RecipeError(f"cannot be read ({error.strerror})", where=where) from None
    if stat.S_ISDIR(status.st_mode):
        raise RecipeError("is a directory; give the recipe file in it", where=where)
    if not stat.S_ISREG(status.st_mode):
        raise RecipeError("is not a file (a pipe, socket or device); write the recipe to a file", where=where)
    if status.st_size > MAX_BYTES:
        raise RecipeError(f"has {status.st_size:,} bytes; a recipe has at most {MAX_BYTES:,}", where=where)
    if not os.access(path, os.R_OK):
        raise RecipeError("may not be read; check its permissions", where=where)
    raw = path.read_bytes()
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError("starts with a byte order mark; save it as UTF-8 without one", where=f"{where}:1")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"is not UTF-8 text (byte 0x{raw[error.start]:02x})", where=f"{where}:{line}") from None


def _events(text: str) -> Iterator[Any]:
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    return yaml.parse(text, Loader=loader)


def _spot_of(text: str, index: int) -> Spot:
    return Spot(text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index))


def _at(name: str, spot: Spot, message: str) -> Problem:
    return Problem(f"{name}:{spot.line}:{spot.column}", message, line=spot.line)


class _TooDeepError(Exception):
    """Stops the walk; the problem is already noted."""


class _Composer:
    """Builds the values of one document from parser events, and notes every problem on the way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.document = Document()
        self.problems: list[Problem] = []

    def compose(self, events: Iterator[Any]) -> None:
        seen = False
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if seen:
                    self._refuse(event, "a second document (`---`); a recipe is one document")
                    return
                seen = True
            elif isinstance(event, yaml.NodeEvent):
                self.document.value = self._value(event, events, ())

    def _refuse(self, event: Any, message: str) -> None:
        self.problems.append(_at(self.name, _start(event), message))

    def _value(self, event: Any, events: Iterator[Any], path: KeyPath) -> Any:
        self.document.values[path] = _start(event)
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, f"the alias *{event.anchor}; write the value out (or share it through `extends`)")
            return None
        if event.anchor is not None:
            self._refuse(event, f"the anchor &{event.anchor}; write values out (or share them through `extends`)")
        if event.tag is not None:
            self._refuse(event, f"the tag {_short_tag(event.tag)}; write the bare value, in quotes if it is text")
        if len(path) > MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH} levels")
            raise _TooDeepError
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(events, path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(events, path)
        return self._scalar(event)

    def _scalar(self, event: Any) -> Any:
        if found := _UNPRINTABLE.search(event.value):
            self._refuse(event, f"text with the unprintable character U+{ord(found[0]):04X}; leave it out")
        if not _is_plain(event):
            return event.value
        try:
            return plain_value(event.value)
        except ValueError as error:
            self._refuse(event, str(error))
            return None

    def _sequence(self, events: Iterator[Any], path: KeyPath) -> list[Any]:
        entries: list[Any] = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            entries.append(self._value(event, events, (*path, len(entries))))
        return entries

    def _mapping(self, events: Iterator[Any], path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self._key(event, events, path)
            at = (*path, key)
            if key in mapping:
                self._refuse(event, f"the key {key} again (first on line {self.document.keys[at].line}); keep one")
            else:
                self.document.keys[at] = _start(event)
            value = self._value(next(events), events, at)
            mapping.setdefault(key, value)
        return mapping

    def _key(self, event: Any, events: Iterator[Any], path: KeyPath) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            self._value(event, events, (*path, "?"))
            self._refuse(event, "a key that is not text; write `key: value`")
            return f"<key on line {_start(event).line}>"
        if event.anchor is not None or event.tag is not None:
            self._refuse(event, "an anchor or tag on a key; write the bare key")
        key = event.value
        if _is_plain(event) and key == "<<":
            self._refuse(event, "the merge key <<; write the values out (or share them through `extends`)")
        elif _is_plain(event) and (_INT.fullmatch(key) or FLOAT.fullmatch(key) or key in _BOOL or key in _NULL):
            self._refuse(event, f'the key {key or "(nothing)"} is not text; write it in quotes: "{key}"')
        return str(key)


def _start(event: Any) -> Spot:
    return Spot(event.start_mark.line + 1, event.start_mark.column + 1)


def _is_plain(event: Any) -> bool:
    return not event.style  # the C parser says "", the Python one None


def _short_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")
