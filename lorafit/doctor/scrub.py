"""What leaves this machine with a bug report: no secret, and no name of a home directory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import get_token

from lorafit.recipe.secrets import SECRET_VALUE, is_secret_key

HIDDEN = "[hidden]"
_HOMES = re.compile(r"(?<![\w.])(/home|/Users|[A-Za-z]:\\Users)[/\\][^/\\\s\"':]+")
_ASSIGNED = re.compile(
    r"""(?P<key>[A-Za-z_][\w-]*)(?P<sign>["']?\s*[:=]\s*)(?P<quote>["']?)(?P<value>[^\s"',}\]]+)""", re.ASCII
)
SHORTEST_SECRET = 8


def scrubbed(text: str) -> str:
    """`text` without tokens, passwords and home directories."""
    for secret in _known_secrets(os.environ):
        text = text.replace(secret, HIDDEN)
    text = SECRET_VALUE.sub(HIDDEN, text)
    text = _ASSIGNED.sub(_without_value, text)
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return _HOMES.sub("~", text)


def scrubbed_values(variables: Mapping[str, str]) -> dict[str, str]:
    """The same for variables, of which a name may already say that the value is secret."""
    return {name: HIDDEN if is_secret_key(name) else scrubbed(value) for name, value in variables.items()}


def _known_secrets(environment: Mapping[str, str]) -> list[str]:
    """What the environment and the Hub's login hold, longest first: one may be part of another."""
    values = {value for name, value in environment.items() if is_secret_key(name)} | {get_token() or ""}
    return sorted((value for value in values if len(value) >= SHORTEST_SECRET), key=len, reverse=True)


def _without_value(found: re.Match[str]) -> str:
    if not is_secret_key(found["key"]):
        return found[0]
    return f"{found['key']}{found['sign']}{found['quote']}{HIDDEN}"
