"""The chat templates that lie beside a tokenizer, wherever its makers put them: no torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafit.builders.model_files import read_json
from lorafit.errors import ModelError

DEFAULT = "default"
MORE = "additional_chat_templates"
IN_JSON = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
"""Files with a key `chat_template`, in the order they are asked. transformers reads the last two for processors only,
though many a tokenizer has its template there and nowhere else."""


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
    return {name: text.removeprefix("\ufeff") for name, text in value.items()}
