"""A chat template compiled as transformers compiles it, in its sandbox, with the size of what it writes bounded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import _alias_reasoning_fields, _cached_compile_jinja_template

from lorafit.data.jinja_bounds import LONGEST_TEXT, TooCostlyError, bound
from lorafit.data.problems import RowProblem
from lorafit.data.rows import Message
from lorafit.data.template_text import GIVEN, variables_read
from lorafit.errors import DataError

CAUSED_BY_TEMPLATES = (
    jinja2.TemplateError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
)
LONGEST_MESSAGE = 300


class ChatTemplate:
    """Renders conversations to text exactly as `apply_chat_template(tokenize=False)` does."""

    def __init__(self, text: str, variables: Mapping[str, Any], *, settled: frozenset[str] = frozenset()) -> None:
        """`settled` are variables that the text itself gives a value, so that nobody is told to set them.

        Raises jinja2.TemplateSyntaxError, also for what is nested deeper than Python can follow.
        """
        # transformers makes an environment for every call of this function, so this one can be narrowed further; not
        # with the text itself, since compiling computes constants before they can be bounded.
        environment = _cached_compile_jinja_template("").environment
        self._budget = bound(environment)
        try:
            self._template = environment.from_string(text)
        except (RecursionError, MemoryError, SyntaxError):
            raise jinja2.TemplateSyntaxError("it is nested too deeply", lineno=1) from None
        self._variables = {**self._template.globals, **variables, "documents": None}
        given = {*GIVEN, *self._variables, *settled}
        self.reads = frozenset(variables_read(text) - given)
        """Variables that the template looks for and nothing sets: what `template_kwargs` may set."""

    def with_variable(self, name: str, value: Any) -> ChatTemplate:
        """The same template with one variable set otherwise."""
        other = copy.copy(self)
        other._variables = {**self._variables, name: value}
        return other

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None, *, is_prompt: bool = False) -> str:
        """The conversation as text; as a prompt it ends where the assistant's answer begins.

        Raises RowProblem with what the template says, DataError for a template that does not end.
        """
        self._budget.renew()
        try:
            pieces, length = [], 0
            row = {"messages": _alias_reasoning_fields(messages), "tools": tools, "add_generation_prompt": is_prompt}
            # What `Template.generate` does, without copying every global for every row: half of the time of a render.
            context = self._template.new_context({**self._variables, **row}, shared=True)
            for piece in self._template.root_render_func(context):
                pieces.append(piece)
                length += len(piece)
                if length > LONGEST_TEXT:
                    raise jinja2.TemplateRuntimeError(f"it writes more than {LONGEST_TEXT:,} characters")
        except TooCostlyError as error:
            raise DataError(f"{error}; use another data.template", where="the chat template") from None
        except (RecursionError, MemoryError):
            raise RowProblem("the template refuses this row: it calls itself without end", kind="refused") from None
        except CAUSED_BY_TEMPLATES as error:
            message = " ".join(str(error).split())[:LONGEST_MESSAGE]
            raise RowProblem(f"the template refuses this row: {message}", kind="refused") from None
        return "".join(pieces)
