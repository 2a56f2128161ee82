"""What a row says about being learnt is obeyed or refused."""

from pathlib import Path
from typing import Any

import pytest

from lorafit.data.rows import Chat, answers
from support.sources import json_lines, rows_of, scan_problems, scanned

USER, RIGHT, WRONG = (
    {"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5"))
)


def said(message: dict[str, Any]) -> dict[str, Any]:
    """The message as ShareGPT writes it."""
    names = {"role": "from", "content": "value"}
    return {names.get(key, key): value for key, value in message.items()}


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
@pytest.mark.parametrize("other", [{}, {"weight": 1}, {"weight": 1.0}, {"train": True}, {"weight": None}])
def test_a_message_marked_as_not_to_be_trained_is_left_out_of_every_format(
    tmp_path: Path, mark: dict[str, Any], other: dict[str, Any]
) -> None:
    turns = [USER, WRONG | mark, USER, RIGHT | other]
    for row in (
        {"messages": turns},
        {"conversations": [said(turn) for turn in turns]},
        {"prompt": turns[:1], "completion": turns[1:]},
    ):
        found = scanned(tmp_path / "a.jsonl", json_lines(row))
        (chat,) = rows_of(found)
        assert isinstance(chat, Chat)
        assert chat.messages == [USER, WRONG, USER, RIGHT]
        assert (chat.untrained, answers(chat)) == ({1}, [3])
        (warning,) = [warning for warning in found.warnings if "unusual" not in warning]
        assert warning.startswith("answers left out of training by train: false or weight: 0: 1, at ")


def test_marks_follow_their_message_when_a_system_message_is_put_before_it(tmp_path: Path) -> None:
    row = {"system": "Be brief.", "conversations": [USER, WRONG | {"train": False}, USER, RIGHT]}
    (chat,) = rows_of(scanned(tmp_path / "a.jsonl", json_lines(row)))
    assert isinstance(chat, Chat) and answers(chat) == [4]


def test_a_greeting_that_is_marked_is_not_said_to_be_untrained(tmp_path: Path) -> None:
    found = scanned(tmp_path / "a.jsonl", json_lines({"messages": [RIGHT | {"train": False}, USER, RIGHT]}))
    assert not any("which is not trained" in warning for warning in found.warnings)


def test_a_mark_on_what_is_not_trained_anyway_changes_nothing(tmp_path: Path) -> None:
    row = {"messages": [USER | {"weight": 0}, RIGHT | {"weight": 1}]}
    found = scanned(tmp_path / "a.jsonl", json_lines(row, {"messages": [USER | {"weight": 1}, WRONG]}))
    assert [answers(chat) for chat in rows_of(found) if isinstance(chat, Chat)] == [[1], [1]]
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (RIGHT | {"weight": 0.5}, "[1].weight: a number (0.5), but a message is trained or not; write 0 or 1"),
        (RIGHT | {"weight": 2}, "[1].weight: a number (2), but a message is trained or not; write 0 or 1"),
        (RIGHT | {"weight": False}, "[1].weight: true or false (false), but a message is trained or not; write 0 or 1"),
        (RIGHT | {"weight": "0"}, '[1].weight: text ("0"), but a message is trained or not; write 0 or 1'),
        (RIGHT | {"train": 0}, "[1].train: a number (0); write true or false"),
        (RIGHT | {"train": "false"}, '[1].train: text ("false"); write true or false'),
        (
            RIGHT | {"train": True, "weight": 0},
            "[1]: train and weight contradict each other; keep one of them",
        ),
        (
            USER | {"train": True},
            "[1].train: true on a message which is the user's, and only answers are trained; remove it, or set "
            "data.train_on: all and mark with train: false what is not to be learnt",
        ),
        (
            RIGHT | {"train_detail": []},
            "[1].train_detail: a list ([]) says what is learnt and is not read; write "
            "train: true or train: false, which holds for the whole message",
        ),
        (
            RIGHT | {"loss_scale": 0.3},
            "[1].loss_scale: a number (0.3) says what is learnt and is not read; write "
            "train: true or train: false, which holds for the whole message",
        ),
    ],
)
def test_a_mark_that_cannot_be_obeyed_is_refused(tmp_path: Path, message: dict[str, Any], problem: str) -> None:
    rows = json_lines({"messages": [USER, message]})
    assert scan_problems(tmp_path / "a.jsonl", rows) == [f"a.jsonl:1: messages{problem}"]


def test_an_answer_of_the_prompt_cannot_be_asked_for(tmp_path: Path) -> None:
    row: dict[str, Any] = {"prompt": [USER, WRONG | {"train": True}, USER], "completion": [RIGHT]}
    (problem,) = scan_problems(tmp_path / "a.jsonl", json_lines(row))
    assert problem.startswith("a.jsonl:1: prompt[1].train: true on a message which stands in the prompt, and only")
    row["prompt"][1]["train"] = False
    assert scanned(tmp_path / "a.jsonl", json_lines(row)).train_rows == 1


def test_where_every_word_is_trained_any_message_can_be_marked(tmp_path: Path) -> None:
    rows = [{"messages": [USER | {"train": mark}, RIGHT | {"train": not mark}]} for mark in (True, False)]
    found = scanned(tmp_path / "a.jsonl", json_lines(*rows), train_on="all")
    assert [chat.untrained for chat in rows_of(found) if isinstance(chat, Chat)] == [{1}, {0}]
    assert "answers left out of training by train: false or weight: 0: 2, at " in found.warnings[0]
    nothing = json_lines({"messages": [USER | {"weight": 0}, RIGHT | {"weight": 0}]})
    assert "none of the 1 rows can be trained on" in scan_problems(tmp_path / "a.jsonl", nothing, train_on="all")[0]


def test_a_row_of_which_every_answer_is_left_out_is_lost_and_says_why(tmp_path: Path) -> None:
    rows = json_lines({"messages": [USER, RIGHT]}, {"messages": [USER, WRONG | {"weight": 0}]})
    found = scanned(tmp_path / "a.jsonl", rows, max_lost_rows=0.5)
    assert (found.train_rows, found.lost) == (1, 1)
    assert "a.jsonl:2 (left out by train: false or weight: 0)" in found.warnings[0]


def test_rows_that_differ_only_in_what_is_trained_are_no_duplicates(tmp_path: Path) -> None:
    turns = [USER, WRONG, USER, RIGHT]
    marked = [USER, WRONG | {"train": False}, USER, RIGHT]
    found = scanned(tmp_path / "a.jsonl", json_lines({"messages": turns}, {"messages": marked}))
    assert not any("duplicate" in warning for warning in found.warnings)
