"""Every family of chat templates: what is trained of each kind of conversation, written out in `chat_templates/*.txt`.

⟦ ⟧ stand around what is trained, `---` between the sequences of a row, `!` before what the audit finds. After a change
that is meant, `python tests/data/test_families.py` writes the files anew; read the difference.
"""

from __future__ import annotations

import tempfile
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lorafit.data.chat_template import ChatTemplate
from lorafit.data.prepare import PreparedData
from support.families import CONVERSATIONS, FAMILIES, FILES, TOOL, conversation_row
from support.sources import prepared, section
from support.tiny import write_jsonl

ALSO = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
"""A row that every template takes, so that one that is lost is only counted."""


def trained(family: str, directory: Path) -> str:
    """What is trained of every conversation, as the files have it."""
    return "".join(f"=== {name}\n{_trained(family, name, directory)}\n" for name in CONVERSATIONS)


def _trained(family: str, name: str, directory: Path) -> str:
    tokenizer = FAMILIES[family].tokenizer()
    rows = section(write_jsonl(directory / "rows.jsonl", [conversation_row(name), ALSO]), max_lost_rows=0.5)
    made = prepared(rows, tokenizer, stops=FAMILIES[family].stop_token_ids(tokenizer))
    kinds = [kind for kind, found in made.audit.train_findings.first.items() if any(one.place[1] == 1 for one in found)]
    findings = "".join(f"! {kind}\n" for kind in sorted(kinds))
    return findings + "\n---\n".join(_marked(made, tokenizer)).replace(str(date.today()), "TODAY")


def _marked(made: PreparedData, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    texts = []
    for row in made.train:
        if row["line"] == 1:
            tokens = zip(row["input_ids"], row["labels"], strict=True)
            stretches = groupby(tokens, key=lambda token: token[1] != -100)
            decoded = [
                (is_trained, str(tokenizer.decode([token for token, _ in some]))) for is_trained, some in stretches
            ]
            texts.append("".join(f"⟦{text}⟧" if is_trained else text for is_trained, text in decoded))
    return texts


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_of_a_family_is_what_is_written_out(family: str, tmp_path: Path) -> None:
    assert trained(family, tmp_path) == (FILES / f"{family}.txt").read_text(encoding="utf-8")


def test_every_family_and_every_template_is_written_out() -> None:
    assert {path.stem for path in FILES.glob("*.txt")} == FAMILIES.keys()
    used = {file for family in FAMILIES.values() for file in family.templates.values()}
    assert {path.stem for path in FILES.glob("*.jinja")} == used


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_template_renders_as_transformers_renders_it(family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    for name, messages in CONVERSATIONS.items():
        if "tools" in name and family not in ("llama3", "qwen25", "qwen3", "mistral", "harmony", "named"):
            continue  # refused by the template, or not as rows hold them
        tools: Any = [TOOL] if "tools" in name else None
        template = ChatTemplate(tokenizer.get_chat_template(tools=tools), dict(tokenizer.special_tokens_map))
        if name == "system" and family == "gemma2":
            continue
        for is_prompt, some in ((False, messages), (True, messages[:-1])):
            expected = tokenizer.apply_chat_template(some, tools, add_generation_prompt=is_prompt, tokenize=False)
            assert template.render(some, tools, is_prompt=is_prompt) == expected


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name in FAMILIES:
            (FILES / f"{name}.txt").write_text(trained(name, Path(scratch)), encoding="utf-8")
