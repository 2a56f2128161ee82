"""A base's config as the library's object, and what config.json says without it. No torch where that is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from lorafit.builders.modules import CALLED_AS_ON_DISK
from lorafit.errors import ModelError
from lorafit.recipe.sections import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG_ERRORS = (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError)


def load_config(section: ModelSection, *, directory: Path) -> PreTrainedConfig:
    """The library's config object for a directory. Raises ModelError when the library does not take a value in it."""
    try:
        return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=section.trust_remote_code)
    except (*CONFIG_ERRORS, ImportError, OSError) as error:
        where = str(directory / "config.json")
        raise ModelError(f"transformers cannot use it: {one_line(error)}", where=where) from error


def embedding_rows(section: ModelSection, *, directory: Path, config: Mapping[str, Any]) -> int:
    """`vocab_size` of the text model. Raises ModelError as `load_config`, which imports torch and is asked only where
    config.json is not the flat one of a well-known architecture."""
    rows = config.get("vocab_size")
    if type(rows) is int and config["model_type"] in CALLED_AS_ON_DISK:
        return rows
    return int(load_config(section, directory=directory).get_text_config().vocab_size)


def one_line(text: Exception | str) -> str:
    """What a library says, short enough to stand in an error of ours."""
    return " ".join(str(text).split())[:300]
