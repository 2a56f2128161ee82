"""Which tokens are trained, template by template: decoded, the trained stretches are the answers with their stop."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lorafit.data.chat_template import ChatTemplate
from lorafit.data.problems import RowProblem
from lorafit.errors import DataError, ModelError, RecipeError
from support.sources import (
    CHATML,
    PAIR,
    TURNS,
    TWO_TURNS,
    ids_of,
    prepare_problems,
    prepared,
    prompt_ids,
    section,
    trained_texts,
    word_tokenizer,
)
from support.tiny import write_jsonl

LLAMA3 = "{{ bos_token }}" + TURNS + "<|im_start|>{{ m.role }}<|im_end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
LLAMA3 += "{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}"
LLAMA2 = TURNS + "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
LLAMA2 += "{% elif m.role == 'assistant' %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
MISTRAL = "{{ bos_token }}" + TURNS
MISTRAL += "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('only user and assistant') }}{% endif %}"
MISTRAL += "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
MISTRAL += "{% endfor %}"
GEMMA = "{{ bos_token }}" + TURNS + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
GEMMA += "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
GEMMA += "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
# Closes every finished conversation with one more token, as Phi-3 does.
CLOSING = CHATML.replace("{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add")
GENERATION = TURNS + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
GENERATION += "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
GENERATION += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Keeps the reasoning of the last turn alone, as Qwen3 does: earlier answers change once others follow.
THINKING = TURNS + "<|im_start|>{{ m.role }}\n{% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}"
THINKING += "{{ m.content.split('</think>')[-1].lstrip() }}{% endif %}<|im_end|>\n{% endfor %}"
THINKING += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + TURNS + "<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
TOOLS += "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
TOOLS += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

SYSTEM = {"role": "system", "content": "the question"}


def labels_of(tmp_path: Path, chat_template: str, rows: list[Any], **settings: Any) -> tuple[list[list[str]], Any]:
    stop_names = settings.pop("stops", ["<|im_end|>"])
    tokenizer = word_tokenizer(chat_template, **settings.pop("names", {}))
    data = section(write_jsonl(tmp_path / "a.jsonl", rows), **settings)
    stops = ids_of(tokenizer, *stop_names)
    made = prepared(data, tokenizer, stops=stops)
    assert all(
        label in (-100, token)
        for row in made.train
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )
    return trained_texts(made, tokenizer), made


@pytest.mark.parametrize(
    ("template", "messages", "expected", "settings"),
    [
        (CHATML, [SYSTEM, *TWO_TURNS], ["{}<|im_end|>\n", "{}<|im_end|>\n"], {}),
        (LLAMA3, [SYSTEM, *TWO_TURNS], ["{}<|eot|>", "{}<|eot|>"], {"stops": ["<|eot|>", "<|im_end|>"]}),
        (LLAMA2, TWO_TURNS, [" {} </s>", " {} </s>"], {"stops": ["</s>"], "names": {"eos_token": "</s>"}}),
        (MISTRAL, TWO_TURNS, [" {}</s>", " {}</s>"], {"stops": ["</s>"], "names": {"eos_token": "</s>"}}),
        (GEMMA, TWO_TURNS, ["{}<end_of_turn>\n", "{}<end_of_turn>\n"], {"stops": ["</s>", "<end_of_turn>"]}),
        (CLOSING, TWO_TURNS, ["{}<|im_end|>\n", "{}<|im_end|>\n</s>"], {"names": {"eos_token": "</s>"}}),
        (GENERATION, TWO_TURNS, ["{}<|im_end|>", "{}<|im_end|>"], {}),
    ],
    ids=["chatml", "llama3", "llama2", "mistral", "gemma", "closing", "generation"],
)
def test_every_assistant_turn_is_trained_with_its_stop_token_and_nothing_else(
    tmp_path: Path, template: str, messages: list[Any], expected: list[str], settings: dict[str, Any]
) -> None:
    settings = settings | {"stops": settings.get("stops", ["<|im_end|>"])}
    if template is CLOSING:
        settings["stops"] = ["<|im_end|>", "</s>"]
    trained, made = labels_of(tmp_path, template, [{"messages": messages}], **settings)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert trained == [[text.format(answer) for text, answer in zip(expected, answers, strict=True)]]
    assert made.audit.warnings == ()


def test_the_stop_token_is_missing_when_generation_stops_on_another(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(CHATML)
    data = section(write_jsonl(tmp_path / "a.jsonl", [PAIR]))
    assert prepare_problems(data, tokenizer, stops=ids_of(tokenizer, "</s>")) == [
        "a.jsonl:1: the answer ends with 'o.<|im_end|>\\n', generation stops on '</s>'; use a template that ends "
        "answers with it, or name the token that ends them: data.stop_token"
    ]


def test_turns_that_lose_their_reasoning_later_are_trained_one_by_one(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "<think>the</think>one"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "<think>is</think>two"},
    ]
    trained, made = labels_of(tmp_path, THINKING, [{"messages": messages}])
    assert trained == [["<think>the</think>one<|im_end|>\n"], ["<think>is</think>two<|im_end|>\n"]]
    assert [row["line"] for row in made.train] == [1, 1]
    assert (made.audit.train.rows, made.audit.train.sequences) == (1, 2)
    assert "1 rows in 2 sequences" in made.audit.summary()
    assert "trained as several sequences" in made.audit.warnings[0] and "2 sequences" in made.audit.warnings[0]


def test_turns_without_reasoning_stay_together_under_the_same_template(tmp_path: Path) -> None:
    trained, made = labels_of(tmp_path, THINKING, [{"messages": TWO_TURNS}])
    assert [len(texts) for texts in trained] == [2] and made.audit.warnings == ()


def test_tool_calls_are_trained_and_what_the_tool_says_is_not(tmp_path: Path) -> None:
    schema = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    trained, made = labels_of(tmp_path, TOOLS, [{"messages": messages, "tools": [schema]}])
    called = '{"name": "weather", "arguments": {"city": "Rome"}}<|im_end|>\n'
    assert trained == [[called, "It is sunny.<|im_end|>\n"]]
    assert str(word_tokenizer().decode(made.train[0]["input_ids"])).startswith(json.dumps([schema]))


def test_answers_inside_a_prompt_are_not_trained(tmp_path: Path) -> None:
    row = {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}
    trained, _ = labels_of(tmp_path, CHATML, [row])
    assert trained == [["the answer is two ü 😀<|im_end|>\n"]]


def test_everything_is_trained_when_the_recipe_says_so(tmp_path: Path) -> None:
    _, made = labels_of(tmp_path, CHATML, [PAIR], train_on="all")
    assert made.train[0]["labels"] == made.train[0]["input_ids"]


def test_text_is_trained_whole_with_one_end_token(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    data = section(write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two<|im_end|>"}]), template="plain")
    made = prepared(data, tokenizer)
    assert trained_texts(made, tokenizer) == [["one<|im_end|>"], ["two<|im_end|>"]]


def test_plain_rows_are_joined_as_they_are(tmp_path: Path) -> None:
    trained, made = labels_of(tmp_path, CHATML, [{"prompt": "one ", "completion": "\ntwo"}], template="plain")
    assert trained == [["\ntwo<|im_end|>"]]
    assert word_tokenizer().decode(made.train[0]["input_ids"]) == "one \ntwo<|im_end|>"


def test_the_alpaca_layout_has_a_part_for_the_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1, 1", "output": "2"},
        {"instruction": "Add.", "input": "", "output": "2"},
    ]
    trained, made = labels_of(tmp_path, CHATML, rows, template="alpaca")
    assert trained == [["2<|im_end|>"]] * 2
    first, second = (word_tokenizer().decode(row["input_ids"]) for row in made.train)
    assert "\n\n### Instruction:\nAdd.\n\n### Input:\n1, 1\n\n### Response:\n2<|im_end|>" in first
    assert "### Input" not in second and "### Instruction:\nAdd.\n\n### Response:\n2" in second


def test_a_template_file_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{{ messages[0].content }} -> {% if messages[1] %}{{ messages[1].content }}{{ eos_token }}{% endif %}"
    )
    trained, _ = labels_of(tmp_path, CHATML, [PAIR], template=str(template))
    assert trained == [["Two.<|im_end|>"]]


def test_template_kwargs_reach_the_template(tmp_path: Path) -> None:
    template = CHATML.replace("{% for", "{{ mood }}{% for")
    _, made = labels_of(tmp_path, template, [PAIR], template_kwargs={"mood": "calm"})
    assert str(word_tokenizer().decode(made.train[0]["input_ids"])).startswith("calm<|im_start|>")


def test_the_tokenizers_own_beginning_comes_once(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer(MISTRAL, eos_token="</s>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    path = write_jsonl(tmp_path / "a.jsonl", [PAIR])
    for template in ("plain", "alpaca", "chat"):
        row = prepared(section(path, template=template), tokenizer).train[0]
        assert row["input_ids"][:2].count(bos) == 1
        assert row["labels"][0] == -100
    write_jsonl(path, [PAIR | {"prompt": "<s>One?"}])
    assert prepared(section(path, template="plain"), tokenizer).train[0]["input_ids"][:2].count(bos) == 1
    assert tokenizer("One?")["input_ids"][0] == bos


def test_a_token_across_the_boundary_is_trained_and_counted(tmp_path: Path) -> None:
    row = {"prompt": "the question ", "completion": "is one"}
    trained, made = labels_of(tmp_path, CHATML, [row], template="plain")
    assert trained == [[" is one<|im_end|>"]]
    assert "first token also holds the end of the prompt" in made.audit.warnings[0]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, MISTRAL, THINKING, CLOSING])
def test_labels_equal_those_of_sfttrainer_for_prompts_and_completions(tmp_path: Path, template: str) -> None:
    from trl.data_utils import common_prefix_length

    tokenizer = word_tokenizer(template)
    rows = [
        {"prompt": prompt, "completion": completion}
        for prompt in ("one?", "the question\n", " two  ", "ü 😀")
        for completion in ("the answer", "\n\nis", " three ", "é")
    ]
    stops = ids_of(tokenizer, "<|im_end|>", "<|eot|>", "<end_of_turn>")
    made = prepared(section(write_jsonl(tmp_path / "a.jsonl", rows)), tokenizer, stops=stops)
    for row, own in zip(rows, made.train, strict=True):
        # What SFTTrainer's preparation does with a conversational prompt and completion.
        prompt = [{"role": "user", "content": row["prompt"]}]
        completion = [{"role": "assistant", "content": row["completion"]}]
        asked = prompt_ids(tokenizer, prompt)
        whole = prompt_ids(tokenizer, prompt + completion, add_generation_prompt=False)
        start = common_prefix_length(asked, whole)
        assert own["input_ids"] == whole
        assert own["labels"] == [-100] * start + whole[start:]


def test_columns_are_what_the_trainer_and_the_report_need(tmp_path: Path) -> None:
    _, made = labels_of(tmp_path, CHATML, [PAIR, PAIR | {"prompt": "Three?"}])
    numbers = datasets.List(datasets.Value("int32"))
    assert made.train.features == {
        "input_ids": numbers,
        "labels": numbers,
        "file": datasets.Value("int32"),
        "line": datasets.Value("int64"),
    }
    assert made.files[made.train[1]["file"]].endswith("a.jsonl") and made.train[1]["line"] == 2
    assert made.eval is None


def test_what_a_template_refuses_is_said_with_the_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TWO_TURNS}, {"messages": [SYSTEM, *TWO_TURNS]}])
    problems = prepare_problems(section(path), word_tokenizer(MISTRAL, eos_token="</s>"))
    assert problems[0].startswith("data.train: 1 of 2 rows (50.0%) cannot be trained on")
    assert problems[1].startswith(
        "data.train: rows that cannot be rendered: 1, at a.jsonl:2 (the template refuses this row: only user and "
    )


@pytest.mark.parametrize(
    ("settings", "row", "problem"),
    [
        ({"template": "plain"}, {"messages": TWO_TURNS}, "template plain lays out a prompt and its completion"),
        ({"template": "alpaca"}, PAIR | {"system": "x"}, "template alpaca has no place for a system text"),
        (
            {"template": "plain"},
            {"instruction": "a", "input": "b", "output": "c"},
            "template plain has no place for an input",
        ),
    ],
)
def test_layouts_refuse_rows_they_have_no_place_for(
    tmp_path: Path, settings: dict[str, Any], row: dict[str, Any], problem: str
) -> None:
    data = section(write_jsonl(tmp_path / "a.jsonl", [row]), **settings)
    assert f"rows that cannot be rendered: 1, at a.jsonl:1 ({problem}" in prepare_problems(data, word_tokenizer())[1]


def test_no_chat_template_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    data = section(write_jsonl(tmp_path / "a.jsonl", [PAIR]))
    with pytest.raises(ModelError, match=r"has no chat template; set data\.template: alpaca, plain or the path"):
        prepared(data, word_tokenizer())


def test_a_template_file_with_a_syntax_error_is_named_with_its_line(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("\n{% for %}")
    data = section(write_jsonl(tmp_path / "a.jsonl", [PAIR]), template=str(template))
    with pytest.raises(DataError, match=r"own\.jinja:2: .*; mend the template"):
        prepared(data, word_tokenizer())
    with pytest.raises(RecipeError, match="no such file"):
        prepared(section(tmp_path / "a.jsonl", template=str(tmp_path / "missing.jinja")), word_tokenizer())


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [1] * 10**9 }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 10**(10**9) }}",
        "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    ],
)
def test_a_template_cannot_write_without_bound(template: str) -> None:
    with pytest.raises(RowProblem, match="the template refuses this row: it "):
        ChatTemplate(template, {}).render([{"role": "user", "content": "a"}], None)


def test_a_template_cannot_leave_its_sandbox() -> None:
    with pytest.raises(RowProblem, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}).render([{"role": "user", "content": "a"}], None)


def test_a_conversation_renders_as_apply_chat_template_renders_it() -> None:
    tokenizer = word_tokenizer(LLAMA3)
    rendered = ChatTemplate(LLAMA3, dict(tokenizer.special_tokens_map)).render(TWO_TURNS, None, is_prompt=True)
    assert rendered == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False, add_generation_prompt=True)
