"""Looking around in the schema: which keys exist, and what type they have."""

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorafit.recipe.recipe import DEFAULT_RECIPE, Recipe
from lorafit.recipe.yaml_reader import KeyPath


def field_at(key: KeyPath, recipe: type[Recipe] = DEFAULT_RECIPE) -> FieldInfo | None:
    """The field that `key` names in a recipe of this class; None for unknown keys and for what lies inside a field."""
    model: type[BaseModel] | None = recipe
    field = None
    for step in key:
        if isinstance(step, int):
            continue
        if model is None or step not in model.model_fields:
            return None
        field = model.model_fields[step]
        model = section_in(field.annotation)
    return field


def section_at(key: KeyPath, recipe: type[Recipe] = DEFAULT_RECIPE) -> type[BaseModel]:
    """The section model that `key` names (`data.train.0` names a source)."""
    field = field_at(key, recipe)
    section = section_in(field.annotation) if field else None
    return section or recipe


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section model inside an annotation such as `AdaLoraSection | None` or `tuple[Source, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := section_in(part))), None)


def keys_of(section: type[BaseModel]) -> list[str]:
    """The keys that may be written in a section."""
    return [*section.model_fields, "extends"] if issubclass(section, Recipe) else list(section.model_fields)


def places(recipe: type[Recipe] = DEFAULT_RECIPE) -> list[KeyPath]:
    """Every key of the schema with its section; those of a source of rows once, under `data.train`."""
    again = (("data", "eval"), ("eval", "general"))
    return [place for place in _below((), recipe) if place[:2] not in again or len(place) == 2]


def _below(key: KeyPath, section: type[BaseModel]) -> Iterable[KeyPath]:
    for name, field in section.model_fields.items():
        yield (*key, name)
        if inner := section_in(field.annotation):
            yield from _below((*key, name), inner)
