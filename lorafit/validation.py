"""A recipe, its data files and its base looked at together: every problem, or what the run will do. No torch."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.base_at_hand import BaseAtHand, look_at_base
from lorafit.builders.template_files import NO_TEMPLATE
from lorafit.data import DataScan, scan
from lorafit.data.findings import SHOWN_OF_A_KIND, where
from lorafit.data.long_rows import LongRows
from lorafit.data.rows import Place, Row
from lorafit.data.template_rows import TemplateRows
from lorafit.errors import DataError, LorafitError, MachineError, ModelError, Problem, RecipeError
from lorafit.packages import missing_packages
from lorafit.recipe import Advice, LoadedRecipe, advise
from lorafit.recipe.arithmetic import (
    Number,
    checkpoint_interval,
    sequences_per_step,
    share_of,
    steps_per_epoch,
    total_steps,
    warm_up,
)
from lorafit.recipe.load import Reading, read
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules.run import too_long_for
from lorafit.recipe.rules.schedule import WITHOUT_WARM_UP


@dataclass(frozen=True)
class Validation:
    """What a recipe that can be trained will do."""

    loaded: LoadedRecipe
    data: DataScan
    processes: int
    numbers: dict[str, Number]
    """steps, steps_per_epoch, sequences_per_step, warmup_steps, checkpoint_steps, eval_steps, as far as they apply."""
    advice: tuple[Advice, ...]
    not_checked: tuple[str, ...]
    """What was not looked at: a base that is not on this machine, rows of the Hub, what takes a template."""

    def as_dict(self) -> dict[str, Any]:
        """The result for scripts."""
        return {
            "recipe": str(self.loaded.path),
            "output_dir": str(self.loaded.output_dir()),
            "train_rows": self.data.train_rows,
            "eval_rows": self.data.eval_rows,
            "processes": self.processes,
            **{name: number.value for name, number in self.numbers.items()},
            "warnings": list(self.data.warnings),
            "not_checked": list(self.not_checked),
            "advice": [{"name": one.name, "key": one.key, "message": one.message} for one in self.advice],
        }


def validate(path: Path, *, overrides: Sequence[str] = (), show_progress: bool = False) -> Validation:
    """The recipe, its data, and its base as far as that lies on this machine, checked.

    Raises with every problem of all: the error of a recipe if that has one, else of the first problem in the order
    packages, base, rows.
    """
    return _checked(read(path, overrides=overrides), show_progress=show_progress)


def validate_loaded(loaded: LoadedRecipe) -> Validation:
    """As `validate`, of a recipe that is right in itself."""
    return _checked(Reading(loaded, (), has_whole_data_section=True), show_progress=False)


def _checked(reading: Reading, *, show_progress: bool) -> Validation:
    found: list[tuple[type[LorafitError], Iterable[Problem]]] = [(RecipeError, reading.problems)]
    data = base = lengths = None
    if reading.loaded is not None:
        loaded, recipe = reading.loaded, reading.loaded.recipe
        found.append((MachineError, missing_packages(loaded)))
        base = look_at_base(loaded)
        named = {problem.where for problem in reading.problems}  # what is wrong in itself is said once
        found.append((base.error, [problem for problem in base.problems if problem.where not in named]))
        if reading.has_whole_data_section:
            rows, untried = LongRows(recipe.training.max_length), TemplateRows()

            def each(row: Row) -> None:
                rows.add(row)
                untried.add(row)

            try:
                data = scan(recipe.data, seed=recipe.training.seed, each=each, show_progress=show_progress)
                lengths = rows.lengths(base.tokenizer)
                found.append((ModelError, _no_template(loaded, base, data)))
                found.append((DataError, _too_long(loaded, lengths.too_long, data.files)))
            except (DataError, ModelError) as error:
                found.append((type(error), error.problems))
    problems = [(error, problem) for error, some in found for problem in some]
    if problems or reading.loaded is None or data is None or base is None or lengths is None:
        raise problems[0][0](problem for _, problem in problems)
    return _validation(
        reading.loaded,
        data,
        base,
        not_checked=_not_checked(reading.loaded, data, base, doubtful=lengths.doubtful, untried=untried.count),
    )


def _no_template(loaded: LoadedRecipe, base: BaseAtHand, data: DataScan) -> Iterator[Problem]:
    """Rows of running text need none."""
    if not base.has_template and any(source.format != "text" and source.rows for source in data.sources):
        yield loaded.at_its_line(Problem("data.template: chat", NO_TEMPLATE))


def _too_long(loaded: LoadedRecipe, too_long: Sequence[tuple[Place, int]], files: Sequence[str]) -> Iterator[Problem]:
    """Rows that `train` refuses, as far as their texts alone say so."""
    recipe = loaded.recipe
    if recipe.data.over_length != "error":
        return
    longest = f"training.max_length is {recipe.training.max_length:,}"
    for place, tokens in too_long[:SHOWN_OF_A_KIND]:
        yield Problem(where(place, files), f"at least {tokens:,} tokens, the template's left out; {longest}", place[1])
    if too_long:
        most = max(tokens for _, tokens in too_long)
        message = f"the longest row has at least {most:,} tokens; raise it above that, or set data.over_length: drop"
        yield loaded.problem("training.max_length", f"{message} or truncate")


def _not_checked(
    loaded: LoadedRecipe, data: DataScan, base: BaseAtHand, *, doubtful: int, untried: int
) -> tuple[str, ...]:
    """What was not looked at, in the order of `train`."""
    hub = [f"the rows of {name}, which are read when training starts" for name in data.skipped_hub]
    preview = f"see `lorafit preview {loaded.path}`"
    lengths = []
    if doubtful and loaded.recipe.data.over_length == "error":
        count = f"{doubtful:,} long row{'s' * (doubtful != 1)}"
        lengths = [f"the exact length of {count} in tokens: {preview}"]
    taken = []
    if untried:
        rows = f"{untried:,} row{'s' * (untried != 1)}"
        taken = [f"whether the template takes the system texts, tools and thoughts of {rows}: {preview}"]
    return (*base.not_checked, *hub, *lengths, *taken)


def _validation(loaded: LoadedRecipe, data: DataScan, base: BaseAtHand, *, not_checked: tuple[str, ...]) -> Validation:
    recipe = loaded.recipe
    counts = recipe.launch.num_processes, recipe.launch.machines
    processes = math.prod(count for count in counts if count != "auto")
    numbers = _numbers(recipe, data, processes)
    if "steps" in numbers:
        too_long = [
            loaded.problem(broken.key, broken.message) for broken in too_long_for(recipe, numbers["steps"].value)
        ]
        if too_long:
            raise RecipeError(too_long)
    return Validation(
        loaded=loaded,
        data=data,
        processes=processes,
        numbers=numbers,
        advice=(*advise(recipe, train_rows=None if data.skipped_hub else data.train_rows), *base.advice),
        not_checked=not_checked,
    )


def _numbers(recipe: Recipe, data: DataScan, processes: int) -> dict[str, Number]:
    """What follows from the recipe and the rows; steps of packed rows need the tokenizer, those of the Hub the rows."""
    training = recipe.training
    numbers = {"sequences_per_step": sequences_per_step(recipe, processes)}
    has_counted_rows = not training.is_packed and not data.skipped_hub
    if has_counted_rows:
        numbers["steps_per_epoch"] = steps_per_epoch(recipe, data.train_rows, processes=processes)
    if has_counted_rows or training.max_steps is not None:
        steps = total_steps(recipe, data.train_rows, processes=processes)
        numbers["steps"] = steps
        if training.lr_scheduler_type not in WITHOUT_WARM_UP:
            numbers["warmup_steps"] = warm_up(recipe, steps.value)
        if interval := checkpoint_interval(recipe, steps.value):
            numbers["checkpoint_steps"] = interval
        if training.eval_steps is not None:
            numbers["eval_steps"] = share_of(steps.value, training.eval_steps)
    return numbers
