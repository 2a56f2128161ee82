"""What can be told of a chat template, and written into it, from its text alone: no torch, no transformers."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorafit.data.jinja_bounds import bound
from lorafit.recipe.suggest import nearest

GIVEN = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
"""What is handed to every template; no recipe sets it."""


class _Generation(Extension):
    """The tag with which transformers marks what the assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def variables_read(text: str) -> frozenset[str]:
    """Variables that the template looks for and does not set itself. Raises jinja2.TemplateSyntaxError."""
    environment = _environment()
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(text)))
    except (RecursionError, MemoryError):
        raise jinja2.TemplateSyntaxError("it is nested too deeply", lineno=1) from None


def unread_variables(variables: Mapping[str, Any], templates: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The variables that none of the templates reads, each with a message that says so. Raises TemplateSyntaxError."""
    known = frozenset().union(*map(variables_read, templates)) - GIVEN
    for name in variables:
        if name not in known:
            guess = nearest(name, known)
            reads = f"it reads {', '.join(sorted(known))}" if known else "it reads no variables"
            yield name, f"the chat template never reads it; {f'did you mean {guess}?' if guess else reads}"


def baked(text: str, variables: Mapping[str, Any], *, always: Collection[str] = ()) -> str:
    """The template with these values for variables that it is not given, or that are in `always`.

    Every line ends where the environment of chat templates drops the line break after a tag (`trim_blocks`), so that
    the text goes on as at its start, whatever white space it begins with.
    """
    lines = []
    for name, value in variables.items():
        setting = f"{{% set {name} = {_literal(value)} %}}"
        lines.append(setting if name in always else f"{{% if {name} is not defined %}}{setting}{{% endif %}}")
    head = "".join(f"{line}\n" for line in lines)
    return text if text.startswith(head) else head + text


def _literal(value: Any) -> str:
    """The value as Jinja writes it."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case str():
            return quoted(value)
        case Mapping():
            return "{" + ", ".join(f"{_literal(key)}: {_literal(one)}" for key, one in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)


def quoted(text: str) -> str:
    """A Jinja text, which is read as one of Python's."""
    escaped = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"}
    return '"' + "".join(escaped.get(letter, letter) for letter in text) + '"'


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    bound(environment)
    return environment
