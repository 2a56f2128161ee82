"""What to write where a mapping or a list belongs, made of the schema's own keys and defaults."""

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorafit.recipe.sections import QuantizationSection, Source

MOST_KEYS = 2


def example(annotation: Any, value: Any) -> str | None:
    """YAML on one line for a value of this type, with what was written (`value`) where it fits; None for other types.

    `{max_new_tokens: 256, metrics: [exact_match, rouge_l]}` for `eval.generate`, `[{path: rows.jsonl}]` for a list of
    sources.
    """
    if isinstance(value, dict):
        return None
    made = _made(annotation, value)
    if made is None:
        return None
    return yaml.safe_dump(made, default_flow_style=True, sort_keys=False, width=1000).strip().replace("'...'", "...")


def _made(annotation: Any, value: Any) -> Any:
    origin, parts = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _mapping(annotation, value)
    if origin is Annotated:
        return _made(parts[0], value)
    if origin in (Union, types.UnionType):
        return next((made for part in parts if (made := _made(part, value)) is not None), None)
    if origin is tuple and not isinstance(value, list):
        entry = _made(parts[0], value)
        entry = value if entry is None and _fits(parts[0], value) else entry
        return None if entry is None else [entry]
    return None


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a single value could stand in the list that was asked for."""
    if get_origin(annotation) is Annotated:
        return _fits(get_args(annotation)[0], value)
    return value in get_args(annotation) if get_origin(annotation) is Literal else type(value) is annotation


def _mapping(section: type[BaseModel], value: Any) -> dict[str, Any]:
    """The keys that must be written, or those that are most worth it."""
    text = value if isinstance(value, str) else "..."
    if section is Source:
        return {"path": text}
    if section is QuantizationSection:  # its defaults ask for neither width
        return {"load_in_4bit": True}
    fields = section.model_fields
    if needed := [name for name, field in fields.items() if field.is_required()]:
        return {name: _made(fields[name].annotation, value) or text for name in needed}
    told = {name: _plain(field) for name, field in fields.items() if _plain(field)}
    return dict(list(told.items())[:MOST_KEYS]) or {next(iter(fields)): "..."}


def _plain(field: FieldInfo) -> Any:
    """The default as YAML knows it; nothing where it says nothing."""
    return list(field.default) if isinstance(field.default, tuple) else field.default
