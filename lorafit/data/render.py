"""A row -> the text of its sequences, and which characters of it are trained.

An answer starts where the prompt before it ends, rendered as generation will see it, and ends where the text up to and
with the answer ends. Both must be prefixes of the whole, or the tokens that are trained would follow another text than
in generation. What the template writes after the stop token (a newline, mostly) belongs to the answer: so do TRL's
labels, and generation has stopped by then.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lorafit.data.chat_template import ChatTemplate
from lorafit.data.findings import Findings
from lorafit.data.problems import RowProblem
from lorafit.data.rows import Chat, Message, Pair, Place, Row, Text, answers, as_chat, texts
from lorafit.data.templates import Templates, alpaca_prompt
from lorafit.recipe.sections import DataSection

Span = tuple[int, int]
OPENING = 64
"""Characters before an answer that may already hold its beginning: some prompts of generation end with `<think>`."""


class Rendered(NamedTuple):
    """The text of one sequence."""

    place: Place
    text: str
    spans: tuple[Span, ...]
    """Characters of the answers, from and up to."""
    is_whole: bool
    """Every token is trained, not only those of the spans."""


class Renderer:
    """Renders rows with the recipe's template."""

    def __init__(self, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises RecipeError, DataError or ModelError when there is no template that can be used."""
        self._section = section
        self._eos: str = tokenizer.eos_token
        self._templates = Templates(section, tokenizer)
        self.template_text = self._templates.text
        self.adds_bos = section.template in ("alpaca", "plain")
        """Whether the tokenizer's own beginning goes before the text: chat templates write it themselves."""
        added = tokenizer.added_tokens_decoder.values()
        self._special = frozenset(token.content for token in added if token.special and token.content.strip())
        self._special_pattern = _special_token_pattern(self._special)

    def render(self, row: Row, findings: Findings) -> list[Rendered]:
        """The sequences of a row: one, unless the template renders earlier turns differently; none when it is lost."""
        self._find_special_tokens(row, findings)
        try:
            if isinstance(row, Text):
                text = self._ended(row.text)
                return [Rendered(row.place, text, ((0, len(text)),), True)]
            if self._section.template in ("plain", "alpaca"):
                return [self._laid_out(row)]
            chat = as_chat(row)
            template = self._templates.of(has_tools=bool(chat.tools))
            if self._section.train_on == "all":
                return [self._whole(chat, template, findings)]
            return _sequences(chat, template, findings, eos=self._eos)
        except RowProblem as problem:
            findings.add(problem.kind, row.place, problem.message)
            return []

    def _laid_out(self, row: Chat | Pair) -> Rendered:
        layout = self._section.template
        if isinstance(row, Chat):
            raise RowProblem(
                f"template {layout} lays out a prompt and its completion, this row is a conversation; "
                "set data.template: chat",
                kind="refused",
            )
        if row.system or (layout == "plain" and row.input):
            what = "a system text" if row.system else "an input besides the instruction"
            raise RowProblem(
                f"template {layout} has no place for {what}; set data.template: chat, or leave it out", kind="refused"
            )
        prompt = row.prompt if layout == "plain" else alpaca_prompt(row.prompt, row.input)
        text = prompt + self._ended(row.completion)
        return Rendered(row.place, text, ((len(prompt), len(text)),), self._section.train_on == "all")

    def _whole(self, chat: Chat, template: ChatTemplate, findings: Findings) -> Rendered:
        text = template.render(chat.messages, chat.tools)
        _find_dropped(chat.messages, text, chat.place, findings)
        ends_with_answer = chat.messages[-1]["role"] == "assistant"
        return Rendered(chat.place, text, ((0, len(text)),) if ends_with_answer else (), True)

    def _ended(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos

    def _find_special_tokens(self, row: Row, findings: Findings) -> None:
        for text in texts(row):
            found = self._special_pattern.findall(text.removesuffix(self._eos))
            special = next((token for token in found if token in self._special), None)
            if special:
                findings.add("special_tokens", row.place, special)
                return


def _sequences(chat: Chat, template: ChatTemplate, findings: Findings, *, eos: str) -> list[Rendered]:
    """Sequences in which every answer is trained once, after the text generation would see before it."""
    left = answers(chat)
    made: list[Rendered] = []
    while left:
        last = left[-1]
        text = template.render(chat.messages[: last + 1], chat.tools)
        last_span = _last_span(chat, last, text, template, findings)
        if last_span is None:
            findings.add("prompt_not_prefix", chat.place)
            return []
        found = {answer: _earlier_span(chat, answer, text, template, eos=eos) for answer in left[:-1]}
        spans = {answer: span for answer, span in found.items() if span} | {last: last_span}
        if not made:
            asked = [message for message in chat.messages[: last + 1] if message["role"] != "assistant"]
            _find_dropped(asked, text, chat.place, findings)
        if any(not _is_in(chat.messages[a], text[max(0, start - OPENING) : end]) for a, (start, end) in spans.items()):
            findings.add("answer_dropped", chat.place)
            return []
        made.append(Rendered(chat.place, text, tuple(spans.values()), False))
        left = [answer for answer in left if answer not in spans]
    if len(made) > 1:
        findings.add("split", chat.place, f"{len(made)} sequences")
    return made[::-1]


def _earlier_span(chat: Chat, answer: int, text: str, template: ChatTemplate, *, eos: str) -> Span | None:
    """Where an answer before the last stands; None when it, or what comes before it, is rendered differently there."""
    prompt = template.render(chat.messages[:answer], chat.tools, is_prompt=True)
    answered = template.render(chat.messages[: answer + 1], chat.tools)
    if not text.startswith(answered):
        answered = answered.removesuffix(eos)  # some templates close a conversation with one more token
    fits = answered.startswith(prompt) and text.startswith(answered)
    return (len(prompt), len(answered)) if fits else None


def _last_span(chat: Chat, answer: int, text: str, template: ChatTemplate, findings: Findings) -> Span | None:
    """Where the answer at the end of the text stands; None when the messages before it are rendered differently."""
    prompt = template.render(chat.messages[:answer], chat.tools, is_prompt=True)
    if text.startswith(prompt):
        return len(prompt), len(text)
    # Some templates end the prompt of generation with what a finished conversation does not hold (an empty thought
    # block). The answer then starts where the two part, as TRL has it, as long as the messages before it are the same.
    shared = _shared_length(prompt, text)
    if shared < len(template.render(chat.messages[:answer], chat.tools)):
        return None
    findings.add("generation_prompt", chat.place)
    return shared, len(text)


def _shared_length(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def _find_dropped(messages: list[Message], text: str, place: Place, findings: Findings) -> None:
    for message in messages:
        if not _is_in(message, text):
            findings.add("content_dropped", place, f"{message['role']} message")
            return


def _is_in(message: Message, text: str) -> bool:
    """Whether the message's tool calls and text are in the rendered one, up to white space and JSON quoting."""
    calls = [call.get("function", call).get("name", "") for call in message.get("tool_calls", [])]
    if not all(name in text for name in calls):
        return False
    content = message.get("content", "").strip()
    if content in text:
        return True
    squeezed = "".join(text.split())
    return any(
        "".join(spelt.split()) in squeezed
        for spelt in (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
    )


def _special_token_pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    """Matches every special token, and what differs from one by a number only: some tokenizers number thousands."""
    patterns = {re.sub(r"\d+", r"\\d+", re.escape(token)) for token in tokens}
    return re.compile("|".join(sorted(patterns, key=len, reverse=True)) or "(?!)")
