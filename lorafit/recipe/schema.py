"""The JSON Schema of a recipe, with every field's docstring: what editors complete and explain with."""

import ast
import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from lorafit.recipe.recipe import Recipe
from lorafit.recipe.schema_walk import section_in


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (2020-12). Docstrings are read from the source here only, so that loading a recipe stays quick."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    for section in _sections(Recipe):
        properties = schema["properties"] if section is Recipe else definitions[section.__name__]["properties"]
        for name, text in field_docstrings(section).items():
            properties[name]["description"] = text
    schema["properties"]["extends"] = {
        "type": "string",
        "minLength": 1,
        "description": "Another recipe that this one is laid over: mappings merge key by key, all else is replaced.",
    }
    schema["anyOf"] = [{"required": ["extends"]}, _whole(schema)]
    schema["title"] = "lorafit recipe"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _whole(schema: dict[str, Any]) -> dict[str, Any]:
    """Takes the required keys out of `schema` and gives them as a schema of their own: `extends` may bring them."""
    needed = {}
    for name in schema["required"]:
        definition = schema["$defs"][schema["properties"][name]["$ref"].rpartition("/")[2]]
        needed[name] = {"required": definition.pop("required")}
    return {"required": schema.pop("required"), "properties": needed}


def field_docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The string beneath each field of a section, on one line."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match text:
                case ast.Expr(value=ast.Constant(value=str(words))):
                    found[field.target.id] = " ".join(words.split())
    return found


def _sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        if inner := section_in(field.annotation):
            yield from _sections(inner)
