"""The architectures that the installed transformers knows, read off its source: importing its tables imports torch."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorafit.errors import Problem
from lorafit.recipe.sections import ModelSection
from lorafit.tasks import DEFAULT_TASK, Task

_CONFIG_OF_TYPE = re.compile(r'"([\w.-]+)"[,:] "\w+Config"')


@cache
def model_types() -> frozenset[str]:
    """What `model_type` of a config.json may say (CONFIG_MAPPING_NAMES); empty where the library lies without source.

    A test compares it, and `types_with_model`, with the library's own.
    """
    tables = [source_of_auto(name) for name in ("auto_mappings.py", "configuration_auto.py")]
    shown = [table.partition("\nSPECIAL_MODEL_TYPE_TO_MODULE_NAME")[0] for table in tables]
    return frozenset(kind for table in shown for kind in _CONFIG_OF_TYPE.findall(table))


@cache
def types_with_model(table: str) -> frozenset[str]:
    """Those of which there is a model for a task, by the library's table of them."""
    source = source_of_auto("modeling_auto.py")
    entries = source.partition(f"\n{table} = ")[2].partition("\n)\n")[0]
    return frozenset(re.findall(r'^ +\("([\w.-]+)", ', entries, re.MULTILINE))


def source_of_auto(name: str) -> str:
    """A file of `transformers.models.auto`; empty where the library lies without source."""
    package = importlib.util.find_spec("transformers")
    folders = package.submodule_search_locations if package else None
    path = Path((folders or ["."])[0], "models", "auto", name)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def model_type_problems(directory: Path, *, config: Mapping[str, Any], section: ModelSection) -> Iterator[Problem]:
    """An architecture that transformers does not know needs its own code, and the recipe's consent to run it."""
    where, kind = str(directory / "config.json"), config["model_type"]
    known = model_types()
    if not known or kind in known or ("auto_map" in config and section.trust_remote_code):
        return
    if "auto_map" in config:
        message = (
            f"is a {kind!r}, which needs the Python code that comes with it: read {directory.name}/*.py, then set "
            "model.trust_remote_code: true"
        )
    else:
        nearest = difflib.get_close_matches(kind, known, n=1)
        guess = f"did you mean {nearest[0]}?" if nearest else "use a model of an architecture it knows"
        message = f"transformers {version('transformers')} knows no model_type {kind!r}; {guess}"
    yield Problem(where, message)


def task_problems(config: Mapping[str, Any], *, where: str, task: Task = DEFAULT_TASK) -> Iterator[Problem]:
    """A model that sees the text on both sides learns nothing by predicting the next token, for one."""
    kind, bases = config["model_type"], task.bases
    if kind not in model_types():
        return
    name = (config.get("architectures") or [kind])[0]
    is_other_kind = bool(config.get("is_encoder_decoder")) != task.model.is_encoder_decoder
    if kind not in types_with_model(bases.table) or bases.other_class.search(name) or is_other_kind:
        does, called = bases.wanted
        yield Problem(where, f"is a {name}, not a model that {does}: name {called}")
