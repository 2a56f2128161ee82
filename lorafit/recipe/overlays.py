"""A recipe file, the recipes it extends and the `--set` options, laid over each other; every value knows its origin."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import Problem, RecipeError
from lorafit.recipe.paths import absolute, resolved
from lorafit.recipe.yaml_reader import KeyPath, parse, read_file

SET = "--set"
"""Where a value of the command line was written."""


@dataclass(frozen=True)
class Origin:
    """Where a value was written: `recipes/x.yaml:14`, or `--set`."""

    where: str
    order: int
    """Rank of its file in reports: the recipe 0, what it extends 1, 2, ...; `--set` last."""
    line: int
    column: int


@dataclass
class Layer:
    """Plain values, their paths absolute, and where each was written."""

    value: dict[str, Any]
    origins: dict[KeyPath, Origin]

    def origin(self, key: KeyPath) -> Origin | None:
        """Origin of `key`, or of the nearest parent that is written."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key[:-1]
        return None


def read_layers(path: Path, overrides: Sequence[str]) -> Layer:
    """The values of `path` over those it extends, changed by `overrides`. Raises RecipeError."""
    layer = _read_chain(path, ())
    problems: list[Problem] = []
    for override in overrides:
        try:
            layer = _overridden(layer, override)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return layer


def dotted(key: KeyPath) -> str:
    """`data.train.0.path`: the key as `--set` takes it."""
    return ".".join(map(str, key))


def _read_chain(path: Path, children: tuple[Path, ...]) -> Layer:
    document = read_file(path)
    order = len(children)
    spots = {**document.values, **document.keys}
    origins = {key: Origin(f"{path}:{spot.line}", order, spot.line, spot.column) for key, spot in spots.items() if key}
    extends = document.value.pop("extends", None)
    layer = Layer(resolved(document.value, path.parent), origins)
    if extends is None:
        return layer
    where = f"{origins[('extends',)].where}: extends"
    if not isinstance(extends, str) or not extends:
        raise RecipeError("takes the path of one recipe", where=where)
    parent = Path(absolute(extends, path.parent)) if extends.startswith("~") else path.parent / extends
    if not parent.exists():
        raise RecipeError(f"{extends}: no such file (paths are relative to the recipe that names them)", where=where)
    if parent.resolve() in {child.resolve() for child in (*children, path)}:
        raise RecipeError(f"{extends} extends this recipe in turn; break the circle", where=where)
    below = _read_chain(Path(os.path.normpath(parent)), (*children, path))
    merged = dict(below.origins)
    value = _merged(below.value, layer.value, (), merged)
    return Layer(value, {**merged, **origins})


def _merged(below: Any, above: Any, key: KeyPath, origins: dict[KeyPath, Origin]) -> Any:
    """Mappings merge key by key; everything else, lists too, is replaced (and the origins beneath it dropped)."""
    if isinstance(below, dict) and isinstance(above, dict):
        changed = {name: _merged(below.get(name), value, (*key, name), origins) for name, value in above.items()}
        return {**below, **changed}
    for old in [old for old in origins if old[: len(key)] == key]:
        del origins[old]
    return above


def _overridden(layer: Layer, override: str) -> Layer:
    name, equals, text = override.partition("=")
    where = f"--set {name}"
    if not equals or not name:
        raise RecipeError("is not `section.key=value`", where=where)
    if name == "extends":
        raise RecipeError("belongs in the recipe file", where=where)
    steps: list[str | int] = []
    inside: Any = layer.value
    for step in name.split("."):
        if isinstance(inside, list):
            if not step.isdecimal() or int(step) >= len(inside):
                numbers = f"0 to {len(inside) - 1}" if inside else "no entries"
                raise RecipeError(f"{dotted(tuple(steps))} is a list with entries {numbers}, no {step}", where=where)
            steps.append(int(step))
            inside = inside[int(step)]
        elif inside is None or isinstance(inside, dict):
            steps.append(step)
            inside = inside.get(step) if inside else None
        else:
            raise RecipeError(f"{dotted(tuple(steps))} holds a value; there is no key {step} beneath it", where=where)
    key = tuple(steps)
    value = resolved(_parsed(text, where), Path.cwd(), at=key)
    origins = {old: origin for old, origin in layer.origins.items() if old[: len(key)] != key}
    origins[key] = Origin(SET, 1_000, 0, 0)
    return Layer(_replaced(layer.value, key, value), origins)


def _parsed(text: str, where: str) -> Any:
    try:
        return parse(text, name=where).value
    except RecipeError as error:
        raise RecipeError(Problem(where, problem.message) for problem in error.problems) from None


def _replaced(tree: Any, key: KeyPath, value: Any) -> Any:
    if not key:
        return value
    if isinstance(tree, list):
        return [_replaced(entry, key[1:], value) if index == key[0] else entry for index, entry in enumerate(tree)]
    return {**(tree or {}), key[0]: _replaced((tree or {}).get(key[0]), key[1:], value)}
