"""Which answers are trained in which sequences: the last alone, marked ones, and templates that render history anew."""

import time
from pathlib import Path
from typing import Any

import pytest

from lorafit.data.findings import Findings
from lorafit.data.render import Renderer
from lorafit.data.rows import Chat, system_merged
from lorafit.recipe.sections import DataSection
from support.families import CONVERSATIONS, FAMILIES, TOOL, answer, conversation_row, made_of, refused, user
from support.sources import PAIR, prompt_ids


def renderer_of(family: str) -> Renderer:
    tokenizer = FAMILIES[family].tokenizer()
    data = DataSection.model_validate({"train": [{"path": "a.jsonl"}]})
    return Renderer(data, tokenizer, stop_token_ids=FAMILIES[family].stop_token_ids(tokenizer))


THINKERS = ("qwen3", "harmony")
TURNS = [user("One?"), answer("Two."), user("And?"), answer("Three.")]
THINKING = [TURNS[0], TURNS[1] | {"reasoning_content": "Next."}, TURNS[2], TURNS[3] | {"reasoning_content": "Again."}]


def test_the_last_answer_alone_is_trained_when_the_recipe_says_so(tmp_path: Path) -> None:
    every, _ = made_of(tmp_path, "chatml", {"messages": TURNS})
    last, _ = made_of(tmp_path, "chatml", {"messages": TURNS}, train_on="last_answer")
    assert every == [["Two.<|im_end|>\n", "Three.<|im_end|>\n"]] and last == [["Three.<|im_end|>\n"]]


def test_the_last_answer_is_not_the_one_before_a_last_one_that_is_marked(tmp_path: Path) -> None:
    rows = {"messages": [*TURNS[:3], answer("Nine.", train=False)]}, {"messages": TURNS}
    trained, made = made_of(tmp_path, "chatml", *rows, train_on="last_answer", max_lost_rows=0.5)
    assert trained == [["Three.<|im_end|>\n"]] and made.audit.train.lost == 1
    assert "left out by train: false" in made.audit.warnings[0]


def test_a_marked_answer_is_no_part_of_the_labels_under_any_choice(tmp_path: Path) -> None:
    row = {"messages": [TURNS[0], answer("Nine.", train=False), *TURNS[2:]]}
    for train_on in ("answers", "last_answer"):
        assert made_of(tmp_path, "chatml", row, train_on=train_on)[0] == [["Three.<|im_end|>\n"]]
    before, after = made_of(tmp_path, "chatml", row, train_on="all")[0][0]
    assert before == "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    assert after.startswith("<|im_start|>user\nAnd?") and after.endswith("Three.<|im_end|>\n")


@pytest.mark.parametrize(
    ("family", "index", "left"),
    [
        ("chatml", 0, ["<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"]),
        ("phi3", 1, ["<|user|>\nOne?<|end|>\n<|assistant|>", "<|user|>\nAnd?<|end|>\n"]),
        ("harmony", 1, ["One?<|end|><|start|>assistant", "<|end|><|start|>user<|message|>And?<|end|>"]),
        ("harmony", 3, ["<|start|>assistant<|channel|>final<|message|>Two.<|end|><|start|>user<|message|>And?<|end|>"]),
        ("qwen3", 1, ["One?<|im_end|>\n<|im_start|>assistant\n|\n<|im_start|>user\nAnd?<|im_end|>\n"]),
        ("glm4", 1, ["[gMASK]<sop><|user|>\nOne?<|assistant|>\n", "\nAnd?"]),
    ],
)
def test_any_message_can_be_left_out_where_everything_is_trained(
    tmp_path: Path, family: str, index: int, left: list[str]
) -> None:
    messages = [message | ({"train": False} if at == index else {}) for at, message in enumerate(TURNS)]
    (trained,), made = made_of(tmp_path, family, {"messages": messages}, train_on="all")
    squeezed = "|".join(trained).replace("\n", "")
    assert all(text.replace("\n", "") in squeezed for text in left)
    assert messages[index]["content"] not in squeezed
    assert made.audit.train.lost == 0


def test_a_message_that_cannot_be_told_apart_is_lost_where_everything_is_trained(tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    marked = {"role": "assistant", "tool_calls": [call], "train": False}
    row = {"messages": [user("Rome?"), marked, {"role": "tool", "content": "blue"}, *TURNS[1:]], "tools": [TOOL]}
    assert "(message 2 is marked as untrained)" in refused(tmp_path, "qwen3", row, train_on="all")[1]


def test_the_calls_of_a_message_are_left_out_with_its_text(tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    turns = [user("Sky?"), answer("Look.", tool_calls=[call], train=False), {"role": "tool", "content": "blue"}]
    row = {"messages": [*turns, answer("Blue.")], "tools": [TOOL]}
    (trained,), _ = made_of(tmp_path, "qwen3", row, train_on="all")
    said = "".join(trained)
    assert all(text in said for text in ("Sky?", "blue", "Blue."))
    assert "Look." not in said and "Rome" not in said


def test_a_chat_of_80_turns_that_loses_its_reasoning_takes_a_part_of_a_second() -> None:
    renderer = renderer_of("qwen3")

    def chat(turns: int) -> Chat:
        thinking = [answer(f"Answer {i}." * 20, reasoning_content=f"Thought {i}." * 10) for i in range(turns)]
        return Chat((0, 1), [part for i in range(turns) for part in (user(f"Question {i}"), thinking[i])], None, 0)

    renderer.render(chat(2), Findings())
    findings = Findings()
    times = []
    for _ in range(2):
        start = time.process_time()
        made = renderer.render(chat(80), findings)
        times.append(time.process_time() - start)
    assert min(times) < 0.3
    assert len(made) == 80 and all(len(sequence.spans) == 1 for sequence in made)
    assert findings.first["split"][0].message == "80 answers in 80 sequences: 40 times the text"


def test_what_chats_cost_that_lose_their_reasoning_is_said_before_they_are_prepared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": THINKING * times} for times in (1, 5, 2)]
    made_of(tmp_path, "qwen3", *rows)
    (said,) = [record.message for record in caplog.records if record.name == "lorafit.data.render"]
    assert said.startswith(f"{tmp_path / 'a.jsonl'}:2: ") and "10 answers become 10 sequences with 5." in said
    assert "data.train_on: last_answer trains the last answer of each alone" in said
    caplog.clear()
    made_of(tmp_path, "qwen3", *rows, train_on="last_answer")
    made_of(tmp_path, "chatml", *[{"messages": TURNS * 9}])
    assert not caplog.records


def test_each_prefix_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit.data.chat_template import ChatTemplate

    rendered = []
    render = ChatTemplate.render

    def counted(self: Any, messages: Any, tools: Any, *, is_prompt: bool = False) -> str:
        rendered.append((len(messages), is_prompt))
        return render(self, messages, tools, is_prompt=is_prompt)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    assert len(renderer_of("qwen3").render(Chat((0, 1), THINKING * 5, None, 0), Findings())) == 10
    assert len(rendered) == len(set(rendered)) == 2 * 10


def test_answers_of_one_tool_loop_share_a_sequence_where_its_reasoning_stays(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    loop = [
        user("Rome?"),
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "Ask."},
        {"role": "tool", "content": "Blue."},
        answer("It is blue.", reasoning_content="Tell."),
    ]
    trained, _ = made_of(tmp_path, "qwen3", {"messages": [*loop, *THINKING], "tools": [TOOL]})
    assert [[text.split("</think>")[0] for text in sequence] for sequence in trained] == [
        ["<think>\nAsk.\n", "<think>\nTell.\n"],
        ["<think>\nNext.\n"],
        ["<think>\nAgain.\n"],
    ]


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_a_row_the_template_refuses_is_lost_and_the_others_are_trained(tmp_path: Path, family: str) -> None:
    good, bad = {"messages": TURNS}, {"messages": [user("One?"), user("And?"), {"role": "developer", "content": "x"}]}
    bad["messages"].append(answer("Two."))
    _, made = made_of(tmp_path, family, good, bad, max_lost_rows=0.5)
    assert made.audit.train.lost == 1 and "rows that cannot be rendered: 1, at" in made.audit.warnings[0]
    assert "data.system" not in made.audit.warnings[0]  # it would not help
    assert refused(tmp_path, family, good, bad)[0].startswith("data.train: 1 of 2 rows (50.0%) cannot be trained on")


def test_a_system_text_goes_where_the_recipe_says(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "Count on."}, *TURNS]}
    said = refused(tmp_path, "gemma2", row)[1]
    assert "(the template refuses this row: System role not supported; data.system: merge puts the system text" in said
    trained, made = made_of(tmp_path, "gemma2", row, system="merge")
    assert trained == [["Two.<end_of_turn>\n", "Three.<end_of_turn>\n"]]
    text = str(FAMILIES["gemma2"].tokenizer().decode(made.train[0]["input_ids"]))
    assert text.startswith("<bos><start_of_turn>user\nCount on.\n\nOne?<end_of_turn>")
    for template in ("plain", "alpaca"):
        pair = PAIR | {"system": "Count on."}
        _, made = made_of(tmp_path, "chatml", pair, system="merge", template=template)
        assert "Count on.\n\nOne?" in FAMILIES["chatml"].tokenizer().decode(made.train[0]["input_ids"])


def test_a_merged_system_text_moves_the_marks_and_the_first_answer() -> None:
    messages = [{"role": "system", "content": "Count on."}, *TURNS]
    merged = system_merged(Chat((0, 1), messages, None, 3, frozenset({2})))
    assert merged is not None
    assert (merged.messages[0]["content"], merged.first_answer, merged.untrained) == ("Count on.\n\nOne?", 2, {1})
    assert system_merged(Chat((0, 1), TURNS, None, 0)) is None
    assert messages[1]["content"] == "One?"


def test_an_answer_that_differs_in_its_closing_token_alone_has_its_own_sequence(tmp_path: Path) -> None:
    trained, made = made_of(tmp_path, "harmony", {"messages": TURNS})
    opening = "<|channel|>final<|message|>"
    assert trained == [[f"{opening}Two.<|return|>"], [f"{opening}Three.<|return|>"]]
    assert "2 answers in 2 sequences" in made.audit.warnings[0]
    # One more token after the one that closes every turn changes nothing.
    assert made_of(tmp_path, "phi3", {"messages": TURNS})[0] == [["Two.<|end|>", "Three.<|end|><|endoftext|>"]]


@pytest.mark.parametrize("train_on", ["answers", "last_answer"])
@pytest.mark.parametrize(
    "family", ["llama3", "chatml", "qwen25", "qwen3", "gemma3", "mistral", "phi3", "harmony", "glm4"]
)
def test_every_answer_is_trained_once_after_the_tokens_of_its_prompt(
    tmp_path: Path, family: str, train_on: str
) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    for name, messages in CONVERSATIONS.items():
        tools = [TOOL] if "tools" in name else None
        if (tools and family in ("chatml", "gemma3", "phi3", "glm4")) or ("think" in name and family not in THINKERS):
            continue  # what these templates drop or refuse
        _, made = made_of(tmp_path, family, conversation_row(name), train_on=train_on)
        prompts = [
            prompt_ids(tokenizer, messages[:index], tools)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        before = [
            row["input_ids"][:start]
            for row in made.train
            for start in range(1, len(row["labels"]))
            if row["labels"][start] != -100 == row["labels"][start - 1]
        ]
        assert before == (prompts if train_on == "answers" else prompts[-1:])


def test_an_answer_stands_after_the_prompt_that_generation_sees(tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        user("Rome?"),
        {"role": "assistant", "tool_calls": [call], "thinking": "Ask."},
        {"role": "tool", "content": "blue"},
        answer("Blue.", thinking="Tell."),
    ]
    (trained,), made = made_of(tmp_path, "harmony", {"messages": messages, "tools": [TOOL]})
    thought = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
    assert trained == [
        thought.format("Ask.") + ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
        thought.format("Tell.") + "<|channel|>final<|message|>Blue.<|return|>",
    ]
    tokenizer = FAMILIES["harmony"].tokenizer()
    prompt = prompt_ids(tokenizer, messages[:3], [TOOL])
    assert made.train[0]["input_ids"][: len(prompt)] == prompt
    assert "answers set after the prompt that generation sees" in made.audit.warnings[0]


def test_a_second_answer_in_a_row_stands_after_the_first_as_generation_sees_it(tmp_path: Path) -> None:
    messages = [user("One?"), answer("Two."), answer("Three.")]
    trained, made = made_of(tmp_path, "qwen3", {"messages": messages})
    assert trained == [[f"<think>\n\n</think>\n\n{text}<|im_end|>\n" for text in ("Two.", "Three.")]]
    tokenizer = FAMILIES["qwen3"].tokenizer()
    prompt = prompt_ids(tokenizer, messages[:2])
    assert made.train[0]["input_ids"][: len(prompt)] == prompt


def test_the_marker_of_the_next_speaker_is_trained_where_generation_stops_on_it(tmp_path: Path) -> None:
    assert made_of(tmp_path, "glm4", {"messages": TURNS})[0] == [["Two.<|user|>", "Three.<|user|>"]]
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    loop = [user("Rome?"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "blue"}]
    weather = 'weather\n{"city": "Rome"}<|observation|>'
    assert made_of(tmp_path, "glm4", {"messages": loop[:2]})[0] == [[weather]]
    assert made_of(tmp_path, "glm4", {"messages": [*loop, *TURNS[1:]]})[0] == [
        [weather, "Two.<|user|>", "Three.<|user|>"],
    ]
    (whole,), _ = made_of(tmp_path, "glm4", {"messages": TURNS}, train_on="all")
    assert whole[0].endswith("Three.<|user|>")
