"""Where a recipe's template comes from: the tokenizer, a file, or the Alpaca layout; and what is saved of it."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from lorafit.data.chat_template import ChatTemplate
from lorafit.errors import DataError, ModelError, RecipeError
from lorafit.recipe.sections import DataSection

LAYOUTS = ("chat", "alpaca", "plain")
# The layout Stanford Alpaca models are trained and prompted with.
ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_WITH_INPUT = f"{ALPACA_TASK}, paired with an input that provides further context. "
ALPACA_ALONE = f"{ALPACA_TASK}. "
ALPACA_REQUEST = "Write a response that appropriately completes the request.\n\n"


class Templates:
    """The recipe's template for rows with and without tools, each compiled once."""

    def __init__(self, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises RecipeError, DataError or ModelError when there is no template that can be used."""
        self._section = section
        self._tokenizer = tokenizer
        self._compiled: dict[bool, ChatTemplate] = {}
        self.text = self._text(has_tools=False)
        """The Jinja text; None for the layouts that need none."""

    def of(self, *, has_tools: bool) -> ChatTemplate:
        """The template of a row. Raises DataError for one that is no Jinja."""
        known = self._compiled.get(has_tools)
        if known is None:
            text = self._text(has_tools=has_tools) or ""
            variables = {**self._tokenizer.special_tokens_map, **self._section.template_kwargs}
            try:
                known = self._compiled[has_tools] = ChatTemplate(text, variables)
            except jinja2.TemplateSyntaxError as error:
                where = f"{self._section.template}:{error.lineno}" if self._is_file else "the tokenizer's chat template"
                raise DataError(f"{error.message}; mend the template", where=where) from None
        return known

    @property
    def _is_file(self) -> bool:
        return self._section.template not in LAYOUTS

    def _text(self, *, has_tools: bool) -> str | None:
        name = self._section.template
        if name in ("alpaca", "plain"):
            return None
        if self._is_file:
            return _read_template(Path(name))
        template = self._tokenizer.chat_template
        if not template:
            raise ModelError(
                "the tokenizer has no chat template; set data.template: alpaca, plain or the path of a Jinja file, or "
                "use the instruct version of the model",
                where="data.template: chat",
            )
        return self._tokenizer.get_chat_template(tools=[{}] if has_tools else None)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else os.strerror(error.errno or 0).lower()
        raise RecipeError(
            f"{path}: {what}; write {', '.join(LAYOUTS)} or the path of a Jinja file", where="data.template"
        ) from None


def alpaca_prompt(instruction: str, context: str) -> str:
    """The prompt of the Alpaca layout, up to where the answer starts."""
    if context:
        head = f"{ALPACA_WITH_INPUT}{ALPACA_REQUEST}### Instruction:\n{instruction}\n\n### Input:\n{context}"
    else:
        head = f"{ALPACA_ALONE}{ALPACA_REQUEST}### Instruction:\n{instruction}"
    return f"{head}\n\n### Response:\n"


def saved_chat_template(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that goes with the adapter, so that whoever loads it prompts it as it was trained.

    The tokenizer's own for `chat`; the file's text; the Alpaca layout as a template. `plain` lays out no turns, so the
    tokenizer's own stays. Raises RecipeError when the file cannot be read.
    """
    if section.template == "alpaca":
        opening = "{{- bos_token }}" if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
        return opening + ALPACA_CHAT_TEMPLATE
    return tokenizer.chat_template if section.template in LAYOUTS else _read_template(Path(section.template))


ALPACA_CHAT_TEMPLATE = (
    "{%- for message in messages %}{%- if message.role == 'user' %}{{- '"
    + alpaca_prompt("' + message.content + '", "").replace("\n", "\\n")
    + "' }}{%- elif message.role == 'assistant' %}{{- message.content + eos_token }}"
    "{%- else %}{{- raise_exception('the Alpaca layout has no place for the role ' + message.role) }}{%- endif %}"
    "{%- endfor %}"
)
