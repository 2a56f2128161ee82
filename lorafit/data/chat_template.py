"""A chat template compiled as transformers compiles it, in its sandbox, with the size of what it writes bounded."""

from __future__ import annotations

import copy
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _alias_reasoning_fields, _cached_compile_jinja_template

from lorafit.data.problems import RowProblem
from lorafit.data.rows import Message

LONGEST_TEXT = 10_000_000
"""Characters one row may be rendered to: 2.5 M tokens, beyond any `max_length`."""


class ChatTemplate:
    """Renders conversations to text exactly as `apply_chat_template(tokenize=False)` does."""

    def __init__(self, text: str, variables: dict[str, Any]) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        # transformers makes an environment for every call of this function, so this one can be narrowed further; not
        # with the text itself, since compiling computes constants before they can be bounded.
        environment = _cached_compile_jinja_template("").environment
        _bound(environment)
        self._template = environment.from_string(text)
        self._variables = {**self._template.globals, **variables, "documents": None}
        given = {"messages", "tools", "add_generation_prompt", *self._variables}
        self.reads = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(text)) - given)
        """Variables that the template looks for and nothing sets: what `template_kwargs` may set."""

    def with_variable(self, name: str, value: Any) -> ChatTemplate:
        """The same template with one variable set otherwise."""
        other = copy.copy(self)
        other._variables = {**self._variables, name: value}
        return other

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None, *, is_prompt: bool = False) -> str:
        """The conversation as text; as a prompt it ends where the assistant's answer begins.

        Raises RowProblem with what the template says.
        """
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
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise RowProblem(f"the template refuses this row: {error}", kind="refused") from None
        return "".join(pieces)


def _bound(environment: ImmutableSandboxedEnvironment) -> None:
    """Refuse what the sandbox allows but no template needs: `'a' * 10**9` took 18 s and a gigabyte."""

    def call_binop(context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and not (_is_number(left) and _is_number(right)):
            size, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if hasattr(size, "__len__") and isinstance(times, int) and len(size) * times > LONGEST_TEXT:
                raise jinja2.TemplateRuntimeError(f"it multiplies a text to {len(size) * times:,} characters")
        if operator == "**" and _is_number(right) and abs(right) > 1000:
            raise jinja2.TemplateRuntimeError(f"it raises a number to the power {right}")
        return ImmutableSandboxedEnvironment.call_binop(environment, context, operator, left, right)

    def call(context: Any, called: Any, *arguments: Any, **named: Any) -> Any:
        if any(isinstance(argument, int) and argument > LONGEST_TEXT for argument in arguments):
            raise jinja2.TemplateRuntimeError(f"it calls {called} with a number above {LONGEST_TEXT:,}")
        return ImmutableSandboxedEnvironment.call(environment, context, called, *arguments, **named)

    environment.intercepted_binops = frozenset(("*", "**"))
    environment.call_binop = call_binop  # type: ignore[method-assign]
    environment.call = call  # type: ignore[method-assign]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
