"""What a message says about being learnt: `train: true | false`, `weight: 0 | 1`, and how other tools spell it."""

from __future__ import annotations

from lorafit.data.problems import RowProblem, shown
from lorafit.data.rows import Message

MARKS = ("train", "training", "loss", "weight")
"""`weight` is OpenAI's, `training` is Axolotl's, `loss` is ms-swift's."""
REFUSED_MARKS = ("train_detail", "training_detail", "masked", "mask", "loss_mask", "loss_scale", "loss_weight")
"""Marks of parts of a message, or by numbers."""


def is_left_out(message: Message, where: str, *, can_be_trained: bool) -> bool:
    """Whether the message is marked as not to be trained; the marks are taken out of it.

    Raises RowProblem.
    """
    refused = next((key for key in REFUSED_MARKS if key in message), None)
    if refused:
        raise RowProblem(
            f"{where}.{refused}: {shown(message[refused])} says what is learnt and is not read; write train: true or "
            "train: false, which holds for the whole message",
            kind="unobeyed",
        )
    marks = {key: _is_trained(key, message.pop(key), where) for key in MARKS if key in message}
    if len(set(marks.values())) > 1:
        one, other = (next(key for key in marks if marks[key] is is_trained) for is_trained in (True, False))
        raise RowProblem(f"{where}: {one} and {other} contradict each other; keep one of them", kind="unobeyed")
    # A weight of 1 is what every message has that says nothing.
    asks = next((key for key, is_trained in marks.items() if is_trained and key != "weight"), None)
    if asks and not can_be_trained:
        what = "which stands in the prompt" if message["role"] == "assistant" else f"which is the {message['role']}'s"
        raise RowProblem(
            f"{where}.{asks}: true on a message {what}, and only answers are trained; remove it, or set "
            "data.train_on: all and mark with train: false what is not to be learnt",
            kind="unobeyed",
        )
    return False in marks.values()


def _is_trained(key: str, value: object, where: str) -> bool:
    # In Python True == 1 and False == 0, in JSON they are different things.
    if key == "weight":
        if isinstance(value, bool) or value not in (0, 1):
            message = f"{where}.weight: {shown(value)}, but a message is trained or not; write 0 or 1"
            raise RowProblem(message, kind="unobeyed")
        return bool(value)
    if not isinstance(value, bool):
        raise RowProblem(f"{where}.{key}: {shown(value)}; write true or false", kind="unobeyed")
    return value
