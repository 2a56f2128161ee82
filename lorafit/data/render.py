"""A row -> the text of its sequences, and which characters of it are trained."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator

from transformers import PreTrainedTokenizerBase

from lorafit.data.findings import Findings
from lorafit.data.openings import SAID_ONCE, Note, Openings
from lorafit.data.problems import RowProblem
from lorafit.data.prompts import Prompts
from lorafit.data.rows import Chat, Message, Pair, Row, Text, answers, as_chat, system_merged, texts
from lorafit.data.seen import writes_python
from lorafit.data.templates import ALPACA_INPUT, Templates, alpaca_prompt
from lorafit.data.tool_calls import with_argument_text
from lorafit.data.turns import MERGE, Rendered, Turns, times_the_text
from lorafit.recipe.sections import DataSection

logger = logging.getLogger(__name__)

COSTLY = 2
"""How often a conversation's text is trained from which on that is said before all rows are rendered."""


class Renderer:
    """Renders rows with the recipe's template."""

    def __init__(
        self, section: DataSection, tokenizer: PreTrainedTokenizerBase, *, stop_token_ids: Collection[int]
    ) -> None:
        """Raises RecipeError, DataError or ModelError when there is no template that can be used."""
        self._section = section
        self._eos: str = tokenizer.eos_token
        self._templates = Templates(section, tokenizer)
        self.saved_templates = self._templates.saved
        """Name -> text of the chat templates that rows may be rendered with, the recipe's variables in them."""
        added = tokenizer.added_tokens_decoder
        self._stops = tuple(
            added[stop].content if stop in added else str(tokenizer.decode([stop])) for stop in stop_token_ids
        )
        self._openings = {has_tools: Openings() for has_tools in (False, True)}
        self._special = frozenset(token.content for token in added.values() if token.special and token.content.strip())
        openings = {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token}
        self._endings = tuple(self._special - openings | {self._eos})
        self.prompts = Prompts()
        self._special_pattern = _special_token_pattern(self._special)

    def render(self, row: Row, findings: Findings) -> list[Rendered]:
        """The sequences of a row: one, unless the template renders earlier turns differently; none when it is lost."""
        if isinstance(row, Text):
            return [self._running_text(row, findings)]
        self._find_special_tokens(row, findings)
        try:
            if self._section.template in ("plain", "alpaca"):
                return [self._laid_out(row)]
            made, notes = self._conversation(self._merged(as_chat(row)))
        except RowProblem as problem:
            findings.add(problem.kind, row.place, problem.message)
            return []
        for kind, message in notes:
            is_said = kind in SAID_ONCE and findings.counts[kind] > 0
            findings.add(kind, row.place, "" if is_said else message)
        return made

    def say_cost(self, chat: Chat, where: str) -> None:
        """Say what a conversation costs that the template renders again for every answer, before all are rendered."""
        made = self.render(chat, Findings())
        times = times_the_text(made) if made else 1
        if times >= COSTLY:
            logger.warning(
                "%s: the template renders earlier turns differently, as those that strip reasoning do: %d answers "
                "become %d sequences with %.2g times the tokens, and so with every such row; data.train_on: "
                "last_answer trains the last answer of each alone",
                where,
                sum(len(sequence.spans) for sequence in made),
                len(made),
                times,
            )

    def _conversation(self, chat: Chat) -> tuple[list[Rendered], list[Note]]:
        """Sequences and findings of a conversation, its tool calls given as the template takes them.

        Raises RowProblem.
        """
        wanted = self._wanted(chat)
        refused = RowProblem("the template writes the arguments of tool calls as Python", kind="refused")
        for messages in (chat.messages, *_given_otherwise(chat.messages)):
            try:
                given = chat._replace(messages=messages)
                made, notes = self._attempt(given, wanted)
            except RowProblem as problem:
                # What is wrong with the row as it is; or, once the template takes it another way, what is wrong then.
                if messages is chat.messages or (refused.kind == "refused" and problem.kind != "refused"):
                    refused = problem
                continue
            if not any(writes_python(message, made[-1].text) for message in messages):
                self._keep_prompt(given, wanted, made[-1], notes)
                return made, notes
        if refused.kind == "refused" and self._is_taken(system_merged(chat)):
            raise RowProblem(f"{refused.message}; {MERGE}", kind=refused.kind)
        raise refused

    def _keep_prompt(self, chat: Chat, wanted: list[int], last: Rendered, notes: list[Note]) -> None:
        """Keep what the last answer follows, where more of such prompts are wanted."""
        is_generations = all(kind != "generation_prompt" for kind, _ in notes)
        before = chat.messages[: wanted[-1]] if wanted else []
        if not before or not self.prompts.wants(before, chat.tools, is_generations=is_generations):
            return
        if last.is_whole:
            prompt = self._templates.of(has_tools=bool(chat.tools)).render(before, chat.tools, is_prompt=True)
            start = len(prompt)
            is_generations = last.text.startswith(prompt)
        else:
            start = last.spans[-1][0]
        self.prompts.keep(before, chat.tools, last, start=start, is_generations=is_generations)

    def _wanted(self, chat: Chat) -> list[int]:
        return answers(chat, only_last=self._section.train_on == "last_answer")

    def _attempt(self, chat: Chat, wanted: list[int]) -> tuple[list[Rendered], list[Note]]:
        has_tools = bool(chat.tools)
        turns = Turns(
            chat,
            self._templates.of(has_tools=has_tools),
            eos=self._eos,
            stops=self._stops,
            openings=self._openings[has_tools],
        )
        if self._section.train_on == "all":
            return [turns.whole()], turns.notes
        if not wanted:
            raise RowProblem("", kind="no_answer")
        return turns.answers(wanted), turns.notes

    def _is_taken(self, chat: Chat | None) -> bool:
        """Whether the template takes the conversation."""
        try:
            return chat is not None and bool(self._attempt(chat, self._wanted(chat)))
        except RowProblem:
            return False

    def _merged(self, chat: Chat) -> Chat:
        return (system_merged(chat) or chat) if self._section.system == "merge" else chat

    def _laid_out(self, row: Chat | Pair) -> Rendered:
        layout = self._section.template
        if isinstance(row, Chat):
            raise RowProblem(
                f"template {layout} lays out a prompt and its completion, this row is a conversation; "
                "set data.template: chat",
                kind="refused",
            )
        if row.system and self._section.system == "merge":
            row = row._replace(system="", prompt=f"{row.system}\n\n{row.prompt}")
        if row.system or (layout == "plain" and row.input):
            what = "a system text" if row.system else "an input besides the instruction"
            raise RowProblem(
                f"template {layout} has no place for {what}; set data.template: chat, or leave it out", kind="refused"
            )
        prompt = row.prompt if layout == "plain" else alpaca_prompt(row.prompt, row.input)
        text = prompt + self._ended(row.completion)
        is_whole = self._section.train_on == "all"
        made = Rendered(row.place, text, ((len(prompt), len(text)),), is_whole, needs_opening=True)
        if layout == "alpaca":  # which is saved as a chat template
            content = row.prompt + (f"{ALPACA_INPUT}{row.input}" if row.input else "")
            self.prompts.keep(
                [{"role": "user", "content": content}], None, made, start=len(prompt), is_generations=True
            )
        return made

    def _running_text(self, row: Text, findings: Findings) -> Rendered:
        """Text as it is, ended; or as it ends, where another program has laid it out with control tokens already."""
        text = self._ended(row.text)
        if text != row.text and (written := row.text.rstrip()).endswith(self._endings):
            last = max((token for token in self._endings if written.endswith(token)), key=len)
            findings.add("already_rendered", row.place, f"ends with {last}")
            text = row.text
        else:
            self._find_special_tokens(row, findings)
        return Rendered(row.place, text, ((0, len(text)),), True, needs_opening=True)

    def _ended(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos

    def _find_special_tokens(self, row: Row, findings: Findings) -> None:
        for text in texts(row):
            found = self._special_pattern.findall(text.removesuffix(self._eos))
            special = next((token for token in found if token in self._special), None)
            if special:
                findings.add("special_tokens", row.place, special)
                return


def _given_otherwise(messages: list[Message]) -> Iterator[list[Message]]:
    """Tool calls as some templates want them: arguments as text, no text as null instead of as nothing."""
    if any(message.get("tool_calls") for message in messages):
        yield with_argument_text(messages)
        with_null = [{"content": None, **message} for message in messages]
        if with_null != messages:
            yield with_null
            yield with_argument_text(with_null)


def _special_token_pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    """Matches every special token, and what differs from one by a number only: some tokenizers number thousands."""
    patterns = {re.sub(r"\d+", r"\\d+", re.escape(token)) for token in tokens}
    return re.compile("|".join(sorted(patterns, key=len, reverse=True)) or "(?!)")
