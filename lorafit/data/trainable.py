"""Whether there is something in a row to learn; what is empty, unasked or left out is counted."""

from __future__ import annotations

from lorafit.data.findings import Findings
from lorafit.data.rows import Chat, Pair, Row, Text, answers, possible_answers, says_something
from lorafit.recipe.sections.data import TrainOn

NOTHING_SAID = "it is empty"
LEFT_OUT = "left out by train: false or weight: 0"


def is_trainable(row: Row, findings: Findings, *, train_on: TrainOn) -> bool:
    """Whether something of the row can be trained on."""
    is_all_trained = train_on == "all"
    if isinstance(row, Text):
        has_answer = has_prompt = bool(row.text) and not row.text.isspace()
    elif isinstance(row, Pair):
        has_prompt = bool(row.prompt) and not row.prompt.isspace()
        has_answer = bool(row.completion) and not row.completion.isspace()
    else:
        has_prompt = all(says_something(message) for message in row.messages if message["role"] != "assistant")
        has_answer = bool(answers(row, only_last=train_on == "last_answer"))
        _look_for_untrained(row, findings, is_all_trained=is_all_trained)
    if not has_answer and not (is_all_trained and _says_anything(row)):
        findings.add("no_answer", row.place, _why_not(row))
        return False
    if not has_prompt:
        findings.add("empty_prompt", row.place)
    return True


def _says_anything(row: Row) -> bool:
    """Whether a word is left to learn when everything is."""
    if isinstance(row, Chat):
        return any(says_something(message) for i, message in enumerate(row.messages) if i not in row.untrained)
    return isinstance(row, Pair) and bool(row.prompt.strip())


def _why_not(row: Row) -> str:
    """Why the row, which has no answer, has none."""
    if not isinstance(row, Chat):
        return NOTHING_SAID
    if possible_answers(row):
        return LEFT_OUT
    said = [message for message in row.messages[row.first_answer :] if message["role"] == "assistant"]
    if not said:
        return "no message of the assistant"
    return NOTHING_SAID if not any(says_something(message) for message in said) else "nothing is asked before it"


def _look_for_untrained(chat: Chat, findings: Findings, *, is_all_trained: bool) -> None:
    possible = possible_answers(chat)
    for _ in chat.untrained.intersection(range(len(chat.messages)) if is_all_trained else possible):
        findings.add("left_out", chat.place)
    if is_all_trained:
        return
    accounted = {*range(chat.first_answer), *possible, *chat.untrained}
    others = [
        message
        for index, message in enumerate(chat.messages)
        if message["role"] == "assistant" and index not in accounted
    ]
    if possible and not all(says_something(message) for message in others):
        findings.add("empty_answer", chat.place)
    if any(says_something(message) for message in others):
        findings.add("untrained_answer", chat.place)
