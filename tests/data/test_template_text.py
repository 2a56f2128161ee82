"""What is written into the text of a chat template, and what is read from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest

from lorafit.builders.template_files import chat_templates
from lorafit.data.chat_template import ChatTemplate
from lorafit.data.template_text import baked, unread_variables, variables_read
from lorafit.errors import ModelError
from support.families import FAMILIES, FILES

MESSAGES = [{"role": "user", "content": "a"}]
ODD = """it's "quoted" \\ {% endif %} }} {{ x }} {# no #}
\r\ttwo lines, ü 😀 \x00 \\n"""


def rendered(text: str, **variables: Any) -> str:
    return ChatTemplate(text, variables).render(MESSAGES, None)


@pytest.mark.parametrize(
    "value",
    [
        *(True, False, None, 0, -3, 10**30, 0.5, -1e-07, 1e300, "", "plain", ODD),
        *([], [1, "a", None, [True]], {}, {"a": {"b": [1.5, 'x"y']}, "c d": None}),
    ],
)
def test_a_value_is_the_same_baked_in_and_handed_over(value: Any) -> None:
    template = "{{ x | tojson }} {{ x is none }} {{ x is string }} {{ x is true }} {{ x is number }} {{ x is mapping }}"
    assert rendered(baked(template, {"x": value})) == rendered(template, x=value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ x }}",
        "\n\n  {{ x }}",
        "  {% if true %}\n {{ x }}{% endif %}\n",
        "{%- set y = x %}{{- y -}}",
        "{% macro f(n) %}{{ n }}{{ x }}{% endmacro %}{{ f(1) }}",
        "{% macro f(x=x) %}{{ x }}{% endmacro %}{{ f() }}{{ f(3) }}",
        "{% macro f() %}{{ caller() }}{{ x }}{% endmacro %}{% call f() %}{{ x }}{% endcall %}",
        "{% for m in messages %}{% if x is defined and x is false %}no{% endif %}{{ x }}{% endfor %}",
        "{% for m in messages if x == false %}{{ m.content }}{% else %}none{% endfor %}",
        "{% set ns = namespace(y=x) %}{% for m in messages %}{% set ns.y = [ns.y, x] %}{% endfor %}{{ ns.y }}",
        "{% block b %}{{ x }}{% endblock %}",
        "{% generation %}{{ x }}{% endgeneration %}",
        "{# a comment #}\n{% if x is not defined %}{% set x = 7 %}{% endif %}{{ x }}",
        "{% set x = x | default(5) %}{{ x }}",
        "-%} {{ x }}",
    ],
)
def test_a_template_writes_the_same_with_its_variables_baked_in(template: str) -> None:
    text = baked(template, {"x": False, "unused": "a"})
    assert rendered(text) == rendered(template, x=False)
    assert rendered(text, x=9) == rendered(template, x=9)
    assert baked(text, {"x": False, "unused": "a"}) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_baked_into_a_familys_template_changes_nothing_else(family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    template = tokenizer.get_chat_template()
    special = tokenizer.special_tokens_map
    assert rendered(baked(template, {"unused": [1]}), **special) == rendered(template, **special)


def test_a_variable_that_every_renderer_hands_over_is_set_all_the_same() -> None:
    text = baked("{{ bos_token }}{{ x }}", {"bos_token": "", "x": 1}, always=("bos_token", "eos_token"))
    assert rendered(text, bos_token="<s>") == "1"
    assert rendered(text, bos_token="<s>", x=2) == "2"


def test_variables_that_a_template_reads_are_those_that_it_does_not_set() -> None:
    template = (
        "{% set own = 1 %}{% macro f(argument) %}{{ argument }}{{ in_macro }}{% endmacro %}{% for m in messages %}"
        "{{ own }}{{ m.x }}{% if a is defined and not b %}{{ c.d['e'] }}{% endif %}{% endfor %}{{ strftime_now('%d') }}"
    )
    given = {"messages", "strftime_now"}
    assert variables_read(template) - given == {"in_macro", "a", "b", "c"}


def test_a_variable_that_no_template_reads_is_named_with_the_nearest() -> None:
    thinking, effort = (FILES / f"{name}.jinja" for name in ("qwen3", "harmony"))
    texts = [thinking.read_text(), effort.read_text()]
    wrong = dict(unread_variables({"enable_thinkng": False, "reasoning_effort": "low", "mood": 1}, texts))
    assert wrong["enable_thinkng"] == "the chat template never reads it; did you mean enable_thinking?"
    assert wrong["mood"].startswith("the chat template never reads it; it reads ")
    assert "enable_thinking" in wrong["mood"] and "messages" not in wrong["mood"]
    assert wrong.keys() == {"enable_thinkng", "mood"}
    assert dict(unread_variables({"x": 1}, ["{{ messages }}"])) == {
        "x": "the chat template never reads it; it reads no variables"
    }


@pytest.mark.parametrize("template", ["{% for %}", "{{ " + "(" * 500 + "1" + ")" * 500 + " }}"])
def test_reading_the_variables_of_what_is_no_template_raises_a_syntax_error(template: str) -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        variables_read(template)


def test_reading_variables_runs_nothing() -> None:
    assert variables_read("{{ 'a' * 10**9 }}{{ x }}{{ 'a' | center(10**9) }}") == {"x"}


def write(directory: Path, **files: Any) -> Path:
    for name, content in files.items():
        path = directory / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps({"chat_template": content}).encode())
    return directory


def test_chat_templates_are_found_wherever_they_lie(tmp_path: Path) -> None:
    """Each place comes before those that were looked at already."""
    assert chat_templates(tmp_path) == {}
    assert chat_templates(write(tmp_path, processor_config_dot_json="a")) == {"default": "a"}
    assert chat_templates(write(tmp_path, chat_template_dot_json="b")) == {"default": "b"}
    named = [{"name": "rag", "template": "c"}, {"name": "default", "template": "d"}]
    assert chat_templates(write(tmp_path, tokenizer_config_dot_json=named)) == {"rag": "c", "default": "d"}
    write(tmp_path, tokenizer_config_dot_json={"rag": "c"})
    assert chat_templates(tmp_path) == {"rag": "c"}
    write(tmp_path, additional_chat_templates__tool_use_dot_jinja=b"e")
    assert chat_templates(tmp_path) == {"tool_use": "e"}
    write(tmp_path, chat_template_dot_jinja="\ufefff\r\ng".encode())
    assert chat_templates(tmp_path) == {"default": "f\ng", "tool_use": "e"}


@pytest.mark.parametrize("wrong", [5, ["a"], [{"name": "a"}], {"a": 1}, [{"name": "a", "template": None}]])
def test_a_chat_template_that_is_no_text_is_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: has a chat_template that is neither a text nor"):
        chat_templates(write(tmp_path, tokenizer_config_dot_json=wrong))


@pytest.mark.parametrize("name", ["../x", "/x", "", ".x", "a\\b"])
def test_a_chat_template_whose_name_would_leave_its_directory_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"names a chat template .*, which no file can be called"):
        chat_templates(write(tmp_path, tokenizer_config_dot_json={name: "a"}))


def test_a_chat_template_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"chat_template\.jinja: is not UTF-8 text"):
        chat_templates(write(tmp_path, chat_template_dot_jinja="ü".encode("latin-1")))


def test_templates_are_read_without_torch() -> None:
    code = (
        "import sys, lorafit.builders.template_files, lorafit.data.template_text;"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
