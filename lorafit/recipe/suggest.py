"""What a wrong key probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches

from lorafit.recipe.yaml_reader import KeyPath


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that looks most like `word`, if any does."""
    found = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown_key(key: KeyPath) -> str:
    """What to say about a key that the schema does not have."""
    return f"not a key of {key[-2] if len(key) > 1 else 'a recipe'}"
