"""The JSON Schema of a recipe, with every field's docstring: what editors complete and explain with."""

import ast
import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from lorafit.recipe.recipe import DEFAULT_RECIPE, RECIPES, Recipe
from lorafit.recipe.schema_walk import section_in


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (2020-12). Docstrings are read from the source here only, so that loading a recipe stays quick."""
    schema = _described(DEFAULT_RECIPE)
    _add_other_tasks(schema)
    schema["properties"]["extends"] = {
        "type": "string",
        "minLength": 1,
        "description": "Another recipe that this one is laid over: mappings merge key by key, all else is replaced.",
    }
    schema["anyOf"] = [{"required": ["extends"]}, _whole(schema)]
    schema["title"], schema["description"] = "lorafit recipe", inspect.getdoc(Recipe)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _described(recipe: type[Recipe]) -> dict[str, Any]:
    """The schema of the recipes of one task, with the string beneath each field."""
    schema = recipe.model_json_schema()
    for section in _sections(recipe):
        properties = schema["properties"] if section is recipe else schema["$defs"][section.__name__]["properties"]
        for name, text in field_docstrings(section).items():
            properties[name]["description"] = text
    return schema


def _add_other_tasks(schema: dict[str, Any]) -> None:
    """What `task` decides stands under conditions: an editor completes the keys of the task that is written."""
    schemas = {name: _described(recipe) for name, recipe in RECIPES.items()}
    fields = {key: field for one in schemas.values() for key, field in one["properties"].items()}
    decided = [key for key in fields if any(one["properties"].get(key) != fields[key] for one in schemas.values())]
    if not decided:
        return
    for name, one in schemas.items():
        schema["$defs"] |= one["$defs"]
        is_written: list[str] = [] if name == DEFAULT_RECIPE.TASK.name else ["task"]
        condition = {"properties": {"task": {"const": name}}, "required": is_written}
        own = {key: one["properties"].get(key, False) for key in decided}
        schema.setdefault("allOf", []).append({"if": condition, "then": {"properties": own}})
    schema["properties"] |= {key: {} for key in decided}


def _whole(schema: dict[str, Any]) -> dict[str, Any]:
    """Takes the required keys out of `schema` and gives them as a schema of their own: `extends` may bring them."""
    needed = {}
    for name in schema["required"]:
        definition = schema["$defs"][schema["properties"][name]["$ref"].rpartition("/")[2]]
        needed[name] = {"required": definition.pop("required")}
    return {"required": schema.pop("required"), "properties": needed}


def field_docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The string beneath each field of a section, on one line; those of the classes that it is made of, too."""
    found: dict[str, str] = {}
    for part in reversed(section.__mro__):
        if part is not BaseModel and issubclass(part, BaseModel):
            found |= _own_docstrings(part)
    return found


def _own_docstrings(section: type[BaseModel]) -> dict[str, str]:
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match text:
                case ast.Expr(value=ast.Constant(value=str(words))) if field.target.id in section.model_fields:
                    found[field.target.id] = " ".join(words.split())
    return found


def _sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        if inner := section_in(field.annotation):
            yield from _sections(inner)
