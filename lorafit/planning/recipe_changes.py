"""A recipe with some keys changed, as if they had been written so. No torch."""

from __future__ import annotations

from typing import Any

from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules import broken_rules

Changes = dict[str, Any]
"""`section.key` to its new value."""


def changed(recipe: Recipe, changes: Changes) -> Recipe | None:
    """The recipe with `changes` written in it; None where a rule between fields forbids that."""
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        *sections, name = key.split(".")
        inside = tree
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[name] = value
    made = type(recipe).model_validate(tree)
    return None if any(broken_rules(made)) else made


def written_as(changes: Changes) -> str:
    """`training.gradient_checkpointing: true, ...`"""
    return ", ".join(f"{key}: {_shown(value)}" for key, value in changes.items())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
