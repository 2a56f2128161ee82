"""The template that is saved is the template that was trained: held against the tokenizer that the adapter has."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorafit.data import saved_template
from lorafit.data.prepare import PreparedData
from lorafit.data.saved_template import refuse_other_prompts
from lorafit.data.templates import saved_chat_template
from lorafit.errors import DataError, ModelError, RecipeError, VerificationError
from lorafit.merging.settings_files import copy_tokenizer
from lorafit.recipe.sections import DataSection
from support.families import CONVERSATIONS, FAMILIES, FILES, TOOL, conversation_row
from support.sources import prepared, section
from support.tiny import write_jsonl

PAIR = {"prompt": "One?", "completion": "Two."}


def made(
    tmp_path: Path, family: str, rows: list[dict[str, Any]], *, cache_dir: Path | None = None, **settings: Any
) -> tuple[PreparedData, DataSection, PreTrainedTokenizerFast]:
    tokenizer = FAMILIES[family].tokenizer()
    data = section(write_jsonl(tmp_path / "a.jsonl", rows), max_lost_rows=0.99, **settings)
    stops = FAMILIES[family].stop_token_ids(tokenizer)
    return prepared(data, tokenizer, stops=stops, cache_dir=cache_dir), data, tokenizer


@pytest.mark.parametrize("train_on", ["answers", "last_answer", "all"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deepseek_r1"])
def test_the_saved_tokenizer_gives_every_familys_trained_prompts(tmp_path: Path, family: str, train_on: str) -> None:
    rows = [conversation_row(name) for name in CONVERSATIONS]
    data, settings, tokenizer = made(tmp_path, family, rows, train_on=train_on)
    shapes = {(prompt.messages[0]["role"] == "system", bool(prompt.tools)) for prompt in data.prompts}
    has_system, has_tools = family != "gemma2", family not in ("chatml", "phi3", "gemma2", "gemma3")
    assert shapes >= {(False, False)} | ({(True, False)} if has_system else set()) | (
        {(False, True)} if has_tools else set()
    )
    refuse_other_prompts(data, settings, tokenizer)


@pytest.mark.parametrize(
    ("family", "variables"),
    [("qwen3", {"enable_thinking": False}), ("harmony", {"reasoning_effort": "low"}), ("gemma2", {"bos_token": ""})],
)
def test_variables_of_the_recipe_are_in_the_saved_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, variables: dict[str, Any]
) -> None:
    rows = [conversation_row("one turn"), conversation_row("several turns")]
    data, settings, tokenizer = made(tmp_path, family, rows, template_kwargs=variables)
    refuse_other_prompts(data, settings, tokenizer)
    tokenizer.chat_template = saved_chat_template(settings, tokenizer)
    messages = CONVERSATIONS["one turn"][:1]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokenizer.chat_template = FAMILIES[family].tokenizer().chat_template
    assert asked == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **variables)
    monkeypatch.setattr(saved_template, "saved_chat_template", lambda _, tokenizer: tokenizer.chat_template)
    with pytest.raises(VerificationError, match=r"a\.jsonl:1: .*; (use|name)"):
        refuse_other_prompts(data, settings, tokenizer)


def test_every_named_template_is_saved_with_the_variables(tmp_path: Path) -> None:
    tokenizer = FAMILIES["named"].tokenizer()
    tokenizer.chat_template = {name: "{{ mood }}" + text for name, text in tokenizer.chat_template.items()}
    settings = section("a", template_kwargs={"mood": "calm"})
    tokenizer.chat_template = saved_chat_template(settings, tokenizer)
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    copy_tokenizer(tmp_path / "adapter", tmp_path / "merged")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "merged")
    tools: Any
    for tools in (None, [TOOL]):
        text = str(loaded.apply_chat_template(CONVERSATIONS["one turn"], tools=tools, tokenize=False))
        assert text.startswith("calm<|im_start|>")
        assert ("<tools>" in text) == (tools is not None)


def test_a_tokenizer_without_a_default_template_names_those_it_has(tmp_path: Path) -> None:
    tokenizer = FAMILIES["named"].tokenizer()
    tokenizer.chat_template = {
        "rag": tokenizer.chat_template["default"],
        "tool_use": tokenizer.chat_template["tool_use"],
    }
    with_tools = section(write_jsonl(tmp_path / "tools.jsonl", [conversation_row("tools")]))
    without = write_jsonl(tmp_path / "turn.jsonl", [conversation_row("one turn")])
    refused = (
        r"data\.template: chat: the tokenizer has the chat templates rag, tool_use; write data\.template: chat:rag"
    )
    with pytest.raises(ModelError, match=refused):
        prepared(section(without), tokenizer)
    assert "<tools>" in tokenizer.decode(prepared(with_tools, tokenizer).train[0]["input_ids"])
    chosen = prepared(section(without, template="chat:rag"), tokenizer)
    assert str(tokenizer.decode(chosen.train[0]["input_ids"])).startswith("<|im_start|>user\nOne?")
    with pytest.raises(
        ModelError, match=r'has no chat template "rga"; .* write data\.template: chat:rag or chat:tool_use'
    ):
        prepared(section(without, template="chat:rga"), tokenizer)


def test_a_template_file_is_read_whoever_wrote_it(tmp_path: Path) -> None:
    text = (FILES / "chatml.jinja").read_text(encoding="utf-8")
    made_of = {}
    texts = {"linux": text, "bom": "\ufeff" + text, "windows": "\ufeff" + text.replace("\n", "\r\n")}
    for name, written in texts.items():
        path = tmp_path / f"{name}.jinja"
        path.write_bytes(written.encode())
        data, settings, tokenizer = made(tmp_path, "qwen3", [conversation_row("one turn")], template=str(path))
        refuse_other_prompts(data, settings, tokenizer)
        made_of[name] = data.train[0]["input_ids"], saved_chat_template(settings, tokenizer)
    assert made_of["linux"] == made_of["bom"] == made_of["windows"]
    path.write_bytes("ü".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"windows\.jinja: is not UTF-8 text"):
        made(tmp_path, "qwen3", [conversation_row("one turn")], template=str(path))


def test_a_syntax_error_is_said_with_its_line_beneath_baked_variables(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ mood }}{{ more }}\n\n{{ messages | nosuch }}")
    for variables in ({}, {"mood": 1, "more": 2}):
        with pytest.raises(DataError, match=r"own\.jinja:3: No filter named 'nosuch'"):
            made(tmp_path, "chatml", [PAIR], template=str(path), template_kwargs=variables)


def test_a_chosen_template_becomes_the_default_of_the_saved_ones(tmp_path: Path) -> None:
    rows = [conversation_row("one turn"), conversation_row("tools")]
    data, settings, tokenizer = made(tmp_path, "named", rows, template="chat:tool_use")
    assert "You are a tiny model." in tokenizer.decode(data.train[0]["input_ids"])
    refuse_other_prompts(data, settings, tokenizer)


@pytest.mark.parametrize("opening", ["", "<bos>", "<eos><bos>"])
def test_the_alpaca_layout_is_saved_with_and_without_an_input(tmp_path: Path, opening: str) -> None:
    rows = [{"instruction": "Add 'em.", "input": text, "output": "2"} for text in ("", "1, 1")]
    tokenizer = FAMILIES["gemma2"].tokenizer()
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    single = f"{opening.replace('><', '> <')} $A".strip()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    settings = section(write_jsonl(tmp_path / "a.jsonl", rows), template="alpaca")
    data = prepared(settings, tokenizer)
    refuse_other_prompts(data, settings, tokenizer)
    assert [prompt.messages[0]["content"] for prompt in data.prompts] == ["Add 'em.", "Add 'em.\n\n### Input:\n1, 1"]
    assert str(tokenizer.decode(data.train[0]["input_ids"])).startswith(f"{opening}Below is")


def test_a_generation_prompt_that_training_does_not_have_is_refused(tmp_path: Path) -> None:
    data, settings, tokenizer = made(tmp_path, "deepseek_r1", [conversation_row("one turn")])
    with pytest.raises(VerificationError) as error:
        refuse_other_prompts(data, settings, tokenizer)
    [problem] = error.value.problems
    assert r"generation will go on with '<think>\n' after the prompt of this row" in problem.message


def test_rows_that_follow_another_prompt_are_only_counted_beside_those_that_do_not(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    thinking = {"messages": CONVERSATIONS["thinking"][:2]}
    plain = conversation_row("one turn")
    data, settings, tokenizer = made(tmp_path, "chatml", [plain, thinking], template=str(tmp_path / "t.jinja"))
    refuse_other_prompts(data, settings, tokenizer)
    assert "another text in training than in generation: 1," in data.audit.warnings[0]


def test_text_and_the_plain_layout_have_no_template_to_hold_against(tmp_path: Path) -> None:
    for rows, template in (([{"text": "One."}], "chat"), ([PAIR], "plain")):
        data, settings, tokenizer = made(tmp_path, "chatml", rows, template=template)
        assert data.prompts == ()
        refuse_other_prompts(data, settings, tokenizer)


def test_the_prompts_are_kept_with_the_cached_tokens(tmp_path: Path) -> None:
    rows = [conversation_row(name) for name in CONVERSATIONS]
    first, second = (made(tmp_path, "qwen3", rows, cache_dir=tmp_path / "cache")[0] for _ in range(2))
    assert first.prompts == second.prompts and len(first.prompts) > 4


def test_a_few_short_prompts_of_each_shape_are_kept(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "a" * 300_000}, {"role": "assistant", "content": "b"}]}
    rows = [
        long,
        *({"messages": [{"role": "user", "content": str(i)}, CONVERSATIONS["one turn"][1]]} for i in range(9)),
    ]
    tokenizer = FAMILIES["chatml"].tokenizer()
    data = prepared(section(write_jsonl(tmp_path / "a.jsonl", rows)), tokenizer, max_length=400_000)
    assert [prompt.place[1] for prompt in data.prompts] == [2, 3]


def test_a_template_that_writes_the_date_is_checked_on_its_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, settings, tokenizer = made(tmp_path, "harmony", [conversation_row("one turn")])
    refuse_other_prompts(data, settings, tokenizer)

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> Tomorrow:
            return cls(2999, 1, 1)

    monkeypatch.setattr(saved_template, "date", Tomorrow)
    monkeypatch.setattr(saved_template, "saved_chat_template", lambda *_: "other")
    refuse_other_prompts(data, settings, tokenizer)


def test_a_template_without_any_row_it_takes_is_not_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        made(tmp_path, "gemma2", [conversation_row("system")])
