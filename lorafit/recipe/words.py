"""Pydantic's errors in our words: one line per wrong key, the value shown, what to write instead."""

import json
import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lorafit.recipe.recipe import Recipe
from lorafit.recipe.suggest import nearest, unknown_key
from lorafit.recipe.yaml_reader import FLOAT, KeyPath

_NEEDED = {
    ("model",): "name the base model: `model: {model_name_or_path: ...}`",
    ("model", "model_name_or_path"): "write a Hub id or the path of a model directory",
    ("data",): "name the training rows: `data: {train: [{path: ...}]}`",
    ("data", "train"): "name the training rows: `train: [{path: ...}]`",
}


def in_our_words(error: ValidationError, tree: dict[str, Any]) -> list[tuple[KeyPath, str]]:
    """Every wrong key of `tree` with what is wrong with it, once each."""
    found: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_key_of(detail["loc"], tree, detail["type"]), []).append(detail)
    leaves = [key for key in found if not any(key != other and other[: len(key)] == key for other in found)]
    return [(key, _message(key, found[key], tree)) for key in leaves]


def shown(value: Any) -> str:
    """A value as it may be written in a recipe, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def field_at(key: KeyPath) -> FieldInfo | None:
    """The field of the schema that `key` names; None below a field, and for unknown keys."""
    model: Any = Recipe
    field = None
    for step in key:
        if isinstance(step, int):
            continue
        if model is None or step not in model.model_fields:
            return None
        field = model.model_fields[step]
        model = section_in(field.annotation)
    return field


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section model inside an annotation such as `AdaLoraSection | None` or `tuple[Source, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := section_in(part))), None)


def expected(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """What a value of this type looks like, in words."""
    return " or ".join(_expected(annotation, limits))


def _key_of(loc: tuple[Any, ...], tree: Any, kind: str) -> KeyPath:
    """The written key inside an error location: union branches and `[key]` marks left out."""
    key: list[str | int] = []
    for number, step in enumerate(loc):
        if isinstance(tree, dict) and step in tree or isinstance(tree, list) and isinstance(step, int):
            key.append(step)
            tree = tree[step]
        elif kind == "missing" and number == len(loc) - 1:
            key.append(step)
    return tuple(key)


def _message(key: KeyPath, details: Sequence[Any], tree: dict[str, Any]) -> str:
    first = details[0]
    if first["type"] == "missing":
        return f"is missing; {_NEEDED.get(key, 'write it')}"
    if first["type"] == "extra_forbidden":
        return unknown_key(key)
    value: Any = tree
    for step in key:
        value = value[step]
    if any(detail["type"] in ("too_short", "string_too_short") for detail in details):
        return f"{shown(value)} is empty; write at least one"
    words = _from_validators(details) or _words_at(key)
    return f"{shown(value)} is not {words}{_mend(key, value)}"


def _from_validators(details: Iterable[Any]) -> str | None:
    return next((str(detail["ctx"]["error"]) for detail in details if detail["type"] == "value_error"), None)


def _words_at(key: KeyPath) -> str:
    named = max(index for index, step in enumerate(key) if field_at(key[: index + 1]) and isinstance(step, str)) + 1
    field = field_at(key[:named])
    assert field is not None
    annotation, limits = field.annotation, field.metadata
    for _ in key[named:]:
        annotation, limits = _inside(annotation), ()
    return expected(annotation, limits)


def _inside(annotation: Any) -> Any:
    """The type of the entries of a list or mapping type."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (tuple, dict):
        return parts[0] if origin is tuple else parts[1]
    if origin is Annotated:
        return _inside(parts[0])
    found = [_inside(part) for part in parts if get_origin(part) in (tuple, dict, Annotated)]
    return found[0] if found else Any


def _mend(key: KeyPath, value: Any) -> str:
    field = field_at(key)
    if value is None:
        if field and section_in(field.annotation):
            return "; write its keys beneath it, or leave it out"
        return "; leave the key out for the default"
    if not isinstance(value, str) or field is None:
        return ""
    choices = list(_choices(field.annotation))
    if FLOAT.fullmatch(value) and any(part in (int, float) for part in _parts(field.annotation)):
        return f"; write {value} without quotes"
    if value.lower() in ("yes", "on", "no", "off", "true", "false") and bool in _parts(field.annotation):
        return f"; write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}"
    if value in ("None", "none", "nil") and type(None) in _parts(field.annotation):
        return "; write null"
    guess = nearest(value, choices)
    return f"; did you mean {guess}?" if guess else ""


def _parts(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for part in get_args(annotation) for inner in _parts(part))
    return (annotation,)


def _choices(annotation: Any) -> Iterable[str]:
    for part in _parts(annotation):
        if get_origin(part) is Literal:
            yield from (str(choice) for choice in get_args(part))


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
