"""The architectures that ship with lorafit, and how a model name becomes an architecture."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from lorafit.builders.architectures import model_type_problems
from lorafit.builders.library_config import load_config
from lorafit.builders.model_files import is_on_hub, model_directory, read_config
from lorafit.errors import ModelError
from lorafit.recipe.sections import ModelSection

SHAPES = Path(__file__).with_name("shapes")


@cache
def known_shapes() -> dict[str, dict[str, Any]]:
    """Name of each shipped shape to its Hub ids, published parameter count and source."""
    return json.loads((SHAPES / "index.json").read_text(encoding="utf-8"))


def known_shape(name: str) -> str | None:
    """The shipped shape that a shape name or a Hub id stands for."""
    return next((shape for shape, facts in known_shapes().items() if name == shape or name in facts["hub_ids"]), None)


def architecture(section: ModelSection) -> PreTrainedConfig:
    """The library's config of a model, from a shipped shape (by its name or Hub id), a directory, or the Hub's cache.

    Only settings are read or fetched, never weights. Raises ModelError.
    """
    shape = known_shape(section.model_name_or_path) if is_on_hub(section) else None
    directory = SHAPES / shape if shape else model_directory(section)
    config = read_config(directory)
    if problems := list(model_type_problems(directory, config=config, section=section)):
        raise ModelError(problems)
    return load_config(section, directory=directory)
