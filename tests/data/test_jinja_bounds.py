"""No template takes the memory or the time of the process that renders it."""

from __future__ import annotations

import tracemalloc

import jinja2
import pytest

from lorafit.data import jinja_bounds
from lorafit.data.chat_template import ChatTemplate
from lorafit.data.problems import RowProblem
from lorafit.errors import DataError

MESSAGES = [{"role": "user", "content": "a"}]
KEPT = "{% set ns = namespace(x='ab', y=[1]) %}{% for i in range(60) %}"


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds a hundred times lower, so that a test comes to them at once."""
    monkeypatch.setattr(jinja_bounds, "LONGEST_TEXT", 100_000)
    monkeypatch.setattr(jinja_bounds, "MOST_STEPS", 50_000)


@pytest.mark.parametrize(
    "template",
    [
        KEPT + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        KEPT + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        KEPT + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        KEPT + "{% set ns.x = ns.x.join(['', '', '']) %}{% endfor %}",
        KEPT + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
        KEPT + "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
        KEPT + "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.y }}",
        KEPT + "{% set ns.y = {'a': ns.y, 'b': ns.y} %}{% endfor %}{{ ns.y | tojson }}",
        "{% autoescape true %}" + KEPT + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{% endautoescape %}",
        "{% macro twice(x, n) %}{{ twice(x ~ x, n - 1) if n else x }}{% endmacro %}{{ twice('ab', 60) }}",
        "{% for i in [1] recursive %}{{ loop([i, i]) }}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}{% endset %}",
        "{% macro f() %}{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}{% endmacro %}{{ f() }}",
        "{% with a = 'a' * 999 %}" + "{% with a = a ~ a %}" * 15 + "{{ a }}" + "{% endwith %}" * 16,
        "{{ ('a' * 9999) | replace('a', 'b' * 9999) | length }}",
        "{{ ('a' * 9999).replace('a', 'b' * 9999) | length }}",
        "{{ ('a' * 9999).translate({97: 'b' * 9999}) | length }}",
        "{{ ('\t' * 9999).expandtabs(9999) | length }}",
        "{{ ('b' * 9999).join('a' * 9999) | length }}",
        "{{ range(9999) | map('string') | map('center', 9999) | list | length }}",
        "{{ [range(9999)] * 99 }}",
        "{{ '%99999999d' % 5 }}",
        "{{ '%*d' % (99999999, 5) }}",
        "{{ '%99999999d' | format(5) }}",
        "{{ '{:>99999999}'.format('a') }}",
        "{{ '{:>{}}'.format('a', 99999999) }}",
        "{{ 'a' | center(99999999) }}",
        "{{ 'a\nb' | indent(99999999) }}",
        "{{ [1] | tojson(indent=99999999) }}",
        "{{ [1] | batch(99999999, 'x') | list }}",
        "{{ [1] | slice(99999999) | list }}",
        "{{ [[1] * 99] * 99 | sum(start=[]) }}",
        "{{ 1.5 | round(99999999, 'ceil') }}",
        "{{ (3 ** 9999 * 3 ** 9999) ** 9 }}",
        "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ lipsum(n=99999) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ cycler() }}",
    ],
)
@pytest.mark.usefixtures("small_bounds")
def test_what_a_template_makes_is_bounded(template: str) -> None:
    compiled = ChatTemplate(template, {})
    tracemalloc.start()
    try:
        with pytest.raises(RowProblem, match=r"^the template refuses this row: [^\n]+$"):
            compiled.render(MESSAGES, None)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(300) recursive %}{% if loop.depth < 9 %}{{ loop(range(300)) }}{% endif %}{% endfor %}",
    ],
)
@pytest.mark.usefixtures("small_bounds")
def test_a_template_that_does_not_end_stops_the_run_at_once(template: str) -> None:
    with pytest.raises(DataError, match=r"takes more than 50,000 steps for one row; use another data\.template"):
        ChatTemplate(template, {}).render(MESSAGES, None)


def test_steps_that_take_long_are_ended_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_bounds, "MOST_SECONDS", 0.2)
    slow = "{% for i in range(99999) %}{% set x = range(2000) | sort | length %}{% endfor %}"
    with pytest.raises(DataError, match="seconds for one row"):
        ChatTemplate(slow, {}).render(MESSAGES, None)


@pytest.mark.usefixtures("small_bounds")
def test_every_row_has_the_whole_budget() -> None:
    template = ChatTemplate("{% for i in range(40000) %}{% endfor %}done", {})
    assert [template.render(MESSAGES, None) for _ in range(3)] == ["done"] * 3


@pytest.mark.parametrize(
    "template",
    [
        "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
        "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
        "{{ x" + "+x" * 9999 + " }}",
    ],
)
def test_a_template_too_deep_for_python_is_a_syntax_error(template: str) -> None:
    with pytest.raises(jinja2.TemplateSyntaxError, match="nested too deeply"):
        ChatTemplate(template, {})


def test_what_a_template_says_is_one_line() -> None:
    with pytest.raises(RowProblem, match=r"^the template refuses this row: no: roles must alternate$"):
        ChatTemplate("{{ raise_exception('no:\n roles must   alternate') }}", {}).render(MESSAGES, None)
