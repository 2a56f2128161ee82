"""Rules of `eval`."""

import re
from collections.abc import Iterator

from lorafit.recipe.patterns import backtracks_for_ever
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules.broken import Broken, Rule

READ_ANSWERS = ("exact_match", "json_valid", "classification")
"""The metrics that look at the answer found in a text, not at the whole of it."""


def generation_has_held_out_rows(recipe: Recipe) -> Iterator[Broken]:
    """Prompts to answer, and answers to compare with, come from rows that were not trained on."""
    if recipe.eval.generate is not None and not recipe.data.eval and recipe.data.eval_fraction is None:
        message = "answers the prompts of held-out rows, and there are none; write data.eval or data.eval_fraction"
        yield Broken("eval.generate", message, ("data.eval", "data.eval_fraction"))


def answer_is_a_regular_expression(recipe: Recipe) -> Iterator[Broken]:
    """It would fail after the models were loaded and had written."""
    generate = recipe.eval.generate
    if generate is None or generate.answer is None:
        return
    try:
        re.compile(generate.answer)
    except (re.error, OverflowError, RecursionError) as error:
        yield Broken("eval.generate.answer", f'"{generate.answer}" is not a regular expression ({error}); correct it')
        return
    if backtracks_for_ever(generate.answer):
        message = f'"{generate.answer}" does not come to an end on some texts: a repeat within a repeat; write one'
        yield Broken("eval.generate.answer", message)
    if not set(generate.metrics) & set(READ_ANSWERS):
        message = f"is read by {', '.join(READ_ANSWERS)} alone; add one of them to metrics, or leave it out"
        yield Broken("eval.generate.answer", message, ("eval.generate.metrics",))


def metrics_are_named_once(recipe: Recipe) -> Iterator[Broken]:
    """Named twice, a metric is counted once."""
    named = recipe.eval.generate.metrics if recipe.eval.generate else ()
    for metric in sorted({metric for metric in named if named.count(metric) > 1}):
        yield Broken("eval.generate.metrics", f"names {metric} twice; leave one out")


def general_text_has_a_base_to_compare_with(recipe: Recipe) -> Iterator[Broken]:
    """Damage is a difference to the base model."""
    if recipe.eval.general and not recipe.eval.compare_base:
        message = "says what was lost since the base model, which compare_base: false leaves out; drop one of the two"
        yield Broken("eval.general", message, ("eval.compare_base",))


RULES: tuple[Rule, ...] = (
    generation_has_held_out_rows,
    answer_is_a_regular_expression,
    metrics_are_named_once,
    general_text_has_a_base_to_compare_with,
)
