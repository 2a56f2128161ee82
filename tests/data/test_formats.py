"""Rows of every format become conversations, pairs or text; fields are checked one by one."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lorafit.data import scan
from lorafit.data.formats import FORMATS
from lorafit.data.rows import Chat, Pair, Text
from lorafit.recipe.rules.data import FORMAT_COLUMNS
from support.sources import PAIR, json_lines, rows_of, scan_problems, scanned, section

USER, ASSISTANT = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def one_row(path: Path, row: Any, **settings: Any) -> Chat | Pair | Text:
    found = scanned(path / "rows.jsonl", json_lines(row), **settings)
    (made,) = rows_of(found)
    return made


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, Pair((0, 1), "", "One?", "", "Two.")),
        (PAIR | {"system": "Be brief."}, Pair((0, 1), "Be brief.", "One?", "", "Two.")),
        ({"instruction": "Add.", "input": "1, 1", "output": "2"}, Pair((0, 1), "", "Add.", "1, 1", "2")),
        ({"instruction": "Add.", "input": None, "output": "2"}, Pair((0, 1), "", "Add.", "", "2")),
        ({"instruction": "Add.", "output": "2"}, Pair((0, 1), "", "Add.", "", "2")),
        ({"text": "Running."}, Text((0, 1), "Running.")),
        ({"messages": [USER, ASSISTANT]}, Chat((0, 1), [USER, ASSISTANT], None, 0)),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Chat((0, 1), [USER, ASSISTANT], None, 1)),
        ({"prompt": "One?", "completion": [ASSISTANT]}, Chat((0, 1), [USER, ASSISTANT], None, 1)),
        (PAIR | {"tools": [TOOL]}, Chat((0, 1), [USER, ASSISTANT], [TOOL], 0)),
        (PAIR | {"tools": json.dumps([TOOL])}, Chat((0, 1), [USER, ASSISTANT], [TOOL], 0)),
        (
            {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}]},
            Chat((0, 1), [USER, ASSISTANT], None, 0),
        ),
        (
            {"conversations": [USER, ASSISTANT], "system": "Be brief."},
            Chat((0, 1), [{"role": "system", "content": "Be brief."}, USER, ASSISTANT], None, 1),
        ),
    ],
)
def test_the_format_is_detected_and_read(tmp_path: Path, row: dict[str, Any], expected: Any) -> None:
    assert one_row(tmp_path, row) == expected


def test_columns_are_read_under_the_names_the_recipe_gives(tmp_path: Path) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    row = {"question": "One?", "answer": "Two."}
    for given in ("prompt_completion", None):
        source = {"columns": columns, "format": given}
        assert one_row(tmp_path, row, source=source) == Pair((0, 1), "", "One?", "", "Two.")


def test_a_column_mapped_to_one_field_is_not_taken_for_another(tmp_path: Path) -> None:
    source = {"columns": {"completion": "text"}}
    assert one_row(tmp_path, {"prompt": "One?", "text": "Two."}, source=source) == Pair((0, 1), "", "One?", "", "Two.")


def test_the_recipe_checks_columns_against_what_the_formats_read() -> None:
    assert {name: set(columns) for name, columns in FORMAT_COLUMNS.items()} == {
        name: {*fields.required, *fields.optional} for name, fields in FORMATS.items()
    }


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            PAIR | {"text": "x"},
            "the columns prompt, completion, text fit prompt_completion and text; say which is meant with format:",
        ),
        (
            {"question": "One?", "answer": "Two."},
            "the columns question, answer fit no format; set format: and map them, e.g. format: prompt_completion, "
            "columns: {prompt: question, completion: answer}",
        ),
        (
            {},
            "the columns (none) fit no format; set format: and map them, e.g. format: prompt_completion, columns: "
            "{prompt: ..., completion: ...}",
        ),
        (3, "a number (3) where a row (an object) belongs"),
        ("text", 'text ("text") where a row (an object) belongs'),
        (
            {"prompt": None, "completion": "b"},
            "prompt: null where text belongs; fill it in or remove the row",
        ),
        ({"prompt": 3, "completion": "b"}, "prompt: a number (3) where text belongs; write it as text"),
        ({"prompt": True, "completion": "b"}, "prompt: true or false (true) where text belongs; write it as text"),
        ({"prompt": "a", "completion": {}}, "completion: an object ({}) where text belongs; write it as text"),
        ({"prompt": "a", "completion": "\ud800"}, "completion: holds half of a surrogate pair"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input: a number (3) where text belongs; write it as text"),
        ({"text": ["a"]}, 'text: a list (["a"]) where text belongs; write it as text'),
        (
            {"prompt": [USER], "completion": 3},
            "completion: a number (3) where a list of messages belongs; write it as text",
        ),
        ({"messages": "Hello"}, 'messages: text ("Hello") where a list of messages belongs'),
        ({"messages": None}, "messages: null where a list of messages belongs; fill it in or remove the row"),
        ({"messages": []}, "messages: an empty list; write at least one message, or remove the row"),
        ({"messages": ["Hello"]}, 'messages[0]: text ("Hello") where a message (an object) belongs'),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "messages[1].content: null where text belongs; write it as text",
        ),
        ({"messages": [{"role": "usr", "content": "b"}]}, 'messages[0]: text ("usr") is no role; did you mean user?'),
        ({"messages": [{"role": ["user"], "content": "b"}]}, 'messages[0]: a list (["user"]) is no role; '),
        (
            {"messages": [{"speaker": "user", "content": "b"}]},
            "messages[0]: no role (there are speaker, content); write one of system, developer, user, assistant, tool",
        ),
        (
            {"conversations": [{"from": "narrator", "value": "b"}]},
            'conversations[0]: text ("narrator") is no role; write one of system, developer, user, assistant, tool',
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": "weather"}]},
            'messages[1].tool_calls: text ("weather") where a list of calls belongs',
        ),
        ({"messages": [USER, ASSISTANT], "tools": "[{"}, 'tools: text ("[{"): broken JSON: Expecting property name'),
        ({"messages": [USER, ASSISTANT], "tools": ["weather"]}, 'tools: a list (["weather"]) where a list of schemas'),
    ],
)
def test_what_does_not_belong_in_a_row_is_refused_with_the_value(tmp_path: Path, row: Any, problem: str) -> None:
    problems = scan_problems(tmp_path / "a.jsonl", "\n" + json_lines(row))
    assert len(problems) == 1
    assert problems[0].startswith(f"a.jsonl:2: {problem}")


def test_a_missing_column_is_said_once_with_the_nearest_name(tmp_path: Path) -> None:
    rows = json_lines(*[{"prompt": "a", "completions": "b"}] * 5)
    assert scan_problems(tmp_path / "a.jsonl", rows, source={"format": "prompt_completion"}) == [
        "a.jsonl:1: no column completion (there are prompt, completions); did you mean completions? map it with "
        "columns: {completion: ...}",
        "a.jsonl: and 4 more like this (fields that are missing, null or of the wrong type)",
    ]


def test_one_source_holds_one_format(tmp_path: Path) -> None:
    problems = scan_problems(tmp_path / "a.jsonl", json_lines(PAIR, {"text": "b"}))
    assert problems == [
        "a.jsonl:2: this row is text, the rows before it are prompt_completion; set format:, or keep them apart"
    ]


def test_semicolons_between_csv_fields_are_named(tmp_path: Path) -> None:
    problems = scan_problems(tmp_path / "a.csv", "prompt;completion\na;b\n")
    assert problems[0].endswith("write the CSV with commas between its fields")


def test_columns_that_nothing_reads_are_reported(tmp_path: Path) -> None:
    found = scanned(tmp_path / "a.jsonl", json_lines(PAIR | {"id": 1, "source": "x"}))
    assert len(found.warnings) == 1
    assert "columns that are not used" in found.warnings[0] and "(id, source)" in found.warnings[0]


def test_message_keys_that_nothing_reads_are_reported(tmp_path: Path) -> None:
    found = scanned(tmp_path / "a.jsonl", json_lines({"messages": [USER, ASSISTANT | {"id": 0}]}))
    assert "keys nothing reads" in found.warnings[0] and "(id)" in found.warnings[0]


@pytest.mark.parametrize(
    ("roles", "oddity"),
    [
        ("user assistant", None),
        ("system user assistant user assistant", None),
        ("user assistant tool assistant", None),
        ("user assistant tool tool assistant", None),
        ("user assistant user", "ends with user"),
        ("user system assistant", "a system message after the first message"),
        ("user user assistant", "user follows user"),
        ("user assistant assistant", "assistant follows assistant"),
        ("user tool assistant", "tool follows user"),
        ("tool assistant", "the first turn is tool"),
    ],
)
def test_an_unusual_order_of_roles_is_reported(tmp_path: Path, roles: str, oddity: str | None) -> None:
    messages = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles.split())]
    found = scanned(tmp_path / "a.jsonl", json_lines({"messages": messages}))
    said = [warning for warning in found.warnings if "unusual order" in warning]
    assert (oddity is None) == (not said)
    assert all(f"({oddity})" in warning for warning in said)


def test_a_greeting_before_any_question_is_kept_but_said_to_be_untrained(tmp_path: Path) -> None:
    greeting = {"role": "assistant", "content": "Hello!"}
    found = scanned(tmp_path / "a.jsonl", json_lines({"messages": [greeting, USER, ASSISTANT]}))
    assert found.train_rows == 1
    assert any("which is not trained" in warning for warning in found.warnings)


def test_text_arguments_of_a_tool_call_become_an_object(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    row = one_row(tmp_path, {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert isinstance(row, Chat)
    assert row.messages[1] == {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    }


def test_nulls_that_parquet_fills_in_are_no_part_of_a_message(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    messages = [USER | {"name": None}, ASSISTANT | {"name": "Ada"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), path)
    row = rows_of(scan(section(path), seed=0))[0]
    assert isinstance(row, Chat)
    assert row.messages == [USER, ASSISTANT | {"name": "Ada"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": " "},
        {"text": "\n"},
        {"messages": [USER]},
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "system", "content": "a"}, ASSISTANT]},
        {"instruction": "a", "output": ""},
    ],
)
def test_a_row_without_an_answer_is_lost_and_counted(tmp_path: Path, row: dict[str, Any]) -> None:
    good = {key: "a" for key in row} if "messages" not in row else {"messages": [USER, ASSISTANT]}
    found = scanned(tmp_path / "a.jsonl", json_lines(*[good] * 3, row), max_lost_rows=0.25)
    assert (found.train_rows, found.lost) == (3, 1)
    assert "rows without an answer to train on: 1, at" in found.warnings[0] and "a.jsonl:4" in found.warnings[0]
    problems = scan_problems(tmp_path / "a.jsonl", json_lines(*[good] * 3, row), max_lost_rows=0.24)
    assert problems[0] == (
        "data.train: 1 of 4 rows (25.0%) cannot be trained on, more than data.max_lost_rows 0.24 allows; mend them, "
        "or raise it"
    )
    assert problems[1].startswith("data.train: rows without an answer to train on: 1, at a.jsonl:4")


def test_zero_rows_left_is_refused(tmp_path: Path) -> None:
    problems = scan_problems(tmp_path / "a.jsonl", json_lines({"prompt": "a", "completion": ""}), max_lost_rows=1.0)
    assert problems[0] == "data.train: none of the 1 rows can be trained on"
    problems = scan_problems(tmp_path / "b.csv", "prompt,completion\n")
    assert problems == ["data.train: no rows: the files of data.train hold none; check path and limit"]


def test_rows_without_an_answer_are_kept_when_everything_is_trained(tmp_path: Path) -> None:
    assert scanned(tmp_path / "a.jsonl", json_lines({"messages": [USER]}), train_on="all").train_rows == 1


def test_an_empty_prompt_is_reported(tmp_path: Path) -> None:
    found = scanned(tmp_path / "a.jsonl", json_lines({"prompt": "", "completion": "b"}))
    assert found.train_rows == 1 and "rows with an empty prompt or message: 1" in found.warnings[0]
