"""A recipe file -> a `LoadedRecipe`: everything in it checked, or every problem at once."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from lorafit.errors import Problem, RecipeError
from lorafit.recipe.layers import Layer, dotted, read_layers
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.words import in_our_words
from lorafit.recipe.write import recipe_yaml
from lorafit.recipe.yaml_reader import KeyPath


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe (its paths absolute) and where each of its keys was written."""

    recipe: Recipe
    path: Path
    layer: Layer

    def problem(self, key: str, message: str) -> Problem:
        """A problem of `key` (`lora.target_modules`, `data.train.0.path`) at the line where it was written."""
        steps = tuple(int(step) if step.isdecimal() else step for step in key.split("."))
        return _problem(self.path, self.layer, steps, message)

    def yaml(self, *, relative_to: Path) -> str:
        """The resolved recipe: what was written and what differs from the defaults, paths relative to a directory."""
        return recipe_yaml(self.recipe, relative_to)

    def output_dir(self) -> Path:
        """`output_dir`, or `runs/<name of the recipe>`; relative to the current directory."""
        return Path(self.recipe.output_dir or f"runs/{self.path.stem}")


def load(path: Path, *, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe in `path` with the `section.key=value` overrides. Raises RecipeError with every problem."""
    layer = read_layers(path, overrides)
    wrong: list[tuple[KeyPath, str]] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(layer.value)
    except ValidationError as error:
        wrong += in_our_words(error, layer.value)
    if wrong or recipe is None:
        raise RecipeError(_sorted(path, layer, wrong))
    return LoadedRecipe(recipe, path, layer)


def _sorted(path: Path, layer: Layer, wrong: Iterable[tuple[KeyPath, str]]) -> list[Problem]:
    """The problems as they stand in the files: the recipe first, then what it extends, then `--set`."""

    def place(entry: tuple[KeyPath, str]) -> tuple[int, int]:
        origin = layer.origin(entry[0])
        return (origin.order, origin.line) if origin else (0, 0)

    return [_problem(path, layer, key, message) for key, message in sorted(wrong, key=place)]


def _problem(path: Path, layer: Layer, key: KeyPath, message: str) -> Problem:
    origin = layer.origin(key)
    where = origin.where if origin else os.fspath(path)
    return Problem(f"{where}: {dotted(key)}", message, line=origin.line if origin else 0)
