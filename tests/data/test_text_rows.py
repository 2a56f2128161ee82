"""Running text: trained whole, between the tokenizer's own opening and one stop token, whatever the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafit.data.prepare import PreparedData
from lorafit.errors import ModelError
from support.families import FAMILIES
from support.sources import prepared, section
from support.tiny import write_jsonl


def trained_on(tmp_path: Path, family: str, text: str, **settings: Any) -> tuple[str, PreparedData]:
    tokenizer = FAMILIES[family].tokenizer()
    if settings.pop("has_template", True) is False:
        tokenizer.chat_template = None
    stops = FAMILIES[family].stop_token_ids(tokenizer)
    made = prepared(section(write_jsonl(tmp_path / "a.jsonl", [{"text": text}]), **settings), tokenizer, stops=stops)
    assert made.train[0]["input_ids"] == made.train[0]["labels"]
    return str(tokenizer.decode(made.train[0]["input_ids"])), made


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_opened_and_ended_once_whatever_the_template(tmp_path: Path, family: str, template: str) -> None:
    opening = FAMILIES[family].bos if FAMILIES[family].adds_bos else ""
    expected = f"{opening}One two.{FAMILIES[family].eos}"
    for text in ("One two.", expected):
        assert trained_on(tmp_path, family, text, template=template)[0] == expected


def test_text_needs_no_chat_template_and_messages_do(tmp_path: Path) -> None:
    assert trained_on(tmp_path, "chatml", "One.", has_template=False)[0] == "One.<|im_end|>"
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.chat_template = None
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(ModelError, match="has no chat template"):
        prepared(section(write_jsonl(tmp_path / "b.jsonl", rows)), tokenizer)


@pytest.mark.parametrize(
    ("family", "text", "last"),
    [
        ("chatml", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n", "<|im_end|>"),
        ("qwen25", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n\n ", "<|im_end|>"),
        ("gemma2", "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n", "<end_of_turn>"),
        ("phi3", "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>", "<|end|>"),
        ("llama3", "<|begin_of_text|>a<|eot_id|>\n", "<|eot_id|>"),
    ],
)
def test_text_that_another_program_rendered_is_left_as_it_ends(
    tmp_path: Path, family: str, text: str, last: str
) -> None:
    tokens, made = trained_on(tmp_path, family, text)
    tokenizer = FAMILIES[family].tokenizer()
    assert tokens == tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    [warning] = made.audit.warnings
    assert "no stop token is added" in warning and f"ends with {last}" in warning


def test_text_that_only_names_a_control_token_is_ended(tmp_path: Path) -> None:
    tokens, made = trained_on(tmp_path, "chatml", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb")
    assert tokens.endswith("b<|im_end|>")
    assert "special tokens inside their text" in made.audit.warnings[0]
