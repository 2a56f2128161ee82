"""Pydantic's errors in our words: one line per wrong key, the value shown, what to write instead."""

import json
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lorafit.recipe.example import example
from lorafit.recipe.recipe import Recipe, recipe_class
from lorafit.recipe.schema_walk import field_at, section_in
from lorafit.recipe.suggest import GUESSES, nearest, unknown_key
from lorafit.recipe.yaml_reader import FLOAT, KeyPath

_NEEDED: dict[KeyPath, str] = {
    ("model",): "name the base model: `model: {model_name_or_path: ...}`",
    ("model", "model_name_or_path"): "write a Hub id or the path of a model directory",
    ("data",): "name the training rows: `data: {train: [{path: ...}]}`",
    ("data", "train"): "name the training rows: `train: [{path: ...}]`",
}


@dataclass(frozen=True)
class Wrong:
    """One wrong key."""

    key: KeyPath
    message: str
    meant: KeyPath | None = None
    """The key it is a misspelling of."""

    example: str | None = None
    """What could stand there instead, as YAML."""


_TRAPS = {
    ("init_lora_weights", "pissa_niter"): "its fast SVD is not the same after reloading; write pissa, which is exact",
    ("attn_implementation", "/"): "a Hub kernel runs code downloaded at start",
}
"""Values that libraries take and a recipe does not, by a piece of their text, and why."""


def in_our_words(error: ValidationError, tree: dict[str, Any]) -> list[Wrong]:
    """Every wrong key of `tree` with what is wrong with it, once each."""
    found: dict[KeyPath, list[Any]] = {}
    recipe = recipe_class(tree)
    for detail in error.errors(include_url=False):
        found.setdefault(_key_of(detail["loc"], tree, detail["type"]), []).append(detail)
    above = {key[:length] for key in found for length in range(len(key))}
    leaves = [key for key in found if key not in above]
    foreign = [key for key in leaves if found[key][0]["type"] == "extra_forbidden"]
    unknown = {key: unknown_key(key, recipe, guesses=number < GUESSES) for number, key in enumerate(foreign)}
    misspelt = {guess for _, guess in unknown.values()}  # not missing, too
    return [
        Wrong(key, *unknown[key]) if key in unknown else _wrong(key, found[key], tree, recipe)
        for key in leaves
        if key not in misspelt
    ]


def shown(value: Any) -> str:
    """A value as it may be written in a recipe, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def expected(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """What a value of this type looks like, in words."""
    *most, last = _expected(annotation, limits)
    return f"{', '.join(most)} or {last}" if most else last


def _key_of(loc: tuple[Any, ...], tree: Any, kind: str) -> KeyPath:
    """The written key inside an error location: union branches and `[key]` marks left out."""
    key: list[str | int] = []
    for number, step in enumerate(loc):
        if step in tree if isinstance(tree, dict) else isinstance(tree, list) and isinstance(step, int):
            key.append(step)
            tree = tree[step]
        elif kind == "missing" and number == len(loc) - 1:
            key.append(step)
    return tuple(key)


def _wrong(key: KeyPath, details: Sequence[Any], tree: dict[str, Any], recipe: type[Recipe]) -> Wrong:
    if details[0]["type"] == "missing":
        return Wrong(key, f"is missing; {_NEEDED.get(key, 'write it')}")
    value: Any = tree
    for step in key:
        value = value[step]
    if any(detail["type"] in ("too_short", "string_too_short") for detail in details):
        return Wrong(key, f"{shown(value)} is empty; write at least one")
    annotation, limits = _type_at(key, recipe)
    words = _from_validators(details) or expected(annotation, limits)
    mend = _mend(key, value, annotation)
    return Wrong(
        key,
        f"{shown(value)} is not {words}{mend}",
        example=None if mend or value is None else example(annotation, value),
    )


def _from_validators(details: Iterable[Any]) -> str | None:
    return next((str(detail["ctx"]["error"]) for detail in details if detail["type"] == "value_error"), None)


def _type_at(key: KeyPath, recipe: type[Recipe]) -> tuple[Any, Sequence[Any]]:
    """Type and limits of the value at a written key, entries of lists and mappings included."""
    named = max(
        index + 1 for index in range(len(key)) if field_at(key[: index + 1], recipe) and isinstance(key[index], str)
    )
    field = field_at(key[:named], recipe)
    assert field is not None
    annotation: Any = field.annotation
    limits: Sequence[Any] = field.metadata
    for _ in key[named:]:
        annotation, limits = _inside(annotation), ()
    return annotation, limits


def _inside(annotation: Any) -> Any:
    """The type of the entries of a list or mapping type; None where there are none."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (tuple, dict):
        return parts[0] if origin is tuple else parts[1]
    inner = parts[:1] if origin is Annotated else parts if origin in (Union, types.UnionType) else ()
    return next((entry for part in inner if (entry := _inside(part)) is not None), None)


def _mend(key: KeyPath, value: Any, annotation: Any) -> str:
    """How to write a value that is nearly right."""
    parts = _parts(annotation)
    if value is None:
        return (
            "; write its keys beneath it, or leave it out"
            if section_in(annotation)
            else "; leave it out for the default"
        )
    if not isinstance(value, str):
        return ""
    for (name, piece), said in _TRAPS.items():
        if key[-1] == name and piece in value:
            return f"; {said}"
    if FLOAT.fullmatch(value) and (int in parts or float in parts):
        return f"; write {value} without quotes"
    if value.lower() in ("yes", "on", "no", "off", "true", "false") and bool in parts:
        return f"; write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}"
    if value.lower() in ("none", "nil") and type(None) in parts:
        return "; write null"
    guess = nearest(value, [str(choice) for part in parts if get_origin(part) is Literal for choice in get_args(part)])
    return f"; did you mean {guess}?" if guess else ""


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The branches of a union."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for part in get_args(annotation) for inner in _parts(part))
    return (annotation,)


def _expected(annotation: Any, limits: Sequence[Any]) -> list[str]:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = [limit for part in parts[1:] for limit in (part.metadata if isinstance(part, FieldInfo) else (part,))]
        return _expected(parts[0], [*limits, *extra])
    if origin in (Union, types.UnionType):
        return [words for part in parts for words in _expected(part, limits)]
    if origin is Literal:
        return [str(choice) for choice in parts] if len(parts) < 3 else [f"one of {', '.join(map(str, parts))}"]
    if annotation is bool:
        return ["true", "false"]
    if annotation is int:
        return [f"a whole number{_range(limits)}"]
    if annotation is float:
        return [f"a number{_range(limits)}"]
    if annotation is str:
        return ["text"]
    if annotation in (None, type(None)):
        return ["null"]
    if origin is tuple:
        return [f"a list of {_plural(parts[0])}"]
    return ["a mapping (`key: value`)"]


def _plural(entry: Any) -> str:
    if section_in(entry):
        return "mappings (`- {path: ...}`)"
    return {str: "names", int: "whole numbers"}.get(entry, "values")


def _range(limits: Sequence[Any]) -> str:
    said = []
    for limit in limits:
        match limit:
            case Ge(ge=low):
                said.append(f"of at least {low}")
            case Gt(gt=low):
                said.append(f"above {low}")
            case Le(le=high):
                said.append(f"at most {high}")
            case Lt(lt=high):
                said.append(f"below {high}")
            case MinLen():
                pass
    return " " + " and ".join(said) if said else ""
