"""What a template writes by itself between the prompt of generation and an answer's text.

Mostly nothing, or what the answer has to begin with (a channel). A header there means that the template does not know
`add_generation_prompt`; an empty thought there is learnt by answers that have none. Both are told by rendering: the
header by a prompt that is the same with and without, the thought by an answer that is given one.
"""

from __future__ import annotations

from collections.abc import Callable

from lorafit.data.chat_template import ChatTemplate
from lorafit.data.problems import RowProblem
from lorafit.data.rows import Chat, Message
from lorafit.data.seen import reasoning

Note = tuple[str, str]
THOUGHT = "(a thought)"
SAID_ONCE = ("no_generation_prompt", "empty_thought", "generation_prompt")
"""Kinds of findings whose words are the same at every place."""
KNOWN_AT_MOST = 64
"""Openings remembered: a template that writes another before every answer is not asked about each."""


class Openings:
    """Remembers what was found out about each opening."""

    def __init__(self) -> None:
        self._known: dict[str, Note | None] = {}
        self._headers: dict[str, str] = {}

    def look(self, chat: Chat, index: int, answer: str, *, template: ChatTemplate) -> Note | None:
        """The finding about the rendered answer of message `index`, if any: its kind and its words."""
        message = chat.messages[index]
        content = (message.get("content") or "").strip()
        opening = answer[: max(0, answer.find(content))] if content else ""
        if not opening.strip() or reasoning(message):
            return None
        if opening not in self._known and len(self._known) < KNOWN_AT_MOST:
            kind = _kind(chat, index, opening, template)
            self._known[opening] = (kind, _words(kind, chat, index, opening, template)) if kind else None
        return self._known.get(opening)

    def parted(self, chat: Chat, index: int, header: str, *, template: ChatTemplate) -> Note:
        """The finding about an answer that does not begin as the header of generation has it."""
        if header not in self._headers:
            some = chat.messages[: index + 1]

            def fits(other: ChatTemplate) -> bool:
                prompt = other.render(some[:-1], chat.tools, is_prompt=True)
                return other.render(some, chat.tools).startswith(prompt)

            setting = _setting(template, fits)
            mend = f"; {setting} makes both the same" if setting else ""
            self._headers[header] = f"generation begins an answer with {header!r}{mend}"
        return "generation_prompt", self._headers[header]


def _kind(chat: Chat, index: int, opening: str, template: ChatTemplate) -> str:
    before = chat.messages[:index]
    if template.render(before, chat.tools, is_prompt=True) == template.render(before, chat.tools):
        return "" if chat.messages[index].get("tool_calls") else "no_generation_prompt"
    return "empty_thought" if _squeezed(_with_thought(chat, index, template)) == _squeezed(opening) else ""


def _with_thought(chat: Chat, index: int, template: ChatTemplate) -> str:
    """What the template writes between prompt and answer for the same answer with a thought, without the thought."""
    message: Message = {**chat.messages[index], "reasoning_content": THOUGHT}
    try:
        prompt = template.render(chat.messages[:index], chat.tools, is_prompt=True)
        whole = template.render([*chat.messages[:index], message], chat.tools)
    except RowProblem:
        return ""
    opening = whole.removeprefix(prompt).partition(message["content"].strip())[0]
    return opening.replace(THOUGHT, "") if THOUGHT in opening else ""


def _words(kind: str, chat: Chat, index: int, opening: str, template: ChatTemplate) -> str:
    if kind == "no_generation_prompt":
        return repr(opening)
    before = chat.messages[:index]
    wanted = _squeezed(template.render(before, chat.tools, is_prompt=True) + opening)

    def fits(other: ChatTemplate) -> bool:
        return _squeezed(other.render(before, chat.tools, is_prompt=True)) == wanted

    setting = _setting(template, fits)
    return f"{opening!r}; {setting} puts it into the prompt instead" if setting else repr(opening)


def _setting(template: ChatTemplate, fits: Callable[[ChatTemplate], bool]) -> str | None:
    """The key of the recipe that makes the template fit: each variable that it reads is tried off and on."""
    for name in sorted(template.reads):
        for value in (False, True):
            try:
                if fits(template.with_variable(name, value)):
                    return f"data.template_kwargs: {{{name}: {str(value).lower()}}}"
            except RowProblem:
                continue
    return None


def _squeezed(text: str) -> str:
    return "".join(text.split())
