"""A conversation -> the sequences in which each of its answers is trained once, after what generation would see.

An answer starts where the prompt before it ends, rendered as generation will see it, and ends where the text up to and
with the answer ends. A sequence holds every answer for which both are prefixes of its text; an answer for which they
are not (the template strips reasoning from the history, or closes the last turn in another way) opens its own. What
the template writes after the stop token (a newline, mostly) belongs to the answer: so do TRL's labels, and generation
has stopped by then.

Every prefix is rendered once and let go: a conversation costs two renderings an answer, and memory for its sequences.
"""

from __future__ import annotations

from typing import NamedTuple

from lorafit.data.chat_template import ChatTemplate
from lorafit.data.openings import Openings
from lorafit.data.problems import RowProblem
from lorafit.data.rows import Chat, Message, Place
from lorafit.data.seen import missing, missing_tool

Span = tuple[int, int]
OPENING = 64
"""Characters before an answer that may already hold its beginning."""

MERGE = "data.system: merge puts the system text before the first user's message"
TAIL = 100
"""Characters at the end of a text that hold its last token and the white space after it."""


class Rendered(NamedTuple):
    """The text of one sequence."""

    place: Place
    text: str
    spans: tuple[Span, ...]
    """Characters of the answers, from and up to."""
    is_whole: bool
    """Every token is trained, not only those of the spans."""
    left_out: tuple[Span, ...] = ()
    """Characters that are not trained all the same: messages marked `train: false`."""
    needs_opening: bool = False
    """What the tokenizer puts before a text by itself goes before this one: chat templates write it themselves."""


class Turns:
    """Finds the sequences of one conversation; `notes` holds the findings: kind and message of each."""

    def __init__(self, chat: Chat, template: ChatTemplate, *, eos: str, stops: tuple[str, ...], openings: Openings):
        self._chat, self._template, self._eos, self._stops = chat, template, eos, stops
        self._openings = openings
        self.notes: list[tuple[str, str]] = []

    def answers(self, wanted: list[int]) -> list[Rendered]:
        """Sequences in which every wanted answer is trained once. Raises RowProblem for a row that is lost."""
        opened: list[tuple[str, list[Span]]] = []
        for index in reversed(wanted):
            text, start = self._as_last(index)
            ends = ((sequence, self._end_in(sequence[0], text)) for sequence in opened)
            home = next(((sequence, end) for sequence, end in ends if end is not None and end > start), None)
            if home is None:
                text = self._stopped(index, text)
                home = (text, []), len(text)
                opened.append(home[0])
                if len(opened) == 1:
                    self._look_at_context(set(range(index)) - set(wanted), text, count=index + 1)
            (text, spans), end = home
            self._look_at_answer(index, text, (start, end))
            spans.append((start, end))
        made = [Rendered(self._chat.place, text, tuple(spans[::-1]), False) for text, spans in reversed(opened)]
        if len(made) > 1:
            times = f"{times_the_text(made):.2g} times the text"
            self.notes.append(("split", f"{len(wanted)} answers in {len(made)} sequences: {times}"))
        return made

    def whole(self) -> Rendered:
        """The conversation as one sequence, trained except for the messages marked as untrained."""
        messages = self._chat.messages
        text = self._render(len(messages))
        self._look_at_context(set(range(len(messages))), text, count=len(messages), with_reasoning=True)
        left_out = tuple(self._left_out(index, text) for index in sorted(self._chat.untrained))
        if messages[-1]["role"] != "assistant" or len(messages) - 1 in self._chat.untrained:
            return Rendered(self._chat.place, text, (), True, left_out)
        text = self._stopped(len(messages) - 1, text)
        return Rendered(self._chat.place, text, ((0, len(text)),), True, left_out)

    def _render(self, count: int, *, is_prompt: bool = False) -> str:
        return self._template.render(self._chat.messages[:count], self._chat.tools, is_prompt=is_prompt)

    def _end_in(self, text: str, earlier: str) -> int | None:
        """Where an earlier rendering ends in the text; None when the text goes another way, or closes it otherwise."""
        if text.startswith(earlier):
            return len(earlier) + self._stop_length(earlier, text)
        # Some templates close a finished conversation with one more token, after the one that closes every turn.
        closed = earlier.removesuffix(self._eos)
        return len(closed) if self._is_stopped(closed) and text.startswith(closed) else None

    def _as_last(self, index: int) -> tuple[str, int]:
        """The text that ends with the answer, and where the answer starts in it. Raises RowProblem."""
        prompt, answered = self._render(index, is_prompt=True), self._render(index + 1)
        return (answered, len(prompt)) if answered.startswith(prompt) else self._parted(index, prompt, answered)

    def _parted(self, index: int, prompt: str, answered: str) -> tuple[str, int]:
        """The same for an answer whose prompt changes once it is answered."""
        # Some templates end the prompt of generation with what a finished conversation does not hold (an empty thought
        # block). The answer then starts where the two part, as TRL has it, as long as the messages before are the same.
        shared = _shared_length(prompt, answered)
        before = self._render(index)
        if shared >= len(before):
            header = prompt[len(before) :]
            self.notes.append(self._openings.parted(self._chat, index, header, template=self._template))
            return answered, shared
        # Others drop reasoning from the messages before, which generation still saw. Then the answer is what follows
        # the last of these messages, or the header after them, and is set after the prompt of generation.
        for count in (index - 1, index):
            last = self._after(count, prompt)
            _, found, answer = answered.rpartition(last) if last.strip() else ("", "", "")
            if found and not missing(self._chat.messages[index], answer, with_reasoning=True):
                self.notes.append(("set_after_prompt", ""))
                return prompt + answer, len(prompt)
        raise RowProblem("", kind="prompt_not_prefix")

    def _after(self, count: int, text: str) -> str:
        """What the text goes on with after the first messages; nothing when it has them otherwise or not at all."""
        try:
            earlier = self._render(count) if count else ""
        except RowProblem:
            return ""
        return text[len(earlier) :] if text.startswith(earlier) else ""

    def _stopped(self, index: int, text: str) -> str:
        """The text with the token generation stops on: for some families it is the marker of whoever speaks next."""
        if self._is_stopped(text):
            return text
        messages = self._chat.messages
        speaks = "tool" if messages[index].get("tool_calls") else "user"
        for following in (*messages[index + 1 : index + 2], {"role": speaks, "content": "."}):
            try:
                longer = self._template.render([*messages[: index + 1], following], self._chat.tools)
            except RowProblem:
                continue
            if longer.startswith(text) and (length := self._stop_length(text, longer)):
                return longer[: len(text) + length]
        return text

    def _stop_length(self, earlier: str, text: str) -> int:
        """How many characters of the text after an earlier one that does not end with a stop token make up one."""
        if self._is_stopped(earlier):
            return 0
        start = len(earlier)
        while start < len(text) and text[start].isspace():
            start += 1
        return next((start + len(stop) - len(earlier) for stop in self._stops if text.startswith(stop, start)), 0)

    def _is_stopped(self, text: str) -> bool:
        return text[-TAIL:].rstrip().endswith(self._stops)

    def _left_out(self, index: int, text: str) -> Span:
        """Where a message that is not to be trained stands in the text. Raises RowProblem."""
        start: int | None = 0
        if self._chat.messages[index]["role"] == "assistant":
            prompt = self._render(index, is_prompt=True)
            start = len(prompt) if text.startswith(prompt) else None
        if index and not start:
            start = self._end_of(index, text)
        end = self._end_of(index + 1, text)
        if end is None and start is not None:
            end = self._end_of_what_is_left(self._chat.messages[index], start, text)
        if start is None or end is None:
            raise RowProblem(f"message {index + 1} is marked as untrained", kind="prompt_not_prefix")
        return start, end

    def _end_of_what_is_left(self, message: Message, start: int, text: str) -> int | None:
        """Where a message ends that the template has otherwise as the last one: its text follows its header."""
        told = (message.get("content") or "").rpartition("</think>")[2].strip()
        at = text.find(told, start) if told else -1
        if at < 0 or text[start:at].strip():
            return None
        end = at + len(told)
        if message.get("tool_calls"):  # they follow the text, up to the token that ends the turn
            end = min((text.index(stop, end) for stop in self._stops if stop in text[end:]), default=end)
        end += self._stop_length(text[:end], text)
        return None if missing(message, text[start:end], with_reasoning=False) else end

    def _end_of(self, count: int, text: str) -> int | None:
        """Where the first messages end in the text; before the closing token, where the template changes that."""
        earlier = self._render(count)
        end = self._end_in(text, earlier)
        closed = earlier.removesuffix(self._eos)
        return len(closed) if end is None and text.startswith(closed) else end

    def _look_at_answer(self, index: int, text: str, span: Span) -> None:
        """Find what of an answer is missing, and what the template writes before it by itself. Raises RowProblem."""
        message = self._chat.messages[index]
        start, end = span
        before = text[max(0, start - OPENING) : start]
        if lost := missing(message, text[start:end], with_reasoning=True, before=before):
            raise RowProblem(f"the {lost} of message {index + 1}", kind="answer_dropped")
        if note := self._openings.look(self._chat, index, text[start:end], template=self._template):
            self.notes.append(note)

    def _look_at_context(self, indices: set[int], text: str, *, count: int, with_reasoning: bool = False) -> None:
        """Find what is missing of the messages that are there to be read, and of the tools."""
        for index in sorted(indices):
            if lost := missing(self._chat.messages[index], text, with_reasoning=with_reasoning):
                role = self._chat.messages[index]["role"]
                mend = f"; {MERGE}" if role == "system" and not index else ""
                self.notes.append(("content_dropped", f"the {lost} of message {index + 1}, {role}{mend}"))
                return
        tool = missing_tool(self._chat.tools or [], text, lambda: self._without_tools(count))
        if tool:
            self.notes.append(("content_dropped", f"the tool {tool}"))

    def _without_tools(self, count: int) -> str:
        try:
            return self._template.render(self._chat.messages[:count], None)
        except RowProblem:
            return ""


def times_the_text(made: list[Rendered]) -> float:
    """How much more text there is than in the longest sequence alone: 1 for one sequence."""
    lengths = [len(sequence.text) for sequence in made]
    return sum(lengths) / max(1, *lengths)


def _shared_length(one: str, other: str) -> int:
    """How many characters both begin with, by halving: a loop over the characters of a long chat takes its time."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        middle = (same + most + 1) // 2
        if one.startswith(other[same:middle], same):
            same = middle
        else:
            most = middle - 1
    return same
