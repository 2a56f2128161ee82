"""Every family of chat templates: what is trained of each kind of conversation, written out."""

from __future__ import annotations

import pytest
from families import CONVERSATIONS, FAMILIES, TOOL

from lorafit.data.chat_template import ChatTemplate


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_template_renders_as_transformers_renders_it(family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    for name, messages in CONVERSATIONS.items():
        if "tools" in name and family not in ("llama3", "qwen25", "qwen3", "mistral", "harmony", "named"):
            continue  # refused by the template, or not as rows hold them
        tools = [TOOL] if "tools" in name else None
        template = ChatTemplate(tokenizer.get_chat_template(tools=tools), dict(tokenizer.special_tokens_map))
        if name == "system" and family == "gemma2":
            continue
        for is_prompt, some in ((False, messages), (True, messages[:-1])):
            expected = tokenizer.apply_chat_template(some, tools, add_generation_prompt=is_prompt, tokenize=False)
            assert template.render(some, tools, is_prompt=is_prompt) == expected
