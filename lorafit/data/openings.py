"""What a template writes by itself between the prompt of generation and an answer's text.

Mostly nothing, or what the answer has to begin with (a channel). A header there means that the template does not know
`add_generation_prompt`; an empty thought there is learnt by answers that have none. Both are told by rendering: the
header by a prompt that is the same with and without, the thought by an answer that is given one.
"""

from __future__ import annotations

from lorafit.data.chat_template import ChatTemplate
from lorafit.data.problems import RowProblem
from lorafit.data.rows import Chat, Message
from lorafit.data.seen import reasoning

Note = tuple[str, str]
THOUGHT = "(a thought)"
SAID_ONCE = ("no_generation_prompt", "empty_thought")
"""Kinds of findings whose words are the same at every place."""
KNOWN_AT_MOST = 64
"""Openings remembered: a template that writes another before every answer is not asked about each."""


class Openings:
    """Remembers what was found out about each opening."""

    def __init__(self) -> None:
        self._known: dict[str, Note | None] = {}

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
    prompt = template.render(before, chat.tools, is_prompt=True)
    for name in sorted(template.reads):
        for value in (False, True):
            try:
                other = template.with_variable(name, value).render(before, chat.tools, is_prompt=True)
            except RowProblem:
                continue
            if other != prompt and _squeezed(other) == _squeezed(prompt + opening):
                setting = f"data.template_kwargs: {{{name}: {str(value).lower()}}}"
                return f"{opening!r}; {setting} puts it into the prompt instead"
    return f"{opening!r}"


def _squeezed(text: str) -> str:
    return "".join(text.split())
