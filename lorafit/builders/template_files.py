"""The chat templates that lie beside a tokenizer, wherever its makers put them: no torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafit.builders.model_files import read_json
from lorafit.errors import ModelError
from lorafit.recipe.paths import NAMED_TEMPLATE

DEFAULT = "default"
MORE = "additional_chat_templates"
IN_JSON = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
"""Files with a key `chat_template`, in the order they are asked. transformers reads the last two for processors only,
though many a tokenizer has its template there and nowhere else."""


NO_TEMPLATE = (
    "the tokenizer has no chat template; set data.template: alpaca, plain or the path of a Jinja file, or use the "
    "instruct version of the model"
)


def chat_templates(directory: Path) -> dict[str, str]:
    """Name -> Jinja text of the templates in a model's directory; a single one is called `default`.

    Files of their own come before those in JSON, as in transformers. Raises ModelError for one that cannot be read.
    """
    files = {DEFAULT: directory / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((directory / MORE).glob("*.jinja"))}
    found = {name: _text(path) for name, path in files.items() if path.is_file()}
    for name in IN_JSON if not found else ():
        path = directory / name
        if path.is_file() and (value := read_json(path).get("chat_template")):
            found = _named(value, path)
            break
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise ModelError(f"{what}: copy the file again", where=str(path)) from None


def _named(value: Any, path: Path) -> dict[str, str]:
    """One text, a mapping of names to texts, or the older list of both."""
    if isinstance(value, str):
        return {DEFAULT: value.removeprefix("\ufeff")}
    if isinstance(value, list) and all(
        isinstance(one, Mapping) and {"name", "template"} <= one.keys() for one in value
    ):
        value = {one["name"]: one["template"] for one in value}
    if not isinstance(value, Mapping) or not all(isinstance(one, str) for pair in value.items() for one in pair):
        message = "has a chat_template that is neither a text nor texts by name: write one of them, or take it out"
        raise ModelError(message, where=str(path))
    if odd := [name for name in value if name.startswith(".") or not name or "/" in name or "\\" in name]:
        raise ModelError(f"names a chat template {odd[0]!r}, which no file can be called: rename it", where=str(path))
    return {name: text.removeprefix("\ufeff") for name, text in value.items()}


def chosen(template: str, named: Mapping[str, str]) -> dict[str, str]:
    """A tokenizer's templates, with the one that `data.template` names (`chat`, or `chat:NAME`) as its default.

    Raises ModelError where it has none of that name.
    """
    name = template.removeprefix(NAMED_TEMPLATE)
    if name == "chat":
        return dict(named)
    if name not in named:
        raise ModelError(f'has no chat template "{name}"; {several(named)}', where=f"data.template: {template}")
    return {**named, DEFAULT: named[name]}


def several(named: Mapping[str, str]) -> str:
    """Which templates there are, and how one is named."""
    names = sorted(name for name in named if name != DEFAULT)
    if not names:
        return "write data.template: chat, or the path of a Jinja file"
    choices = " or ".join(f"{NAMED_TEMPLATE}{name}" for name in names)
    return f"the tokenizer has the chat templates {', '.join(sorted(named))}; write data.template: {choices}"
