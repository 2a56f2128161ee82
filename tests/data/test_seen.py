"""Everything a row hands to the template is in what the template writes, or it is said what is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorafit.data.seen import missing, missing_tool
from support.families import FAMILIES, TOOL, answer, made_of, refused, user
from support.sources import CHATML, prepare_problems, prepared, prompt_ids, section, trained_texts, word_tokenizer
from support.tiny import write_jsonl

DROPPED = "rows of which the template drops part of an answer: 1, at a.jsonl:1"


def called(arguments: Any = None, content: str | None = None, **more: Any) -> dict[str, Any]:
    given = {"city": "Rome"} if arguments is None else arguments
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": given}}
    return {"role": "assistant", "content": content, "tool_calls": [call]} | more


RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "It is blue."}
LOOP = [user("The weather of Rome?"), called(), RESULT, answer("Blue.")]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_that_the_template_never_shows_is_lost_content(tmp_path: Path, key: str) -> None:
    row = {"messages": [user("One?"), answer("Two.", **{key: "One and one."})]}
    assert f"{DROPPED} (the reasoning of message 2)" in refused(tmp_path, "llama3", row)[1]


def test_reasoning_that_a_template_strips_from_history_is_learnt_where_it_is_the_last(tmp_path: Path) -> None:
    messages = [user("One?"), answer("Two.", thinking="Next."), user("And?"), answer("Three.", thinking="Again.")]
    trained, made = made_of(tmp_path, "qwen3", {"messages": messages})
    assert trained == [
        ["<think>\nNext.\n</think>\n\nTwo.<|im_end|>\n"],
        ["<think>\nAgain.\n</think>\n\nThree.<|im_end|>\n"],
    ]
    assert made.audit.train.lost == 0


@pytest.mark.parametrize("content", [None, "", "I call weather for the city Rome."])
def test_a_call_that_the_template_drops_is_lost_whatever_the_text_says(tmp_path: Path, content: str | None) -> None:
    row = {"messages": [LOOP[0], called(content=content), *LOOP[2:]]}
    template = CHATML.replace("m.content", "(m.content or '')")
    data = section(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert f"{DROPPED} (the tool call weather of message 2)" in prepare_problems(data, word_tokenizer(template))[1]


def test_what_the_question_says_is_not_taken_for_the_answer(tmp_path: Path) -> None:
    both = called()
    both["tool_calls"] = [*both["tool_calls"], *called({"city": "Oslo"})["tool_calls"]]
    row = {"messages": [user("Rome, Oslo?"), both, RESULT, RESULT, answer("Blue.")], "tools": [TOOL]}
    # This template renders the first call alone.
    assert f"{DROPPED} (the tool call weather of message 2)" in refused(tmp_path, "harmony", row)[1]
    template = CHATML.replace("m.content", "('' if m.role == 'assistant' else m.content)")
    data = section(write_jsonl(tmp_path / "a.jsonl", [{"messages": [user("Say blue."), answer("blue.")]}]))
    assert f"{DROPPED} (the text of message 2)" in prepare_problems(data, word_tokenizer(template))[1]


def test_an_answer_may_begin_in_the_prompt_of_generation(tmp_path: Path) -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    row = {"messages": [user("One?"), answer("<think>Next.</think>Two.")]}
    tokenizer = word_tokenizer(template)
    made = prepared(section(write_jsonl(tmp_path / "a.jsonl", [row])), tokenizer)
    assert trained_texts(made, tokenizer) == [["Next.</think>Two.<|im_end|>\n"]] and made.audit.warnings == ()


def test_a_call_of_which_the_template_drops_the_arguments_is_lost(tmp_path: Path) -> None:
    template = CHATML.replace("m.content", "(m.content or m.tool_calls[0].function.name)")
    data = section(write_jsonl(tmp_path / "a.jsonl", [{"messages": LOOP}]))
    assert f"{DROPPED} (the tool call weather of message 2)" in prepare_problems(data, word_tokenizer(template))[1]


@pytest.mark.parametrize(
    "written",
    [
        'weather {"city": "New\\nRome", "days": 3, "where": {"é": [true, 1.5]}}',
        "weather(city=New\nRome, days=3, where.é=[True, 1.5])",
        'weather {"where":{"\\u00e9":[true,1.5]},"days":3,\n"city":"New\\nRome"}',
        "weather: city: New Rome; days: 3; where: é: true, 1.5",
    ],
)
def test_arguments_are_found_in_whatever_layout_they_are_written(written: str) -> None:
    arguments = {"city": "New\nRome", "days": 3, "where": {"é": [True, 1.5]}}
    assert missing(called(arguments), written, with_reasoning=True) is None
    for gone in ("Rome", "3", "1.5", "days"):
        assert missing(called(arguments), written.replace(gone, ""), with_reasoning=True) == "tool call weather"


def test_what_is_left_of_an_earlier_answer_is_looked_for_without_its_reasoning() -> None:
    message = answer("<think>One and one.</think>\nTwo.")
    assert missing(message, "Two.", with_reasoning=True) == "text"
    assert missing(message, "Two.", with_reasoning=False) is None
    assert missing(message, "Three.", with_reasoning=False) == "text"


def test_a_tool_that_the_template_does_not_name_is_reported(tmp_path: Path) -> None:
    for question in ("One?", "The weather of Rome?"):
        _, made = made_of(tmp_path, "chatml", {"messages": [user(question), answer("Two.")], "tools": [TOOL]})
        (warning,) = made.audit.warnings
        assert "drops a message's text, a call or a tool: 1" in warning and "(the tool weather)" in warning


@pytest.mark.parametrize("family", ["qwen25", "qwen3", "llama3", "mistral", "harmony", "named"])
def test_tools_that_a_template_writes_in_its_own_layout_are_seen(tmp_path: Path, family: str) -> None:
    _, made = made_of(tmp_path, family, {"messages": LOOP, "tools": [TOOL]})
    assert made.audit.train.lost == 0 and not any("drops" in warning for warning in made.audit.warnings)


def test_a_name_that_stands_in_the_messages_is_not_taken_for_the_tool() -> None:
    bare = [{"type": "function", "function": {"name": "weather"}}]
    assert missing_tool(bare, "tools: weather; Is weather bad?", lambda: "Is weather bad?") is None
    assert missing_tool(bare, "Is weather bad?", lambda: "Is weather bad?") == "weather"
    assert missing_tool(bare, "Is it bad?", lambda: "Is it bad?") == "weather"


@pytest.mark.parametrize("given", [{"city": "Rome"}, '{"city":"Rome"}'])
def test_arguments_are_text_as_given_where_the_template_joins_text(tmp_path: Path, given: Any) -> None:
    row = {"messages": [LOOP[0], called(given, content=""), *LOOP[2:]]}
    trained, made = made_of(tmp_path, "deepseek_r1", row)
    text = given if isinstance(given, str) else json.dumps(given)
    assert trained[0][0] == f"<|tool_calls|>weather\n```json\n{text}\n```<|end_of_sentence|>"
    assert made.audit.train.lost == 0


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("{{ m.tool_calls[0].function.arguments }}", '{"city":"Rome"}'),  # would write Python
        ("{{ 'weather' ~ m.tool_calls[0].function.arguments }}", 'weather{"city":"Rome"}'),
        ("{{ m.tool_calls[0].function.arguments + '' }}", '{"city":"Rome"}'),
        ("{{ m.tool_calls[0].function.arguments | tojson }}", '{"city": "Rome"}'),
        (
            "{% for key, value in m.tool_calls[0].function.arguments.items() %}{{ key }}={{ value }}{% endfor %}",
            "city=Rome",
        ),
    ],
)
def test_no_template_gets_arguments_it_writes_wrongly(tmp_path: Path, call: str, expected: str) -> None:
    turn = "{% if m.tool_calls %}weather " + call + "{% else %}{{ m.content }}{% endif %}"
    tokenizer = word_tokenizer(CHATML.replace("{{ m.content }}", turn))
    row = {"messages": [LOOP[0], called('{"city":"Rome"}'), *LOOP[2:]]}
    made = prepared(section(write_jsonl(tmp_path / "a.jsonl", [row])), tokenizer)
    assert trained_texts(made, tokenizer)[0][0] == f"weather {expected}<|im_end|>\n"


def test_a_template_that_asks_whether_the_text_is_none_is_given_none(tmp_path: Path) -> None:
    turn = "{% if m['content'] is none %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m['content'] }}{% endif %}"
    tokenizer = word_tokenizer(CHATML.replace("{{ m.content }}", turn))
    made = prepared(section(write_jsonl(tmp_path / "a.jsonl", [{"messages": LOOP}])), tokenizer)
    assert trained_texts(made, tokenizer)[0][0].startswith('{"name": "weather", "arguments": {"city": "Rome"}}')


def test_what_is_lost_is_what_the_template_drops_once_it_takes_the_call(tmp_path: Path) -> None:
    row = {"messages": [LOOP[0], called(reasoning="Ask."), *LOOP[2:]]}
    assert f"{DROPPED} (the reasoning of message 2)" in refused(tmp_path, "deepseek_r1", row)[1]


def test_an_empty_thought_is_said_once_with_the_setting_that_decides_it(tmp_path: Path) -> None:
    rows = [{"messages": [user(question), answer("Two.")]} for question in ("One?", "And?")]
    trained, made = made_of(tmp_path, "qwen3", *rows)
    assert trained == [["<think>\n\n</think>\n\nTwo.<|im_end|>\n"]] * 2
    (warning,) = made.audit.warnings
    assert "answers without reasoning before which the template writes an empty thought, trained" in warning
    assert warning.count("'<think>\\n\\n</think>\\n\\n'; data.template_kwargs: {enable_thinking: false} puts it") == 1
    trained, made = made_of(tmp_path, "qwen3", *rows, template_kwargs={"enable_thinking": False})
    assert trained == [["Two.<|im_end|>\n"]] * 2 and made.audit.warnings == ()


def test_a_thought_that_generation_opens_and_rows_do_not_have_is_said_with_the_setting(tmp_path: Path) -> None:
    prompt = "assistant\n{% if thinks is not defined or thinks %}<think>\n{% endif %}{% endif %}"
    tokenizer = word_tokenizer("{% if aside %}aside{% endif %}" + CHATML.replace("assistant\n{% endif %}", prompt))
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"messages": [user("One?"), answer("Two."), user("And?"), answer("No.")]}]
    )
    (warning,) = prepared(section(path), tokenizer).audit.warnings
    assert "answers that follow another text in training than in generation: 2" in warning
    said = "(generation begins an answer with '<|im_start|>assistant\\n<think>\\n'; data.template_kwargs: "
    assert warning.count(said + "{thinks: false} makes both the same)") == 1
    assert prepared(section(path, template_kwargs={"thinks": False}), tokenizer).audit.warnings == ()


def test_a_channel_and_a_thought_that_was_given_are_no_empty_thought(tmp_path: Path) -> None:
    for family, message in (("harmony", answer("Two.")), ("qwen3", answer("Two.", reasoning="Next."))):
        assert made_of(tmp_path, family, {"messages": [user("One?"), message]})[1].audit.warnings == ()


def test_a_header_that_is_trained_for_want_of_a_generation_prompt_is_reported(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(CHATML.split("{% if add")[0])
    row = {"messages": [user("One?"), answer("Two.")]}
    made = prepared(section(write_jsonl(tmp_path / "a.jsonl", [row])), tokenizer)
    assert trained_texts(made, tokenizer) == [["<|im_start|>assistant\nTwo.<|im_end|>\n"]]
    assert "trained with the header before them, since the template has no generation prompt" in made.audit.warnings[0]
    assert "('<|im_start|>assistant\\n')" in made.audit.warnings[0]
    for family in ("mistral", "glm4", "llama3"):
        assert made_of(tmp_path, family, row)[1].audit.warnings == ()


def test_white_space_that_a_special_token_swallows_does_not_make_it_trained(tmp_path: Path) -> None:
    rows = [{"messages": [user("One?"), answer(text)]} for text in ("    return 4", "\n\nTwo.", "Two.")]
    trained, made = made_of(tmp_path, "phi3", *rows)
    assert trained == [[f"{text}<|end|><|endoftext|>"] for text in ("return 4", "Two.", "Two.")]
    (warning,) = made.audit.warnings
    assert "white space at the start the tokenizer drops, as part of the special token before it: 2" in warning
    assert "(<|assistant|>)" in warning


def test_labels_are_those_of_sfttrainer_where_a_token_swallows_white_space(tmp_path: Path) -> None:
    from trl.data_utils import common_prefix_length

    tokenizer = FAMILIES["phi3"].tokenizer()
    prompt, completion = [user("One?")], [answer("  Two.")]
    asked = prompt_ids(tokenizer, prompt)
    whole = prompt_ids(tokenizer, prompt + completion, add_generation_prompt=False)
    _, made = made_of(tmp_path, "phi3", {"messages": prompt + completion})
    start = common_prefix_length(asked, whole)
    assert made.train[0]["labels"] == [-100] * start + whole[start:]
