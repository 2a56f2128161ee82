"""A recipe file -> a `LoadedRecipe`: everything in it checked, or every problem at once."""

import os
import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from lorafit.errors import LorafitError, Problem, RecipeError
from lorafit.recipe import secrets
from lorafit.recipe.overlays import SET, Layer, dotted, read_layers
from lorafit.recipe.pydantic_errors import Wrong, in_our_words
from lorafit.recipe.recipe import Recipe, recipe_class
from lorafit.recipe.recipe_yaml import recipe_yaml
from lorafit.recipe.rules import Broken, broken_rules
from lorafit.recipe.yaml_reader import KeyPath

Error = TypeVar("Error", bound=LorafitError)
_STAND_INS: dict[KeyPath, Any] = {
    ("model",): {"model_name_or_path": "stand-in"},
    ("model", "model_name_or_path"): "stand-in",
    ("data",): {"train": [{"path": "stand-in"}]},
    ("data", "train"): [{"path": "stand-in"}],
}
"""What a required key holds while the rules between the other keys are checked."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe (its paths absolute) and where each of its keys was written."""

    recipe: Recipe
    path: Path
    layer: Layer

    def problem(self, key: str, message: str) -> Problem:
        """A problem of `key` (`lora.target_modules`, `data.train.0.path`) at the line where it was written."""
        return _problem(self.path, self.layer, _steps(key), message)

    def placed(self, error: Error) -> Error:
        """The error of who has the recipe alone, with the lines of the keys that it names."""
        return type(error)(map(self.at_its_line, error.problems))

    def at_its_line(self, problem: Problem) -> Problem:
        """A problem of a key, or of the base that the recipe names, at its line; others as they are."""
        base = self.recipe.model.model_name_or_path
        if problem.where == base:
            return self.problem("model.model_name_or_path", f"{base}: {problem.message}")
        is_key = problem.where.startswith(tuple(f"{name}." for name in type(self.recipe).model_fields))
        return self.problem(problem.where, problem.message) if is_key else problem

    def yaml(self, *, relative_to: Path) -> str:
        """The resolved recipe: what was written and what differs from the defaults, paths relative to a directory."""
        return recipe_yaml(self.recipe, relative_to)

    def output_dir(self) -> Path:
        """`output_dir`, or `runs/<name of the recipe>`; relative to the current directory."""
        return Path(self.recipe.output_dir or f"runs/{self.path.stem}")


@dataclass(frozen=True)
class Reading:
    """A recipe as far as it can be read."""

    loaded: LoadedRecipe | None
    """None when what is wrong leaves nothing to go on with; else right where no problem is named."""
    problems: tuple[Problem, ...]
    has_whole_data_section: bool
    """Whether `data` itself is right, so that its files can be looked at."""


def load(path: Path, *, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe in `path` with the `section.key=value` overrides. Raises RecipeError with every problem."""
    reading = read(path, overrides=overrides)
    if reading.problems or reading.loaded is None:
        raise RecipeError(reading.problems)
    return reading.loaded


def read(path: Path, *, overrides: Sequence[str] = ()) -> Reading:
    """As `load`, but gives the problems besides what is right. Raises RecipeError where the YAML itself is wrong."""
    layer = read_layers(path, overrides)
    wrong = [Wrong(key, secrets.MESSAGE) for key in secrets.secret_keys(layer.value)]
    recipe, found = _checked(_without(layer.value, wrong))
    wrong += found
    if recipe is not None:
        wrong += [
            Wrong(_steps(broken.key), broken.message) for broken in broken_rules(recipe) if not _hangs_on(broken, wrong)
        ]
    return Reading(
        loaded=None if recipe is None else LoadedRecipe(recipe, path, layer),
        problems=tuple(_sorted(path, layer, wrong)),
        has_whole_data_section=recipe is not None
        and not any("data" in (*one.key[:1], *(one.meant or ())[:1]) for one in wrong),
    )


def _checked(tree: dict[str, Any]) -> tuple[Recipe | None, list[Wrong]]:
    """The recipe, and its wrong keys; without them, as far as it can be checked at all."""
    wrong: list[Wrong] = []
    for _ in range(3):
        try:
            return recipe_class(tree).model_validate(tree), wrong
        except ValidationError as error:
            found = in_our_words(error, tree)
            wrong += found
            tree = _without(tree, found)
    return None, wrong


def _without(tree: dict[str, Any], wrong: Iterable[Wrong]) -> dict[str, Any]:
    """`tree` without its wrong keys: required ones replaced, and whole lists dropped for a wrong entry."""
    for key in sorted((one.meant or one.key for one in wrong), key=len):
        if key in _STAND_INS:
            tree = _changed(tree, key, _STAND_INS[key])
    dropped = set()
    for key in (one.key for one in wrong if one.key not in _STAND_INS):
        if key[:2] in (("data", "train"), ("data", "eval"), ("eval", "general")) and len(key) == 3:
            tree = _changed(tree, key, {"path": "stand-in"})
            continue
        while key and isinstance(key[-1], int):
            key = key[:-1]
        dropped.add(key)
    return {} if () in dropped else _pruned(tree, (), dropped)


def _pruned(tree: Any, at: KeyPath, dropped: Collection[KeyPath]) -> Any:
    """A copy of `tree`, which stands at `at`, without the keys to be dropped."""
    if isinstance(tree, list):
        return [_pruned(entry, (*at, index), dropped) for index, entry in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    return {key: _pruned(entry, (*at, key), dropped) for key, entry in tree.items() if (*at, key) not in dropped}


def _changed(tree: Any, key: KeyPath, value: Any) -> Any:
    """A copy of `tree` with `value` at `key`; as it was where there is no such place."""
    if not key:
        return value
    step = key[0]
    if isinstance(tree, list):
        return [_changed(entry, key[1:], value) if index == step else entry for index, entry in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    if len(key) == 1:
        return {**tree, step: value}
    return {**tree, step: _changed(tree.get(step), key[1:], value)} if step in tree else tree


def _hangs_on(broken: Broken, wrong: Collection[Wrong]) -> bool:
    """Whether a rule looked at a key that is wrong in itself."""
    looked_at = [_steps(key) for key in (broken.key, *broken.others)]
    blamed = [key for one in wrong for key in (one.key, one.meant) if key is not None]
    return any(key[: len(bad)] == bad or bad[: len(key)] == key for key in looked_at for bad in blamed)


def _steps(key: str) -> KeyPath:
    return tuple(int(step) if step.isdecimal() else step for step in key.split("."))


def _sorted(path: Path, layer: Layer, wrong: Iterable[Wrong]) -> list[Problem]:
    """The problems as they stand in the files: the recipe first, then what it extends, then `--set`."""

    def place(one: Wrong) -> tuple[int, int, int]:
        origin = layer.origin(one.key)
        return (origin.order, origin.line, origin.column) if origin else (0, 0, 0)

    return [_problem(path, layer, one.key, _with_example(one, layer)) for one in sorted(wrong, key=place)]


def _with_example(wrong: Wrong, layer: Layer) -> str:
    """What is wrong, and what to type instead: in the file, or on the command line where it was written there."""
    if wrong.example is None:
        return wrong.message
    if (origin := layer.origin(wrong.key)) is not None and origin.where == SET:
        return f"{wrong.message}; write --set {shlex.quote(f'{dotted(wrong.key)}={wrong.example}')}"
    lead = "- " if isinstance(wrong.key[-1], int) else f"{wrong.key[-1]}: "
    return f"{wrong.message}; write `{lead}{wrong.example}`"


def _problem(path: Path, layer: Layer, key: KeyPath, message: str) -> Problem:
    origin = layer.origin(key)
    where = origin.where if origin else os.fspath(path)
    return Problem(
        f"{where}: {_on_one_line(dotted(key))}" if key else where,
        _on_one_line(message),
        line=origin.line if origin else 0,
    )


def _on_one_line(text: str) -> str:
    """Line breaks and control characters of quoted YAML text as escapes: a problem is one line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
