"""Bounds on what a Jinja template may cost: its steps, its seconds, and the size of every value that it makes.

The sandbox keeps a template from reaching the machine, not from filling it: a text that is doubled in a loop, a list
that holds itself twice, nested loops that write nothing. A value can only grow by being kept and used again, so what is
kept is measured (assignments, arguments, captured blocks); and what multiplies within one expression is looked at
before it is done (`*`, `replace`, `join`, widths). Steps are counted where a block begins: bodies of loops and macros.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

from jinja2 import TemplateRuntimeError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST_TEXT = 10_000_000
"""Characters one row may be rendered to: 2.5 M tokens, beyond any `max_length`."""
MOST_STEPS = 5_000_000
"""A few seconds of loops; a conversation of a thousand messages needs some ten thousand."""
MOST_SECONDS = 30.0
"""For one row. Only steps that each take long come here first."""
MOST_BITS = 100_000
"""Of a whole number; doubling one in a loop costs as much as doubling a text."""
LONGEST_SLOW_TEXT = 1_000_000
"""For filters that no chat template needs and whose work grows faster than the text."""
STEPS_BETWEEN_LOOKS = 64
"""Looking at the clock costs as much as a step."""
NEVER_GROW = (nodes.Const, nodes.Compare, nodes.Not, nodes.Test, nodes.Getattr, nodes.Getitem, nodes.Name)
"""Expressions whose value is no larger than one that was there before; so with those below when their parts are."""
ONLY_CHOOSE = (
    *("count", "first", "last", "length", "list", "max", "min", "reject", "rejectattr", "reverse", "select"),
    *("selectattr", "trim"),
)
TEXTS = (str, bytes)
METHODS = (BuiltinMethodType, MethodType)
OF_EVERY_DICT = frozenset(dir(dict))
SEQUENCES = (list, tuple, set, frozenset)


class TooCostlyError(Exception):
    """A template that would not end in any time worth waiting for, whatever the row."""


class Budget:
    """What is left of the steps and the time of one rendering."""

    def __init__(self) -> None:
        self._looks = 0
        self._end: float | None = None
        self.step: Callable[[], None] = chain.from_iterable(self._looked()).__next__
        """Take one step: without a frame of Python, since it is the one thing that is done all the time.

        Raises TooCostlyError.
        """

    def renew(self) -> None:
        """Begin another rendering."""
        self._looks = MOST_STEPS // STEPS_BETWEEN_LOOKS
        self._end = None

    def _looked(self) -> Iterator[Iterator[None]]:
        while self._looks:
            self._looks -= 1
            now = time.monotonic()
            self._end = self._end or now + MOST_SECONDS
            if now > self._end:
                raise TooCostlyError(f"takes more than {MOST_SECONDS:.0f} seconds for one row")
            yield repeat(None, STEPS_BETWEEN_LOOKS)
        raise TooCostlyError(f"takes more than {MOST_STEPS:,} steps for one row")


def bound(environment: ImmutableSandboxedEnvironment) -> Budget:
    """Refuse in this environment what the sandbox allows but no template needs; renew what it gives for every row.

    Raises jinja2.TemplateRuntimeError, in rendering and in compiling, which computes constants.
    """
    budget = Budget()
    environment.code_generator_class = _BoundedCode
    environment.intercepted_binops = frozenset(("*", "**", "%"))
    environment.extend(step=budget.step, measure=_measure, pieces=_Pieces)
    environment.call_binop = functools.partial(_call_binop, environment)  # type: ignore[method-assign]
    environment.call = functools.partial(_call, environment)  # type: ignore[method-assign]
    environment.getattr = functools.partial(_getattr, environment)  # type: ignore[method-assign]
    environment.globals.pop("lipsum", None)
    for name, look in _FILTERS.items():
        environment.filters[name] = _looked_at(environment.filters[name], look)
    environment.filters["map"] = _bounded_map(environment.filters["map"])
    budget.renew()
    return budget


class _BoundedCode(CodeGenerator):
    """Code that counts its steps and measures what it keeps."""

    _repeated: frozenset[int] = frozenset()

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        self._repeated |= {id(node.body)}
        super().visit_For(node, frame)

    def macro_body(self, node: Any, frame: Frame) -> Any:
        self._repeated |= {id(node.body)}
        return super().macro_body(node, frame)

    def buffer(self, frame: Frame) -> None:
        frame.buffer = self.temporary_identifier()
        self.writeline(f"{frame.buffer} = environment.pieces()")

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        if id(nodes) in self._repeated:
            self.writeline("environment.step()")
        super().blockvisit(nodes, frame)

    def visit_Assign(self, node: nodes.Assign, frame: Frame) -> None:
        super().visit_Assign(node, frame)
        self._measure_kept(node.target, node.node, frame)

    def visit_With(self, node: nodes.With, frame: Frame) -> None:
        inner = frame.inner()
        inner.symbols.analyze_node(node)
        self.enter_frame(inner)
        for target, value in zip(node.targets, node.values, strict=True):
            self.newline()
            self.visit(target, inner)
            self.write(" = ")
            self.visit(value, frame)
            self._measure_kept(target, value, inner)
        self.blockvisit(node.body, inner)
        self.leave_frame(inner)

    def _measure_kept(self, target: nodes.Node, value: nodes.Node, frame: Frame) -> None:
        if _never_grows(value):
            return
        for kept in (target, *target.find_all((nodes.Name, nodes.NSRef))):
            if isinstance(kept, nodes.Name):
                self.writeline(f"environment.measure({frame.symbols.ref(kept.name)})")
            elif isinstance(kept, nodes.NSRef):
                self.writeline(f"environment.measure(getattr({frame.symbols.ref(kept.name)}, {kept.attr!r}))")


class _Pieces(list[str]):
    """What a macro or a captured block has written so far."""

    def __init__(self) -> None:
        super().__init__()
        self._left = LONGEST_TEXT

    def append(self, piece: str) -> None:
        self._left -= len(piece)
        if self._left < 0:
            _refuse(f"it writes more than {LONGEST_TEXT:,} characters into a macro or a variable")
        super().append(piece)

    def extend(self, pieces: Iterable[str]) -> None:
        for piece in pieces:
            self.append(piece)


def _never_grows(value: nodes.Node | None) -> bool:
    match value:
        case nodes.Filter():
            return value.name in ONLY_CHOOSE and _never_grows(value.node)
        case nodes.CondExpr():
            return _never_grows(value.expr1) and (value.expr2 is None or _never_grows(value.expr2))
        case nodes.And() | nodes.Or():
            return _never_grows(value.left) and _never_grows(value.right)
    return isinstance(value, NEVER_GROW)


def _measure(value: Any) -> None:
    if type(value) is str:
        if len(value) > LONGEST_TEXT:
            _refuse(f"it makes a text of {len(value):,} characters")
    else:
        _size(value)


def _size(value: Any) -> int:
    """Characters of the value when it is written out, about. Raises TemplateRuntimeError for what is too large.

    What is held twice counts twice: a list that holds another twice, which holds another twice, is small in memory.
    """
    size, left = 0, [value]
    while left:
        item = left.pop()
        size += 1
        if isinstance(item, TEXTS):
            size += len(item)
        elif isinstance(item, dict):
            left += item.values()
            left += item
        elif isinstance(item, SEQUENCES):
            left += item
        elif isinstance(item, range):
            size += len(item)
        elif type(item) is int and item.bit_length() > MOST_BITS:
            _refuse(f"it makes a number of {item.bit_length():,} bits")
        if size + len(left) > LONGEST_TEXT:
            _refuse(f"it makes a value of more than {LONGEST_TEXT:,} characters")
    return size


def _refuse(what: str) -> None:
    raise TemplateRuntimeError(what)


def _refuse_longer(characters: int, doing: str) -> None:
    if characters > LONGEST_TEXT:
        _refuse(f"it {doing} a text to {characters:,} characters")


def _call_binop(environment: ImmutableSandboxedEnvironment, _: Any, operator: str, left: Any, right: Any) -> Any:
    if operator == "%":
        if isinstance(left, TEXTS):
            _look_at_format(left, right)
    elif operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > MOST_BITS:
                _refuse("it multiplies numbers without end")
        elif isinstance(left, int) or isinstance(right, int):
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if not isinstance(value, float):
                _refuse_longer((len(value) if isinstance(value, TEXTS) else _size(value)) * times, "multiplies")
    elif isinstance(right, int):
        bits = left.bit_length() if isinstance(left, int) else 1
        if bits * abs(right) > MOST_BITS:
            _refuse(f"it raises a number to the power {right}")
    return environment.binop_table[operator](left, right)


def _getattr(environment: ImmutableSandboxedEnvironment, value: Any, name: str) -> Any:
    """What the sandbox gives. It tries the attribute first; for the keys of messages that is most of a rendering."""
    if type(value) is dict and name not in OF_EVERY_DICT:
        return value[name] if name in value else environment.undefined(obj=value, name=name)
    return ImmutableSandboxedEnvironment.getattr(environment, value, name)


def _call(
    environment: ImmutableSandboxedEnvironment, context: Any, called: Any, /, *arguments: Any, **named: Any
) -> Any:
    for argument in arguments:
        if type(argument) is not str or len(argument) > LONGEST_TEXT:
            _measure(argument)
            if isinstance(argument, int) and argument > LONGEST_TEXT:
                _refuse(f"it calls a function with a number above {LONGEST_TEXT:,}")
    for name, argument in named.items():
        if name != "_loop_vars" and name != "_block_vars":
            _measure(argument)
    if isinstance(called, METHODS):
        if called.__name__ in _METHODS and isinstance(called.__self__, TEXTS):
            if called.__name__ == "join":
                arguments = tuple(map(list, arguments))  # what a generator holds can be looked at only once
            _METHODS[called.__name__](called.__self__, *arguments, *named.values())
    elif isinstance(called, FunctionType) and called.__name__ in ("format", "format_map"):
        _look_at_format(called.__wrapped__.__self__, (arguments, named))  # type: ignore[attr-defined]
    return ImmutableSandboxedEnvironment.call(environment, context, called, *arguments, **named)


def _look_at_method_join(separator: Any, pieces: Any = (), *_: Any) -> None:
    _look_at_join(pieces, separator)


def _look_at_translate(text: Any, table: Any = (), *_: Any) -> None:
    _refuse_longer(len(text) * _size(table), "translates")


def _look_at_tabs(text: Any, width: Any = 8, *_: Any) -> None:
    _refuse_longer(len(text) * (width if isinstance(width, int) else 8), "expands")


def _look_at_format(pattern: Any, values: Any) -> None:
    """What `%` and `format` would make: every width, and every value wherever it may be named."""
    text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
    has_widths_of_values = "*" in text or re.search(r"{[^}]*{", text)
    numbers = [abs(number) for number in _flat(values) if isinstance(number, int)] if has_widths_of_values else []
    widths = [int(digits[:12]) for digits in re.findall(r"\d+", text)]
    places = text.count("%") + text.count("{")
    _refuse_longer(sum(widths) + places * (sum(numbers) + _size(values)) + len(text), "formats")


def _flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return [one for value in values.values() for one in _flat(value)]
    return [one for value in values for one in _flat(value)] if isinstance(values, SEQUENCES) else [values]


def _look_at_replace(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    text, old, new = (one if isinstance(one, TEXTS) else str(one) for one in (text, old, new))
    if len(new) > len(old) and type(text) is type(old):
        _refuse_longer(len(text) + text.count(old) * (len(new) - len(old)), "lengthens")


def _look_at_join(pieces: Any, separator: Any = "", *_: Any) -> None:
    if isinstance(pieces, (*SEQUENCES, dict)):
        between = separator if isinstance(separator, TEXTS) else str(separator)
        _refuse_longer(_size(pieces) + len(pieces) * len(between), "joins")


def _look_at_width(text: Any, width: Any = 0, *_: Any) -> None:
    """Every line, or the text, may grow by the width: a number of characters, or the characters themselves."""
    each = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
    _refuse_longer((str(text).count("\n") + 1) * each, "widens")


def _look_at_wrapping(text: Any, *more: Any) -> None:
    _refuse_longer(len(str(text)) * (1 + sum(len(one) for one in more if isinstance(one, str))), "wraps")


def _look_at_number(_: Any, *more: Any) -> None:
    if any(isinstance(one, int) and abs(one) > MOST_BITS for one in more):
        _refuse(f"it asks for more than {MOST_BITS:,} parts or digits")


def _look_at_sum(values: Any, *more: Any) -> None:
    """A list is copied for every one that is added to it."""
    if any(isinstance(one, SEQUENCES) for one in more):
        _refuse_longer(_size(values) * len(values), "adds")


def _look_at_slow(value: Any, *_: Any) -> None:
    if _size(value) > LONGEST_SLOW_TEXT:
        _refuse(f"it has a filter work on more than {LONGEST_SLOW_TEXT:,} characters")


def _look_at_filled(pattern: Any, *values: Any) -> None:
    _look_at_format(str(pattern), values)


def _look_at_json(_: Any, *layout: Any) -> None:
    if layout and any((isinstance(one, int) and one > 100) or _size(one) > 100 for one in layout):
        _refuse("it lays out JSON with more than 100 characters")


def _looked_at(filter_: Callable[..., Any], look: Callable[..., None]) -> Callable[..., Any]:
    """The filter, once its arguments have been looked at."""
    # Some filters are given the environment or the context first.
    first = 1 if "jinja_pass_arg" in vars(filter_) else 0
    takes_many = look in (_look_at_join, _look_at_sum)

    @functools.wraps(filter_)
    def looked_at(*arguments: Any, **named: Any) -> Any:
        if takes_many and len(arguments) > first and not isinstance(arguments[first], (list, *TEXTS)):
            # What a generator holds can be looked at only once.
            arguments = (*arguments[:first], list(arguments[first]), *arguments[first + 1 :])
        look(*arguments[first:], *named.values())
        return filter_(*arguments, **named)

    return looked_at


def _bounded_map(map_: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The one filter that makes new values as they are asked for."""

    @functools.wraps(map_)
    def bounded_map(*arguments: Any, **named: Any) -> Iterator[Any]:
        size = 0
        for item in map_(*arguments, **named):
            size += _size(item)
            _refuse_longer(size, "maps")
            yield item

    return bounded_map


_METHODS: dict[str, Callable[..., None]] = {
    "expandtabs": _look_at_tabs,
    "join": _look_at_method_join,
    "replace": _look_at_replace,
    "translate": _look_at_translate,
}
_FILTERS: dict[str, Callable[..., None]] = {
    "batch": _look_at_number,
    "center": _look_at_width,
    "format": _look_at_filled,
    "indent": _look_at_width,
    "join": _look_at_join,
    "pprint": _look_at_slow,
    "replace": _look_at_replace,
    "round": _look_at_number,
    "slice": _look_at_number,
    "striptags": _look_at_slow,
    "sum": _look_at_sum,
    "tojson": _look_at_json,
    "urlize": _look_at_wrapping,
    "wordwrap": _look_at_wrapping,
    "xmlattr": _look_at_wrapping,
}
"""Filters that may write more than they are given, or do more work than their input is long."""
