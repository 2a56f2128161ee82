"""Every key of a recipe as one page, docs/recipe.md, from the schema and the string beneath each field.

python scripts/recipe_reference.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafit.recipe.rules import RULES
from lorafit.recipe.rules.broken import Rule
from lorafit.recipe.schema import recipe_schema

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
OPENING = """\
# The recipe

One YAML file says what a run is. Inside `model`, `quantization`, `lora` and `training` the keys are those of
`from_pretrained`, `BitsAndBytesConfig`, `peft.LoraConfig` and `trl.SFTConfig`, so their documentation applies; the
other sections are lorafit's own. Only `model.model_name_or_path` and one source under `data.train` must be written. A
key that is not below is refused, with the one that was meant.

- `extra:` in a library section takes further keys of that library, which must know them.
- `extends: other.yaml` lays a recipe over another: mappings merge key by key, all else is replaced.
- `--set section.key=value` changes one key from the command line, under the same rules.
- Relative paths are relative to the recipe; `output_dir` is relative to where the command is run.
- Recipes are YAML 1.2: `2e-4` is a number, `no` is text. Types are strict: `true` is not 1, `"3"` is not 3.

`lorafit schema` prints the same for editors, and [lorafit.schema.json](../lorafit.schema.json) holds it: with the first
line `# yaml-language-server: $schema=lorafit.schema.json` they complete and explain every key. This page is written by
`python scripts/recipe_reference.py` from the schema.
"""
OF_RULES = """\
## Rules between keys

A recipe that breaks one is refused with the line of the key and what to write. Each says what must hold, and why: what
would otherwise fail late, or be ignored without a word."""


def page() -> str:
    """The Markdown of the whole reference."""
    schema = recipe_schema()
    definitions = schema["$defs"]
    plain = {name: field for name, field in schema["properties"].items() if field and not _sections_in(field)}
    blocks = [OPENING.rstrip(), "## Top of the recipe", *_keys("", plain)]
    shown: dict[str, str] = {}
    for name, field in schema["properties"].items():
        for definition in _sections_in(field):
            blocks += _section(_path(name, field), definition, definitions, shown)
    for rule in schema.get("allOf", ()):
        task = rule["if"]["properties"]["task"]["const"]
        for name, field in rule["then"]["properties"].items():
            for definition in _sections_in(field):
                blocks += _section(f"{name} (task: {task})", definition, definitions, shown)
    return "\n\n".join([*blocks, OF_RULES, "\n".join(map(_rule, RULES))]) + "\n"


def _rule(rule: Rule) -> str:
    """What its name says must hold, and why."""
    name = rule.__name__.replace("_", " ")
    return f"- {name[0].upper()}{name[1:]}. {_one_line(rule.__doc__ or '')}"


def _section(path: str, name: str, definitions: dict[str, Any], shown: dict[str, str]) -> Iterator[str]:
    """One section with the sections in it; a reference to the first place where it has stood before."""
    definition = definitions[name]
    yield f"## {path}"
    if name in shown:
        yield f"As [{shown[name]}](#{_anchor(shown[name])})."
        return
    shown[name] = path
    yield _one_line(definition["description"])
    yield from _keys(path, definition["properties"])
    for key, field in definition["properties"].items():
        for inner in _sections_in(field):
            yield from _section(f"{path}.{_path(key, field)}", inner, definitions, shown)


def _keys(path: str, fields: dict[str, Any]) -> Iterator[str]:
    """A heading for each key, what may be written, the default, and its text."""
    for name, field in fields.items():
        key = f"{path}.{name}" if path else name
        if "default" in field:
            default = f"; default `{_yaml(field['default'])}`"
        else:
            default = "" if key == "extends" else "; must be written"
        yield f"### {key}\n\n{_values(field)}{default}\n\n{_one_line(field['description'])}"


def _values(field: dict[str, Any]) -> str:
    """What may be written: `a whole number from 1`, `"nf4"` or `"fp4"`."""
    if "anyOf" in field or "oneOf" in field:
        return " or ".join(map(_values, field.get("anyOf") or field["oneOf"]))
    if "$ref" in field:
        return "a section"
    if "enum" in field:
        return f"one of {', '.join(f'`{value}`' for value in field['enum'])}"
    if "const" in field:
        return f"`{field['const']}`"
    match field.get("type"):
        case "array":
            return f"a list, each {_values(field.get('items', {}))}"
        case "object":
            values = field.get("additionalProperties")
            return f"a mapping, each value {_values(values)}" if isinstance(values, dict) else "a mapping"
        case "integer" | "number" as kind:
            return ("a whole number" if kind == "integer" else "a number") + _bounds(field)
        case "boolean":
            return "`true` or `false`"
        case "null":
            return "`null`"
        case "string":
            return "text"
    return "any value"


def _bounds(field: dict[str, Any]) -> str:
    names = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return "".join(f" {word} {field[name]:,}" for name, word in names.items() if name in field)


def _sections_in(field: dict[str, Any]) -> list[str]:
    """The definitions that a field refers to, itself, in a choice or in a list."""
    if "$ref" in field:
        return [field["$ref"].rpartition("/")[2]]
    inside = [*field.get("anyOf", ()), *field.get("oneOf", ()), *([field["items"]] if "items" in field else [])]
    return [name for one in inside for name in _sections_in(one)]


def _path(name: str, field: dict[str, Any]) -> str:
    return f"{name}[]" if field.get("type") == "array" else name


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return "".join(letter for letter in heading.lower() if letter.isalnum() or letter in "_-")


def _yaml(value: Any) -> str:
    """A default as one would write it: in this subset JSON, but for text without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
