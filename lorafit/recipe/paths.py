"""The kinds of recipe values that may be paths: made absolute on loading, relative again on writing."""

import os
import re
from pathlib import Path
from typing import Any

from lorafit.recipe.yaml_reader import KeyPath

TEMPLATES = ("chat", "alpaca", "plain")
NAMED_TEMPLATE = "chat:"
"""Before the name of one of several templates of a tokenizer."""
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
OUTPUT_DIR: KeyPath = ("output_dir",)


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+[^/]")


def is_url(text: str) -> bool:
    """Whether a path names a file elsewhere (`s3://bucket/rows.jsonl`)."""
    return bool(_URL.match(text))


def resolved(value: Any, base: Path, *, at: KeyPath = ()) -> Any:
    """`value` with every path in it absolute; relative ones start at `base`."""

    def placed(text: str, key: KeyPath) -> str:
        if key == OUTPUT_DIR:  # relative to where the command runs
            return os.path.expanduser(text)  # noqa: PTH111
        return absolute(text, base) if _is_path(text, key, base) else text

    return _mapped(value, at, placed)


def absolute(text: str, base: Path) -> str:
    """`text` as an absolute path, `~` expanded (an unknown `~name` stays) and links left as they are."""
    return os.path.normpath(Path.cwd() / base / os.path.expanduser(text))  # noqa: PTH111


def relative(value: Any, base: Path) -> Any:
    """`value` of a whole loaded recipe with every path in it relative to `base`, so that both can move together.

    What shares nothing with `base` but the root of the file system cannot move with it, and stays absolute.
    """

    def told(text: str, key: KeyPath) -> str:
        if not Path(text).is_absolute() or key == OUTPUT_DIR:
            return text
        is_apart = os.path.commonpath([text, Path.cwd() / base]) == os.sep
        return text if is_apart else _from(text, base, key)

    return _mapped(value, (), told)


def moved(value: Any, start: Path, base: Path) -> Any:
    """`value` as the user wrote it at `start`, for a recipe in `base`: relative paths lead to the same places, absolute
    ones and those of a home directory stay as they are."""

    def spelled(text: str, key: KeyPath) -> str:
        if not _is_path(text, key, start) or text.startswith("~") or Path(text).is_absolute() or "://" in text:
            return text
        return _from(absolute(text, start), base, key)

    return _mapped(value, (), spelled)


def looks_local(name: str, base: Path) -> bool:
    """Whether a model name is a directory, not a Hub id (`name` or `org/name`)."""
    return (
        name.startswith((".", "/", "~", "\\"))
        or name.endswith("/")
        or name.count("/") > 1
        or os.path.lexists(base / name)
    )


def _mapped(value: Any, at: KeyPath, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(entry, (*at, key), change) for key, entry in value.items()}
    if isinstance(value, list):
        return [_mapped(entry, (*at, index), change) for index, entry in enumerate(value)]
    return change(value, at) if isinstance(value, str) and value and _may_be_path(at) else value


def _may_be_path(at: KeyPath) -> bool:
    match at:
        case ("output_dir",) | ("model", "model_name_or_path") | ("data", "template") | ("launch", "strategy"):
            return True
        case ("data", "train" | "eval", int(), "path") | ("eval", "general", int(), "path") | ("eval", "tasks", int()):
            return True
    return False


def _is_path(text: str, at: KeyPath, base: Path) -> bool:
    if at[0] == "model":
        return looks_local(text, base)
    if at[:2] == ("eval", "tasks"):
        return text.endswith((".yaml", ".yml"))
    if at[-1] == "path" and is_url(text):
        return False
    if at[1] == "template" and text.startswith(NAMED_TEMPLATE):
        return False
    return text not in {"template": TEMPLATES, "strategy": STRATEGIES}.get(str(at[1]), ())


def _from(text: str, base: Path, at: KeyPath) -> str:
    short = os.path.relpath(text, Path.cwd() / base)
    # A bare name would be read as a Hub id or a built-in name.
    is_bare = at[0] in ("model", "launch") or at[1] == "template"
    return f"./{short}" if is_bare and not short.startswith(".") else short
