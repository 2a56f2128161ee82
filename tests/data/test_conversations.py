"""Conversations in the spellings of other tools become the one that chat templates take."""

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lorafit.data import scan
from lorafit.data.conversation import OTHER_NAMES
from lorafit.data.rows import Chat, answers
from lorafit.data.tool_calls import with_argument_text
from support.sources import json_lines, rows_of, scan_problems, scanned, section

USER, ASSISTANT = {"role": "user", "content": "Rain in Rome?"}, {"role": "assistant", "content": "No."}
RESULT = {"role": "tool", "content": "dry"}
WEATHER = {"name": "weather", "arguments": {"city": "Rome"}}
CALL = {"type": "function", "function": WEATHER}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
SCHEMA = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": SCHEMA}


def chat_of(path: Path, row: dict[str, Any], **settings: Any) -> Chat:
    """The row as the one row of a JSON Lines file."""
    (found,) = rows_of(scanned(path / "a.jsonl", json_lines(row), **settings))
    assert isinstance(found, Chat)
    return found


def text(kind: str, value: Any) -> dict[str, Any]:
    return {"type": kind, "text": value}


@pytest.mark.parametrize("role", ["function_call", "tool_call", "Function_Call"])
@pytest.mark.parametrize("value", [WEATHER, [WEATHER], {**WEATHER, "arguments": json.dumps(WEATHER["arguments"])}])
def test_a_message_that_is_a_call_becomes_the_assistants(tmp_path: Path, role: str, value: Any) -> None:
    turns = [("human", USER["content"]), (role, json.dumps(value)), ("observation", "dry"), ("gpt", "No.")]
    row = {"conversations": [{"from": name, "value": said} for name, said in turns], "tools": json.dumps([TOOL])}
    chat = chat_of(tmp_path, row)
    assert chat == Chat((0, 1), [USER, CALLING, RESULT, ASSISTANT], [TOOL], 0)
    assert answers(chat) == [1, 3]


@pytest.mark.parametrize(("name", "role"), [*OTHER_NAMES.items(), ("GPT", "assistant"), ("User", "user")])
def test_roles_have_their_other_names(tmp_path: Path, name: str, role: str) -> None:
    is_call = name in ("function_call", "function-call", "tool_call")
    content = json.dumps(WEATHER) if is_call else "x"
    for key, value in (("role", "content"), ("from", "value"), ("role", "value")):
        chat = chat_of(tmp_path, {"messages": [USER, {key: name, value: content}, ASSISTANT]})
        assert chat.messages[1] == (CALLING if is_call else {"role": role, "content": "x"})


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": [text("text", "Rain "), text("input_text", "in"), " Rome?"]}, USER),
        ({"role": "user", "content": [{"text": "Rain in Rome?"}]}, USER),
        ({"from": "human", "value": "Rain in Rome?", "role": None, "content": None}, USER),
        ({"from": "user", "role": "user", "content": "Rain in Rome?"}, USER),
        (json.dumps(USER), USER),
        (ASSISTANT | {"tool_calls": []}, ASSISTANT),
        (ASSISTANT | {"tool_calls": None, "function_call": None}, ASSISTANT),
        (ASSISTANT | {"function_call": {}}, ASSISTANT),
        ({"role": "assistant", "content": None, "function_call": WEATHER}, CALLING),
        ({"role": "assistant", "function_call": json.dumps(WEATHER)}, CALLING),
        ({"role": "assistant", "tool_calls": json.dumps([CALL])}, CALLING),
        ({"role": "assistant", "tool_calls": [json.dumps(CALL)]}, CALLING),
        ({"role": "assistant", "tool_calls": CALL}, CALLING),
        ({"role": "function", "name": "weather", "content": "dry"}, RESULT | {"name": "weather"}),
        ({"role": "tool", "content": []}, {"role": "tool", "content": ""}),
    ],
)
def test_a_message_is_read_in_any_spelling(tmp_path: Path, message: Any, expected: dict[str, Any]) -> None:
    turns = [USER, message, RESULT, ASSISTANT]
    assert chat_of(tmp_path, {"messages": turns}).messages[1] == expected


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl"])
def test_lists_that_are_stored_as_json_text_are_read(tmp_path: Path, name: str) -> None:
    row = {"messages": json.dumps([USER, CALLING, RESULT, ASSISTANT]), "tools": json.dumps([TOOL])}
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name)
        found = scan(section(tmp_path / name), seed=0)
    else:
        quoted = ",".join('"' + value.replace('"', '""') + '"' for value in row.values())
        content = f"messages,tools\n{quoted}\n" if name == "a.csv" else json_lines(row)
        found = scanned(tmp_path / name, content)
    (chat,) = rows_of(found)
    assert isinstance(chat, Chat)
    assert (chat.messages, chat.tools) == ([USER, CALLING, RESULT, ASSISTANT], [TOOL])


def test_a_prompt_and_its_completion_may_both_be_json_text_of_messages(tmp_path: Path) -> None:
    row = {"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])}
    assert chat_of(tmp_path, row) == Chat((0, 1), [USER, ASSISTANT], None, 1)
    (judged,) = rows_of(scanned(tmp_path / "a.jsonl", json_lines(row | {"completion": "It is polite."})))
    assert judged[2] == row["prompt"]  # a conversation as a text to be judged


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"functions": [SCHEMA]}, [TOOL]),
        ({"functions": json.dumps([SCHEMA]), "tools": None}, [TOOL]),
        ({"tools": [json.dumps(TOOL)]}, [TOOL]),
        ({"tools": [], "functions": ""}, None),
        ({"tools": " "}, None),
    ],
)
def test_tool_schemas_are_read_in_any_spelling(tmp_path: Path, columns: dict[str, Any], expected: Any) -> None:
    found = scanned(tmp_path / "a.jsonl", json_lines({"messages": [USER, ASSISTANT]} | columns))
    (chat,) = rows_of(found)
    assert isinstance(chat, Chat) and chat.tools == expected and found.warnings == ()


@pytest.mark.parametrize("arguments", ["", " ", None, {}, [], "{}", "[]", "null"])
def test_a_call_without_arguments_has_an_empty_object(tmp_path: Path, arguments: Any) -> None:
    for call in ({"name": "now", "arguments": arguments}, {"name": "now"}):
        chat = chat_of(tmp_path, {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": call}]}]})
        assert chat.messages[1]["tool_calls"] == [{"function": {"name": "now", "arguments": {}}}]


def test_the_text_of_arguments_is_kept_as_it_was_written(tmp_path: Path) -> None:
    written = '{"city":  "Rom\\u00e9", "text": null}'
    calls = [{"name": "a", "arguments": written}, {"function": {"name": "b", "arguments": {"city": "Romé"}}}]
    chat = chat_of(tmp_path, {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": calls}]})
    assert chat.messages[1]["tool_calls"][0]["arguments"] == {"city": "Romé", "text": None}
    for messages in (chat.messages, pickle.loads(pickle.dumps(chat.messages))):
        as_text = with_argument_text(messages)
        assert as_text[0] is messages[0]
        assert as_text[1]["tool_calls"] == [
            {"name": "a", "arguments": written},
            {"function": {"name": "b", "arguments": '{"city": "Romé"}'}},
        ]
    assert chat.messages[1]["tool_calls"][0]["arguments"]["city"] == "Romé"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}])
def test_thoughts_alone_are_an_answer(tmp_path: Path, key: str, content: dict[str, Any]) -> None:
    row = {"messages": [USER, {"role": "assistant", key: "It is dry."} | content]}
    found = scanned(tmp_path / "a.jsonl", json_lines(row))
    assert found.train_rows == 1 and found.warnings == ()
    (chat,) = rows_of(found)
    assert isinstance(chat, Chat) and answers(chat) == [1]


def test_an_empty_answer_is_not_taken_for_a_greeting(tmp_path: Path) -> None:
    found = scanned(
        tmp_path / "a.jsonl", json_lines({"messages": [USER, ASSISTANT | {"content": " "}, USER, ASSISTANT]})
    )
    (warning,) = found.warnings
    assert warning.startswith("rows with an empty answer, which is not trained: 1, at ")


def test_a_sequence_of_objects_may_be_an_object_of_sequences(tmp_path: Path) -> None:
    stored = {"from": ["human", "gpt"], "value": [USER["content"], ASSISTANT["content"]]}
    assert chat_of(tmp_path, {"conversations": stored}).messages == [USER, ASSISTANT]
    (problem,) = scan_problems(tmp_path / "a.jsonl", json_lines({"conversations": stored | {"from": ["human"]}}))
    assert problem.startswith("a.jsonl:1: conversations: an object (")


@pytest.mark.parametrize("row", [{"messages": [USER, ASSISTANT]}, {"conversations": [USER, ASSISTANT]}])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_column_is_the_first_message_and_may_say_the_same_as_one(
    tmp_path: Path, row: dict[str, Any], role: str
) -> None:
    (column, turns), *_ = row.items()
    system = {"role": "system", "content": "Be brief."}
    assert chat_of(tmp_path, row | {"system": "Be brief."}).messages == [system, USER, ASSISTANT]
    assert chat_of(tmp_path, row | {"system": ""}).messages == [USER, ASSISTANT]
    own = [system | {"role": role}, *turns]
    assert chat_of(tmp_path, {column: own, "system": "Be brief."}).messages == own
    assert scan_problems(tmp_path / "a.jsonl", json_lines({column: own, "system": "Be long."})) == [
        f'a.jsonl:1: system: text ("Be long."), but {column}[0] is a {role} message of another text; keep one of them'
    ]


@pytest.mark.parametrize("store", [list, json.dumps])
def test_the_history_of_an_alpaca_row_is_its_earlier_turns_and_trained(tmp_path: Path, store: Any) -> None:
    row = {"instruction": "And in", "input": "Oslo?", "output": "Yes.", "system": "Be brief.", "tools": [TOOL]}
    chat = chat_of(tmp_path, row | {"history": store([[USER["content"], "No."]])})
    last = [{"role": "user", "content": "And in\n\nOslo?"}, {"role": "assistant", "content": "Yes."}]
    assert chat.messages == [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, *last]
    assert (answers(chat), chat.tools) == ([2, 4], [TOOL])


def test_a_prompt_may_have_earlier_turns_too(tmp_path: Path) -> None:
    row = {"prompt": "And in Oslo?", "completion": "Yes.", "history": [[USER["content"], "No."]]}
    last = [{"role": "user", "content": "And in Oslo?"}, {"role": "assistant", "content": "Yes."}]
    assert chat_of(tmp_path, row).messages == [USER, ASSISTANT, *last]
    assert scan_problems(tmp_path / "a.jsonl", json_lines(row | {"prompt": [USER]})) == [
        "a.jsonl:1: history: stands beside a list of messages; write the earlier ones into it"
    ]


@pytest.mark.parametrize("history", [None, [], ""])
def test_an_alpaca_row_without_earlier_turns_stays_a_pair(tmp_path: Path, history: Any) -> None:
    row = {"instruction": "Add.", "output": "2"}
    files = [json_lines(row | {"history": history}), json_lines(row)]
    with_history, without = (rows_of(scanned(tmp_path / "a.jsonl", content)) for content in files)
    assert with_history == without


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            {"content": [{"type": "image_url", "image_url": {}}]},
            '.content[0]: a part of type "image_url"; lorafit trai',
        ),
        (
            {"content": [text("text", "a"), {"type": "audio"}]},
            '.content[1]: a part of type "audio"; lorafit trains text',
        ),
        (
            {"content": [text("thinking", "a")]},
            '.content[0]: a part of type text ("thinking"), which nothing reads; wr',
        ),
        ({"content": [{"type": "text"}]}, ".content[0]: no text (there are type); write it as text"),
        ({"content": [text("text", None)]}, ".content[0]: text: null; write it as text"),
        ({"content": [3]}, ".content[0]: a number (3) where text belongs; write it as text"),
        ({"content": {"city": "Rome"}}, '.content: an object ({"city": "Rome"}) where text belongs; write it as text'),
        ({"message": "b"}, ": no content (there are role, message); write the text as content"),
        ({"content": "b", "value": "c"}, ": content and value differ; keep one of them"),
        ({"content": "b", "from": "gpt"}, ": role and from differ; keep one of them"),
        ({"content": "b", "reasoning_content": ["c"]}, '.reasoning_content: a list (["c"]) where text belongs'),
        ({"reasoning_content": ["c"]}, '.reasoning_content: a list (["c"]) where text belongs'),
        ({"thinking": 3, "content": None}, ".thinking: a number (3) where text belongs"),
        ({"content": "b", "name": 3}, ".name: a number (3) where text belongs; write it as text"),
        ({"content": "b", "name": "\ud800"}, ".name: holds half of a surrogate pair"),
        ({"tool_calls": [{"name": "\ud800"}]}, ".tool_calls[0]: holds half of a surrogate pair"),
        ({"content": "b", "images": ["a.png"]}, '.images: a list (["a.png"]); lorafit trains text'),
        ({"tool_calls": [3]}, ".tool_calls[0]: a number (3) where a call belongs; write {"),
        (
            {"tool_calls": [{"function": {}}]},
            ".tool_calls[0].function: no name (there are (none)); write the name of t",
        ),
        ({"tool_calls": [{"name": 3}]}, ".tool_calls[0].name: a number (3)"),
        (
            {"tool_calls": "[{'name': 'a'}]"},
            ".tool_calls: text (\"[{'name': 'a'}]\"): broken JSON: Expecting property na",
        ),
        (
            {"tool_calls": [CALL, {"function": {"name": "a", "arguments": "Rome"}}]},
            '.tool_calls[1].function.arguments: text ("Rome"): broken JSON: Expecting value at column 1; write JSON',
        ),
        (
            {"tool_calls": [{"name": "a", "arguments": "3"}]},
            '.tool_calls[0].arguments: text ("3") where an object belongs; write the arguments as {"city": "Rome"}',
        ),
        ({"tool_calls": [{"name": "a", "arguments": [1]}]}, ".tool_calls[0].arguments: a list ([1]) where an object"),
        (
            {"tool_calls": [{"name": "a", "arguments": '{"x": 1e999}'}]},
            '.tool_calls[0].arguments: text ("{\\"x\\": 1e999}"): 1e999 is beyond what a number can hold',
        ),
        ({"tool_calls": [{"name": "a", "arguments": '{"x": NaN}'}]}, ".tool_calls[0].arguments: text"),
        (
            {"tool_calls": [{"name": "a", "arguments": {"x": "\ud800"}}]},
            ".tool_calls[0].arguments: holds half of a surr",
        ),
        (
            {"tool_calls": [{"name": "a", "parameters": {"x": 1}}]},
            '.tool_calls[0].parameters: an object ({"x": 1}), which nothing reads; name it arguments',
        ),
        ({"tool_calls": [CALL], "function_call": WEATHER}, ": function_call and tool_calls; keep one of them"),
        ({"function_call": "auto"}, '.function_call: text ("auto") where a list of calls belongs'),
    ],
)
def test_what_a_message_cannot_be_is_refused_with_its_place(
    tmp_path: Path, message: dict[str, Any], problem: str
) -> None:
    (said,) = scan_problems(tmp_path / "a.jsonl", json_lines({"messages": [USER, {"role": "assistant"} | message]}))
    assert said.startswith(f"a.jsonl:1: messages[1]{problem}")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": str([USER])},
            "Expecting property name enclosed in double quotes at column 3; write it with json.",
        ),
        ({"messages": "[", "tools": []}, 'messages: text ("["): broken JSON: Expecting value at column 2; write JSON'),
        ({"messages": [USER, ASSISTANT], "tools": [TOOL], "functions": [SCHEMA]}, "tools and functions both hold sche"),
        ({"messages": [USER, ASSISTANT], "functions": SCHEMA}, "functions: an object ("),
        (
            {"messages": [USER, ASSISTANT], "tools": [TOOL, {"type": "function", "function": "weather"}]},
            'tools[1].function: text ("weather") where a schema belongs; write {"name": ',
        ),
        ({"messages": [USER, ASSISTANT], "tools": [{"function": None}]}, "tools[0].function: null where a schema bel"),
        (
            {"messages": [{"role": "user", "tool_calls": [CALL]}, ASSISTANT]},
            "messages[0]: no content (there are role, tool_calls); write the text as content",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            'history[0]: a list (["c"]) where [question, answer]',
        ),
        ({"instruction": "a", "output": "b", "history": {}}, "history: an object ({}) where a list of [question, answ"),
        ({"instruction": "a", "output": "b", "history": "a"}, 'history: text ("a"): broken JSON: Expecting value at c'),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "weather(Rome)"}]},
            'conversations[1].content: text ("weather(Rome)") where a list of calls belongs',
        ),
    ],
)
def test_what_a_column_cannot_be_is_refused_with_its_name(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    (said,) = scan_problems(tmp_path / "a.jsonl", json_lines(row))
    assert said.startswith("a.jsonl:1: ") and problem in said


def test_numbers_that_json_cannot_hold_are_refused_in_parquet_files_too(tmp_path: Path) -> None:
    call = {"name": "sum", "arguments": {"x": float("inf")}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    problems = scan_problems(tmp_path / "a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert problems == [
        "a.parquet:1: messages[1].tool_calls[0].arguments: holds a number that is not finite; write a number, null or "
        "text"
    ]
