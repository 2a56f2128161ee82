"""What a message says about being learnt: `train: true | false`, `weight: 0 | 1`, and how other tools spell it."""

from __future__ import annotations

from lorafit.data.problems import RowProblem, shown
from lorafit.data.rows import Message

MARKS = ("train", "training", "loss", "weight")
"""`weight` is OpenAI's, `training` is Axolotl's, `loss` is ms-swift's."""


def is_left_out(message: Message, where: str) -> bool:
    """Whether the message is marked as not to be trained; the marks are taken out of it.

    Raises RowProblem.
    """
    marks = {key: _is_trained(key, message.pop(key), where) for key in MARKS if key in message}
    if len(set(marks.values())) > 1:
        one, other = (next(key for key in marks if marks[key] is is_trained) for is_trained in (True, False))
        raise RowProblem(f"{where}: {one} and {other} contradict each other; keep one of them")
    is_trained = next(iter(marks.values()), None)
    if is_trained and message["role"] != "assistant" and "weight" not in marks:
        key = next(iter(marks))
        raise RowProblem(
            f"{where}.{key}: true on a message of the {message['role']}, but answers are the assistant's; remove it"
        )
    return is_trained is False


def _is_trained(key: str, value: object, where: str) -> bool:
    # In Python True == 1 and False == 0, in JSON they are different things.
    if key == "weight":
        if isinstance(value, bool) or value not in (0, 1):
            raise RowProblem(f"{where}.weight: {shown(value)}, but a message is trained or not; write 0 or 1")
        return bool(value)
    if not isinstance(value, bool):
        raise RowProblem(f"{where}.{key}: {shown(value)}; write true or false")
    return value
