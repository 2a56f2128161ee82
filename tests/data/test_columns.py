"""What is said about columns that fit no format, and that following it is right."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from lorafit.data import scan
from lorafit.data.columns import familiar_columns
from lorafit.data.findings import Findings
from lorafit.data.formats import Shaper
from lorafit.data.rows import Chat, Pair, Row, Text, answers
from lorafit.recipe.sections import Source
from support.sources import PAIR, json_lines, rows_of, scan_problems, scanned, section

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5"))
)


def learnt(row: Row) -> list[str]:
    """The texts that would be trained on."""
    if isinstance(row, Chat):
        return [row.messages[index]["content"] for index in answers(row)]
    return [row.completion if isinstance(row, Pair) else row.text]


def advice(problem: str) -> dict[str, Any]:
    """The `format` and `columns` that a message says to write."""
    found = re.search(r"(?:write|e\.g\.) (format: .*)$", problem)
    assert found, problem
    written = yaml.safe_load(f"{{{found[1]}}}")
    assert isinstance(written, dict)
    return written


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "2+2?", "prompt_id": "a", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 4.0},
        {"system": "Count.", "question": "2+2?", "chosen": "4", "rejected": "5"},
        {"system_prompt": "Count.", "question": "2+2?", "chosen": "4", "rejected": "5"},
        {"instruction": "Add.", "input": "2, 2", "chosen": "4", "rejected": "5", "chosen_model": "a"},
        {"query": "2+2?", "chosen_response": "4", "rejected_response": "5"},
        {"prompt": "2+2?", "accepted": "4", "rejected": "5"},
        {"chosen": "4", "rejected": "5"},
    ],
)
def test_preference_data_is_named_and_its_advice_teaches_the_better_answer(tmp_path: Path, row: dict[str, Any]) -> None:
    starts = (("chosen", "accepted"), "reject")
    names = [min((key for key in row if key.startswith(start)), key=len) for start in starts]
    (problem,) = scan_problems(tmp_path / "a.jsonl", json_lines(row))
    assert problem.startswith(
        f"a.jsonl:1: {names[0]} and {names[1]} make this preference data (task: preference), which lorafit does not "
    )
    found = scanned(tmp_path / "a.jsonl", json_lines(row), source=advice(problem))
    assert learnt(rows_of(found)[0]) == ["4"]
    system = (
        [m["content"] for m in rows_of(found)[0].messages if m["role"] == "system"]
        if isinstance(rows_of(found)[0], Chat)
        else []
    )
    asked = system or ([rows_of(found)[0].system] if isinstance(rows_of(found)[0], Pair) else [])
    assert ("Count." in asked) == ("Count." in row.values())


@pytest.mark.parametrize("columns", [{"prompt": "chosen", "completion": "rejected"}, {"completion": "rejected"}])
@pytest.mark.parametrize("given", [{"format": "prompt_completion"}, {}])
def test_the_worse_answer_is_never_learnt(tmp_path: Path, columns: dict[str, str], given: dict[str, str]) -> None:
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    (problem,) = scan_problems(tmp_path / "a.jsonl", json_lines(row), source={"columns": columns} | given)
    assert "preference data" in problem and ": rejected" not in problem


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [USER], "chosen": GOOD, "rejected": BAD},
        {"chosen": [GOOD], "rejected": [BAD]},
    ],
)
def test_answers_apart_from_their_conversation_are_to_be_put_together(tmp_path: Path, row: dict[str, Any]) -> None:
    (problem,) = scan_problems(tmp_path / "a.jsonl", json_lines(row))
    assert problem.endswith("to learn the better answers, write a column messages: the earlier messages, then chosen")


def test_rows_for_training_beside_pairs_are_read_once_the_format_says_so(tmp_path: Path) -> None:
    row = {"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    (problem,) = scan_problems(tmp_path / "a.jsonl", json_lines(row))
    assert "preference data" in problem
    found = scanned(tmp_path / "a.jsonl", json_lines(row), source={"format": "messages"})
    assert learnt(rows_of(found)[0]) == ["4"] and "(chosen)" in found.warnings[0]


def test_preference_data_is_named_even_where_a_format_is_given_that_it_does_not_have(tmp_path: Path) -> None:
    rows = json_lines({"prompt": "2+2?", "chosen": "4", "rejected_completion": "5"})
    (problem,) = scan_problems(tmp_path / "a.jsonl", rows, source={"format": "prompt_completion"})
    assert "preference data" in problem and advice(problem)["columns"] == {"completion": "chosen"}


def test_the_worse_answer_is_not_what_a_missing_column_is_said_to_be(tmp_path: Path) -> None:
    rows = json_lines({"prompt": "2+2?", "rejected_completion": "5"})
    (problem,) = scan_problems(tmp_path / "a.jsonl", rows, source={"format": "prompt_completion"})
    assert "no column completion" in problem and "did you mean" not in problem


def test_marks_of_rows_are_read_from_csv_files(tmp_path: Path) -> None:
    for name, mark, fault in (("weight", "0.5", True), ("weight", "1.0", False), ("label", "False", True)):
        content = f"prompt,completion,{name}\na,b,{mark}\n"
        if fault:
            (problem,) = scan_problems(tmp_path / "a.csv", content)
            assert problem.startswith(f"a.csv:2: {name}: ")
        else:
            assert scanned(tmp_path / "a.csv", content).train_rows == 1


@pytest.mark.parametrize("column", ["label", "kto_tag"])
@pytest.mark.parametrize("row", [PAIR, {"messages": [USER, BAD]}])
def test_an_answer_to_avoid_is_not_learnt(tmp_path: Path, column: str, row: dict[str, Any]) -> None:
    rows = json_lines(row | {column: True}, row | {column: False})
    assert scan_problems(tmp_path / "a.jsonl", rows) == [
        f"a.jsonl:2: {column}: true or false (false) marks an answer to avoid, which makes this preference data (task: "
        f"preference), which lorafit does not train; keep the rows with {column}: true"
    ]


def test_a_label_of_a_class_is_only_a_column_that_is_not_used(tmp_path: Path) -> None:
    for label in (0, 1, "good", None, False):
        found = scanned(tmp_path / "a.jsonl", json_lines({"text": "Fine.", "label": label}))
        assert "(label)" in found.warnings[0]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (
            {"weight": 0.5},
            "weight: a number (0.5), but sources have weights, not rows; put the rows of one weight into ",
        ),
        (
            {"train": False},
            "train: true or false (false) on a whole row; remove the row, or mark messages with train: ",
        ),
        ({"loss_mask": [0, 1]}, "loss_mask: a list ([0, 1]) says which tokens are learnt and is not read; "),
        ({"labels": [-100, 3]}, "labels: a list ([-100, 3]) says which tokens are learnt and is not read; "),
        (
            {"chat_template_kwargs": {"enable_thinking": False, "day": None}},
            'chat_template_kwargs: an object ({"enable_thinking": false, "day": null}) is for one row, and every row '
            "is rendered alike; write data.template_kwargs: {enable_thinking: false}, and train rows with other values "
            "in a run of their own",
        ),
        ({"template_kwargs": "on"}, 'template_kwargs: text ("on"): broken JSON'),
        ({"template_kwargs": [1]}, "template_kwargs: a list ([1]) where an object belongs"),
    ],
)
def test_a_column_that_changes_what_is_learnt_is_refused(tmp_path: Path, columns: dict[str, Any], problem: str) -> None:
    assert scanned(tmp_path / "a.jsonl", json_lines(PAIR | dict.fromkeys(columns))).train_rows == 1
    (said,) = scan_problems(tmp_path / "a.jsonl", json_lines(PAIR, PAIR | columns))
    assert said.startswith(f"a.jsonl:2: {problem}")


@pytest.mark.parametrize(
    "columns", [{"weight": 1}, {"weight": 1.0}, {"weight": "heavy"}, {"train": True}, {"mask": "a cat"}]
)
def test_a_column_that_changes_nothing_is_no_error(tmp_path: Path, columns: dict[str, Any]) -> None:
    found = scanned(tmp_path / "a.jsonl", json_lines(PAIR | columns))
    assert found.train_rows == 1 and "columns that are not used" in found.warnings[0]


def test_a_column_that_the_recipe_maps_is_no_mark(tmp_path: Path) -> None:
    row = {"prompt": "What is its weight?", "weight": "3 kg", "label": "3 kg"}
    found = scanned(tmp_path / "a.jsonl", json_lines(row), source={"columns": {"completion": "label"}})
    assert learnt(rows_of(found)[0]) == ["3 kg"]


def test_tokens_beside_the_text_are_left_out_once_the_format_says_so(tmp_path: Path) -> None:
    rows = json_lines(PAIR | {"labels": [1]})
    assert scanned(tmp_path / "a.jsonl", rows, source={"format": "prompt_completion"}).train_rows == 1


def test_template_variables_that_every_row_has_are_obeyed(tmp_path: Path) -> None:
    row = PAIR | {"chat_template_kwargs": {"enable_thinking": False}}
    found = scanned(tmp_path / "a.jsonl", json_lines(row), template_kwargs={"enable_thinking": False})
    assert found.train_rows == 1 and found.warnings == ()


@pytest.mark.parametrize(
    "placeholder", ["<image>", "<audio>", "<video>", "<image_2>", "<|image_pad|>", "<|vision_start|>"]
)
def test_text_about_a_picture_is_refused_by_the_pictures_name(tmp_path: Path, placeholder: str) -> None:
    row = {"messages": [{"role": "user", "content": f"{placeholder}\nWhat is it?"}, GOOD], "images": ["a.png"]}
    for source in ({}, {"format": "messages"}):
        assert scan_problems(tmp_path / "a.jsonl", json_lines(row), source=source) == [
            f"a.jsonl:1: the text has {placeholder} for what is in images; lorafit trains text, so remove such rows"
        ]
    found = scanned(tmp_path / "a.jsonl", json_lines({"messages": row["messages"], "images": []}))
    assert found.train_rows == 1  # it may be about HTML


def test_a_picture_that_no_format_reads_is_named_with_what_to_write(tmp_path: Path) -> None:
    row = {"image": "a.png", "question": "What is it?", "answer": "A cat."}
    (problem,) = scan_problems(tmp_path / "a.jsonl", json_lines(row))
    assert "lorafit trains text: image would not be learnt; if the text is enough to learn from, write for" in problem
    assert learnt(rows_of(scanned(tmp_path / "a.jsonl", json_lines(row), source=advice(problem)))[0]) == ["A cat."]


WELL_KNOWN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gsm8k": ({"question": "2+2?", "answer": "4"}, ["4"]),
    "dolly": ({"instruction": "Add.", "context": "2, 2", "response": "4", "category": "qa"}, ["4"]),
    "open_orca": ({"id": "a", "system_prompt": "Count.", "question": "2+2?", "response": "4"}, ["4"]),
    "metamath": ({"type": "a", "query": "2+2?", "original_question": "b", "response": "4"}, ["4"]),
    "sql_create_context": ({"question": "2+2?", "context": "CREATE", "answer": "4"}, ["4"]),
    "xlam": ({"id": 1, "query": "2+2?", "answers": "[4]", "tools": "[]"}, ["[4]"]),
    "lmsys": ({"conversation_id": "a", "model": "b", "conversation": [USER, GOOD], "turn": 1}, ["4"]),
    "dialogs": ({"dialog": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, ["4"]),
    "stanford_alpaca": ({"instruction": "2+2?", "input": "", "output": "4", "text": "2+2? 4"}, ["4"]),
    "medical": ({"input": "2+2?", "output": "4"}, ["4"]),
    "capitals": ({"Context": "2, 2", "Question": "Add.", "Response": "4", "#": 1}, ["4"]),
    "odd_name": ({"conversation: all": [USER, GOOD]}, ["4"]),
    "responses": ({"input": [USER], "output": [GOOD]}, ["4"]),
    "stories": ({"story": "4"}, ["4"]),
    "instructions": ({"instruction": "Add.", "input": "2, 2", "response": "4"}, ["4"]),
}


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_the_columns_of_well_known_data_sets_are_mapped_with_nothing_left_out(tmp_path: Path, name: str) -> None:
    row, expected = WELL_KNOWN[name]
    found = scanned(tmp_path / "a.jsonl", json_lines(row), source=familiar_columns(row))
    assert learnt(rows_of(found)[0]) == expected
    given = str(rows_of(found)[0])
    assert all(text in given for text in ("Add.", "2, 2", "Count.", "CREATE") if text in row.values())
    if name != "stanford_alpaca":  # which fits two formats
        (problem,) = scan_problems(tmp_path / "a.jsonl", json_lines(row))
        assert advice(problem) == familiar_columns(row)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "2+2?", "context": "a", "answers": {"text": ["4"]}},
        {"question": "2+2?", "answer": 4},
        {"dialog": [{"input": "2+2?", "output": "4"}]},
        {"problem": "2+2?", "solution": "Two and two", "answer": "4"},
        {"question": "2+2?", "prompt": "Think.", "answer": "4"},
        {"left": "a", "right": "b"},
        {"first": [USER, GOOD], "second": [USER, BAD]},
        {"input_ids": [1], "labels": [1]},
        {},
    ],
)
def test_nothing_is_proposed_where_two_columns_could_be_meant(tmp_path: Path, row: dict[str, Any]) -> None:
    assert familiar_columns(row) == {}
    (problem,) = scan_problems(tmp_path / "a.jsonl", json_lines(row))
    assert "fit no format" in problem
    assert problem.endswith(("columns: {prompt: ..., completion: ...}", "tokens are made of it here"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "2+2?", "answer": 4}, ", and answer is a number (4) where text belongs; "),
        (
            {"question": "2+2?", "answers": {"text": []}},
            ', and answers is an object ({"text": []}) where text belongs; ',
        ),
        (
            {"dialog": [{"input": "2+2?", "output": "4"}]},
            ", and the objects of dialog have no role and content (there ",
        ),
    ],
)
def test_what_stands_in_the_way_of_a_format_is_named(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    (problem,) = scan_problems(tmp_path / "a.jsonl", json_lines(row))
    assert f"fit no format{reason}" in problem


def test_a_given_format_without_its_columns_is_answered_with_those_that_are_meant(tmp_path: Path) -> None:
    rows = json_lines({"question": "2+2?", "answer": "4"})
    (problem,) = scan_problems(tmp_path / "a.jsonl", rows, source={"format": "prompt_completion"})
    assert problem.endswith("(there are question, answer); write columns: {prompt: question, completion: answer}")


def test_the_columns_that_a_reader_needs_are_those_that_are_read_or_checked() -> None:
    names = ["id", "prompt", "completion", "image", "weight", "tools"]
    data = section("a.parquet")
    findings = Findings()
    shaper = Shaper(Source(path="a.parquet"), findings, section=data)
    assert shaper.needed(names) == ["prompt", "completion", "weight", "tools"]
    shaper.report_columns((0, 0))
    assert [found.message for kind in ("not_learnt", "unused_columns") for found in findings.first[kind]] == [
        "image",
        "id, weight",
    ]
    row = {"prompt": "<image> What?", "completion": "A cat.", "weight": 1, "tools": None}
    findings = Findings()
    shaper = Shaper(Source(path="a.parquet"), findings, section=data)
    shaper.needed(names)
    assert shaper.shape(row, (0, 1)) is None
    assert findings.problems("error", ["a.parquet"])[0].message.startswith("the text has <image> for what is in image;")


@pytest.mark.parametrize(
    ("names", "needed"),
    [
        (["question", "answer", "image"], ["question", "answer"]),
        (["chosen", "rejected", "prompt", "completion", "id"], ["chosen", "rejected", "prompt", "completion"]),
    ],
)
def test_what_has_no_plain_format_is_read_as_far_as_its_refusal_needs(names: list[str], needed: list[str]) -> None:
    shaper = Shaper(Source(path="a.parquet"), Findings(), section=section("a.parquet"))
    assert shaper.needed(names) == needed


def test_a_missing_column_of_a_parquet_file_is_said_with_those_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"question": "2+2?", "answer": "4"}]), path)
    problems = scan_problems(path, path.read_bytes(), source={"format": "prompt_completion"})
    assert problems[0].startswith("a.parquet:1: no column prompt (there are question, answer)")


def test_a_picture_beside_text_that_does_not_speak_of_it_is_said_to_be_unused(tmp_path: Path) -> None:
    row = PAIR | {"image": {"bytes": b"\x89PNG", "path": "a.png"}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    found = scan(section(tmp_path / "a.parquet"), seed=0)
    assert found.train_rows == 1 and "films, which are not learnt: 1, at" in found.warnings[0]
    assert "(image)" in found.warnings[0]


def test_text_rows_are_no_conversation(tmp_path: Path) -> None:
    (row,) = rows_of(scanned(tmp_path / "a.jsonl", json_lines({"text": "a", "messages_of": 3})))
    assert isinstance(row, Text)
