"""A recipe and its data files looked at together: every problem at once, or what the run will do. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.data import DataScan, scan
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
)
from lorafit.recipe.load import read
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules.run import WITHOUT_WARM_UP, too_long_for


@dataclass(frozen=True)
class Validation:
    """What a recipe that can be trained will do."""

    loaded: LoadedRecipe
    data: DataScan
    processes: int
    numbers: dict[str, Number]
    """steps, steps_per_epoch, sequences_per_step, warmup_steps, checkpoint_steps, eval_steps, as far as they apply."""
    advice: tuple[Advice, ...]

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
            "advice": [{"name": one.name, "key": one.key, "message": one.message} for one in self.advice],
        }


def validate(path: Path, *, overrides: Sequence[str] = ()) -> Validation:
    """The recipe and its data, checked. Raises with every problem of both: RecipeError if the recipe has one, else
    ModelError (no such base directory), MachineError (a package is not installed) or DataError."""
    reading = read(path, overrides=overrides)
    problems: list[Problem] = list(reading.problems)
    error: type[LorafitError] = RecipeError
    data = None
    if reading.loaded is not None:
        if missing := _missing_base(reading.loaded):
            error = error if problems else ModelError
            problems.append(missing)
        if lacking := list(missing_packages(reading.loaded)):
            error = error if problems else MachineError
            problems += lacking
        if reading.has_whole_data_section:
            recipe = reading.loaded.recipe
            try:
                data = scan(recipe.data, seed=recipe.training.seed)
            except DataError as found:
                error = error if problems else DataError
                problems += found.problems
    if problems or reading.loaded is None or data is None:
        raise error(problems)
    return _validation(reading.loaded, data)


def _missing_base(loaded: LoadedRecipe) -> Problem | None:
    base = Path(loaded.recipe.model.model_name_or_path)
    if base.is_absolute() and not base.is_dir():
        return loaded.problem("model.model_name_or_path", f"{base} is not a directory; write the path of a base model")
    return None


def _validation(loaded: LoadedRecipe, data: DataScan) -> Validation:
    recipe = loaded.recipe
    written = recipe.launch.num_processes
    processes = written if isinstance(written, int) else 1
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
        advice=advise(recipe, train_rows=None if data.skipped_hub else data.train_rows),
    )


def _numbers(recipe: Recipe, data: DataScan, processes: int) -> dict[str, Number]:
    """What follows from the recipe and the rows; steps of packed rows need the tokenizer, those of the Hub the rows."""
    training = recipe.training
    numbers = {"sequences_per_step": sequences_per_step(recipe, processes)}
    has_counted_rows = not training.packing and not data.skipped_hub
    if has_counted_rows:
        numbers["steps_per_epoch"] = steps_per_epoch(recipe, data.train_rows, processes=processes)
    if has_counted_rows or training.max_steps is not None:
        steps = total_steps(recipe, data.train_rows, processes=processes)
        numbers["steps"] = steps
        if training.lr_scheduler_type not in WITHOUT_WARM_UP:
            numbers["warmup_steps"] = share_of(steps.value, training.warmup_steps)
        if interval := checkpoint_interval(recipe, steps.value):
            numbers["checkpoint_steps"] = interval
        if training.eval_steps is not None:
            numbers["eval_steps"] = share_of(steps.value, training.eval_steps)
    return numbers
