"""Writing recipes in tests."""

from collections.abc import Sequence
from pathlib import Path

from lorafit.errors import RecipeError
from lorafit.recipe import LoadedRecipe, load

SMALLEST = "model: {model_name_or_path: gpt2}\ndata: {train: [{path: rows.jsonl}]}\n"


def written(directory: Path, text: str, *, name: str = "x.yaml") -> Path:
    """The path of a new recipe with this text."""
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def loaded(directory: Path, text: str = SMALLEST, *, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe with this text, loaded."""
    return load(written(directory, text), overrides=overrides)


def problems(directory: Path, text: str, *, overrides: Sequence[str] = ()) -> list[str]:
    """What is said about a recipe, a line each, the directory left out; empty when it loads."""
    try:
        loaded(directory, text, overrides=overrides)
    except RecipeError as error:
        return [str(problem).replace(f"{directory}/", "") for problem in error.problems]
    return []
