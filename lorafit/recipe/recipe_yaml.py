"""A recipe -> YAML that loads back to an equal recipe."""

from pathlib import Path
from typing import Any

import yaml

from lorafit.errors import RecipeError
from lorafit.recipe.paths import relative
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.yaml_reader import FLOAT
from lorafit.storage.files import write_file, write_new_file


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 would read as a number, besides what YAML 1.1 reads as anything; never writes an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Dumper.add_representer(tuple, lambda dumper, entries: dumper.represent_list(list(entries)))


def recipe_yaml(recipe: Recipe, base: Path) -> str:
    """What was written in `recipe` and what differs from the defaults; paths relative to the directory `base`."""
    return dump(relative(recipe.model_dump(mode="json", exclude_unset=True), base))


def dump(value: Any) -> str:
    """`value` as YAML, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def write_asked_for(path: Path, content: str | bytes, *, option: str, overwrite: bool) -> None:
    """`content` in the file that the command line asks for with `option`.

    Raises RecipeError where there can be no such file.
    """
    where = str(path)
    try:
        (write_file if overwrite else write_new_file)(path, content)
    except FileExistsError:
        raise RecipeError(f"is there already and is never overwritten; choose another {option}", where=where) from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise RecipeError(f"cannot be written ({error.strerror}); choose another {option}", where=where) from None
