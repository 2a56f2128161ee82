"""Rules between fields: what would otherwise fail late, or be ignored without a word. One named function each."""

from collections.abc import Iterator

from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules import adapter, data, evaluation, extra, rank_sweep, run, schedule, tokens
from lorafit.recipe.rules.broken import Broken, Rule

RULES: tuple[Rule, ...] = (
    *adapter.RULES,
    *run.RULES,
    *schedule.RULES,
    *data.RULES,
    *extra.RULES,
    *evaluation.RULES,
    *rank_sweep.RULES,
    *tokens.RULES,
)


def broken_rules(recipe: Recipe) -> Iterator[Broken]:
    """Every rule that `recipe` breaks."""
    for rule in RULES:
        yield from rule(recipe)


__all__ = ["RULES", "Broken", "broken_rules"]
