"""Rules of `rank_sweep`. A recipe that is only trained is held to them where it writes the section."""

from collections.abc import Iterator
from functools import wraps
from itertools import pairwise

from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules.broken import Broken, Rule


def ranks_rise(recipe: Recipe) -> Iterator[Broken]:
    """The order says which is smaller, and twice the same is trained twice."""
    ranks = recipe.rank_sweep.ranks
    for one, other in pairwise(ranks):
        if one >= other:
            what = f"{one} stands twice" if one == other else f"{one} stands before {other}"
            mend = ", ".join(map(str, sorted(set(ranks))))
            yield Broken("rank_sweep.ranks", f"{what}; write them rising: [{mend}]")
            return


def two_ranks_at_least(recipe: Recipe) -> Iterator[Broken]:
    """One rank leaves nothing to choose."""
    if len(recipe.rank_sweep.ranks) < 2:
        message = f"{len(recipe.rank_sweep.ranks)} of them leave nothing to choose; write two or more: [4, 8, 16]"
        yield Broken("rank_sweep.ranks", message)


def alpha_is_the_policys(recipe: Recipe) -> Iterator[Broken]:
    """A scale that is written and not used would be lost without a word."""
    lora, policy = recipe.lora, recipe.rank_sweep.alpha
    if policy == "2r" and lora.lora_alpha not in (None, 2 * lora.r):
        message = f"2r leaves lora.lora_alpha: {lora.lora_alpha} unused; write alpha: fixed, or take lora_alpha out"
        yield Broken("rank_sweep.alpha", message, ("lora.lora_alpha", "lora.r"))
    if policy != "rslora" and lora.use_rslora:
        yield Broken(
            "rank_sweep.alpha", f"{policy} goes with alpha / r; write alpha: rslora, or use_rslora: false", ("lora",)
        )
    if policy == "2r" and lora.alpha_pattern:
        yield Broken("rank_sweep.alpha", "2r does not go with lora.alpha_pattern; write alpha: fixed", ("lora",))


def budget_pays_for_the_largest(recipe: Recipe) -> Iterator[Broken]:
    """Nothing is known before the largest rank is trained."""
    section = recipe.rank_sweep
    least = 1 / len(section.ranks) if section.ranks else 0
    if section.budget is not None and section.budget < least:
        message = f"{section.budget:g} does not pay for the largest of {len(section.ranks)} ranks; write {least:.2g}"
        yield Broken("rank_sweep.budget", f"{message} or more", ("rank_sweep.ranks",))
    if section.exhaustive and section.budget not in (None, 1):
        yield Broken("rank_sweep.budget", "exhaustive trains every rank; leave one of the two out")


def sweep_has_held_out_rows(recipe: Recipe) -> Iterator[Broken]:
    """Ranks are compared by their loss on rows that none was trained on."""
    if not recipe.data.eval and recipe.data.eval_fraction is None:
        message = "compares losses on held-out rows, and there are none; write data.eval or data.eval_fraction"
        yield Broken("rank_sweep", message, ("data.eval", "data.eval_fraction"))


def ranks_are_to_be_chosen(recipe: Recipe) -> Iterator[Broken]:
    """AdaLoRA chooses ranks itself; with a pattern some modules would not follow."""
    if recipe.adalora is not None:
        yield Broken("rank_sweep", "has no meaning with adalora, which chooses ranks itself; take adalora out")
    if recipe.lora.rank_pattern:
        yield Broken("rank_sweep", "does not reach the modules of lora.rank_pattern; take the pattern out", ("lora",))


def one_process_a_trial(recipe: Recipe) -> Iterator[Broken]:
    """GPUs train trials side by side; a base that is spread over them is in no process whole."""
    if recipe.launch.strategy != "ddp":
        message = "trains each rank on one GPU; launch.strategy spreads the base over several: write ddp"
        yield Broken("rank_sweep", message, ("launch.strategy",))


SWEEP_RULES: tuple[Rule, ...] = (
    ranks_rise,
    two_ranks_at_least,
    alpha_is_the_policys,
    budget_pays_for_the_largest,
    sweep_has_held_out_rows,
    ranks_are_to_be_chosen,
    one_process_a_trial,
)
"""What a recipe that is swept keeps to, whether it writes the section or not."""


def _where_written(rule: Rule) -> Rule:
    @wraps(rule)
    def held(recipe: Recipe) -> Iterator[Broken]:
        if "rank_sweep" in recipe.model_fields_set:
            yield from rule(recipe)

    return held


RULES: tuple[Rule, ...] = tuple(map(_where_written, SWEEP_RULES))
