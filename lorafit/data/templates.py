"""Where a recipe's template comes from: the tokenizer, a file, or the Alpaca layout; and what is saved of it."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from lorafit.builders.template_files import DEFAULT, NO_TEMPLATE, chosen, several
from lorafit.data.chat_template import ChatTemplate
from lorafit.data.template_text import baked, quoted, unread_variables
from lorafit.data.tokens import opening_ids
from lorafit.errors import DataError, ModelError, Problem, RecipeError
from lorafit.recipe.paths import NAMED_TEMPLATE, TEMPLATES
from lorafit.recipe.sections import DataSection

TOOL_USE = "tool_use"
"""The template that transformers takes for tools, where a tokenizer has one of this name."""
# The layout Stanford Alpaca models are trained and prompted with.
ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_WITH_INPUT = f"{ALPACA_TASK}, paired with an input that provides further context. "
ALPACA_ALONE = f"{ALPACA_TASK}. "
ALPACA_INPUT = "\n\n### Input:\n"
"""Between an instruction and what it works on: in the saved template both are the text of one user's message."""
ALPACA_REQUEST = "Write a response that appropriately completes the request.\n\n"


class Templates:
    """The recipe's templates, each compiled once: what is rendered with is, to the letter, what is saved."""

    def __init__(self, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises RecipeError for a file that cannot be read and for variables that no template reads."""
        self._section = section
        self._special: dict[str, str] = tokenizer.special_tokens_map
        self._compiled: dict[str, ChatTemplate] = {}
        found = _found(section, tokenizer)
        self.saved = {name: _baked(text, section, tokenizer) for name, text in found.items()}
        """Name -> text of what goes with the adapter; empty where rows are laid out without Jinja, or there is none."""
        if section.template_kwargs and found:
            self._refuse_unread(found)

    def of(self, *, has_tools: bool) -> ChatTemplate:
        """The template of a row. Raises ModelError where there is none, DataError for one that is no Jinja."""
        if not self.saved:
            raise ModelError(NO_TEMPLATE, where="data.template: chat")
        name = TOOL_USE if has_tools and TOOL_USE in self.saved else DEFAULT
        if name not in self.saved:
            raise ModelError(several(self.saved), where="data.template: chat")
        if name not in self._compiled:
            settled = frozenset(self._section.template_kwargs)
            try:
                self._compiled[name] = ChatTemplate(self.saved[name], self._special, settled=settled)
            except jinja2.TemplateSyntaxError as error:
                raise self._no_jinja(error, lines_before=len(settled)) from None
        return self._compiled[name]

    def _refuse_unread(self, found: dict[str, str]) -> None:
        try:
            unread = list(unread_variables(self._section.template_kwargs, found.values()))
        except jinja2.TemplateSyntaxError as error:
            raise self._no_jinja(error) from None
        if unread:
            raise RecipeError([Problem(f"data.template_kwargs.{name}", message) for name, message in unread])

    def _no_jinja(self, error: jinja2.TemplateSyntaxError, *, lines_before: int = 0) -> DataError:
        is_file = _is_file(self._section)
        where = (
            f"{self._section.template}:{error.lineno - lines_before}" if is_file else "the tokenizer's chat template"
        )
        return DataError(f"{error.message}; mend the template", where=where)


def _is_file(section: DataSection) -> bool:
    return section.template not in TEMPLATES and not section.template.startswith(NAMED_TEMPLATE)


def _found(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The templates as they were written, by name. Raises RecipeError and ModelError."""
    if section.template in ("alpaca", "plain"):
        return {}
    if _is_file(section):
        return {DEFAULT: _read_template(Path(section.template))}
    own = tokenizer.chat_template
    named = dict(own) if isinstance(own, dict) else {DEFAULT: own} if own else {}
    return chosen(section.template, named)


def _baked(text: str, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> str:
    # Whoever renders hands over the tokenizer's special tokens, so that these would never be undefined.
    return baked(text, section.template_kwargs, always=tokenizer.special_tokens_map)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else os.strerror(error.errno or 0).lower()
        raise RecipeError(
            f"{path}: {what}; write {', '.join(TEMPLATES)} or the path of a Jinja file", where="data.template"
        ) from None


def alpaca_prompt(instruction: str, context: str) -> str:
    """The prompt of the Alpaca layout, up to where the answer starts."""
    if context:
        head = f"{ALPACA_WITH_INPUT}{ALPACA_REQUEST}### Instruction:\n{instruction}{ALPACA_INPUT}{context}"
    else:
        head = f"{ALPACA_ALONE}{ALPACA_REQUEST}### Instruction:\n{instruction}"
    return f"{head}\n\n### Response:\n"


def saved_chat_template(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str] | None:
    """The chat template that goes with the adapter, so that whoever loads it prompts it as it was trained.

    The tokenizer's own for `chat`, or the file's text, each with the recipe's variables in it; the Alpaca layout as a
    template. `plain` lays out no turns, so the tokenizer's own stays. Raises RecipeError when the file cannot be read.
    """
    if section.template == "alpaca":
        return _alpaca_template(tokenizer)
    if section.template == "plain":
        return tokenizer.chat_template
    saved = Templates(section, tokenizer).saved
    return saved[DEFAULT] if list(saved) == [DEFAULT] else saved or None


def _alpaca_template(tokenizer: PreTrainedTokenizerBase) -> str:
    opening = quoted("".join(tokenizer.convert_ids_to_tokens(opening_ids(tokenizer))))
    alone, with_input = (alpaca_prompt("\0", context).partition("\0")[0] for context in ("", "\0"))
    end = alpaca_prompt("\0", "").partition("\0")[2]
    return (
        f"{{{{- {opening} }}}}"
        "{%- for message in messages %}{%- if message.role == 'user' %}"
        f"{{{{- {quoted(with_input)} if {quoted(ALPACA_INPUT)} in message.content else {quoted(alone)} }}}}"
        f"{{{{- message.content + {quoted(end)} }}}}"
        "{%- elif message.role == 'assistant' %}{{- message.content + eos_token }}"
        "{%- else %}{{- raise_exception('the Alpaca layout has no place for the role ' + message.role) }}{%- endif %}"
        "{%- endfor %}"
    )
