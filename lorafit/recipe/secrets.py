"""Tokens and passwords have no place in a recipe: it is copied into every run directory."""

import re
from collections.abc import Iterator
from typing import Any

from lorafit.recipe.yaml_reader import KeyPath

_SECRET_KEY = re.compile(
    r"(^|_)(auth|access|hub|hf|huggingface|wandb|api|bearer)_?token$|^token$|api_?key|secret|passw(or)?d|credential",
    re.IGNORECASE,
)
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,}|xox[bp]-[A-Za-z0-9-]{10,})"
    r"|:/+[^/\s:@]+:(?!\d{1,5}/)[^\s@]+@|https?:/+[^/\s@]+@"
    r"|[?&][^=&\s]*(?:signature|credential|token|secret|passw(?:or)?d|api_?key|access_?key)[^=&\s]*=|[?&](?:sig|key|auth)=",
    re.IGNORECASE,
)

MESSAGE = (
    "holds what looks like a token or password; take it out: `hf auth login`, or the environment, is where it goes"
)


def secret_keys(value: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """The keys beneath which a secret seems to be written."""
    if isinstance(value, dict):
        if any(SECRET_VALUE.search(key) for key in value):
            yield at
            return
        for key, entry in value.items():
            yield from [(*at, key)] if _is_secret(key, entry) else secret_keys(entry, (*at, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from secret_keys(entry, (*at, index))
    elif isinstance(value, str) and SECRET_VALUE.search(value):
        yield at


def is_secret_key(name: str) -> bool:
    """Whether a key or variable of this name holds a secret."""
    return bool(_SECRET_KEY.search(name))


def _is_secret(key: str, value: Any) -> bool:
    return isinstance(value, str) and value != "" and is_secret_key(key)
