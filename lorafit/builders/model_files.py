"""A base model on disk: what its files say, before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file."""

    file: str
    dtype: str
    """As the file spells it: `BF16`, `F32`."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BaseModelFiles:
    """A base model whose files are whole."""

    name: str
    """What the recipe says: a Hub id or a directory."""
    directory: Path
    """Where the files lie; for a Hub model its snapshot in the cache."""
    revision: str | None
    """Commit of a Hub model; None for a directory."""
    config: Mapping[str, Any]
    """config.json."""
    tensors: Mapping[str, TensorInfo]
    total_bytes: int
    """Bytes of all tensors as they are stored."""
    stop_token_ids: frozenset[int]
    """What generation stops on: `eos_token_id` of generation_config.json, else of config.json."""
    vocab_size: int
    """Rows of the embedding."""


def is_local_path(name: str) -> bool:
    """Whether a model is meant as a directory: such a name never reaches the Hub."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or Path(name).is_dir()


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read as JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=str(path))
    return value


def stop_token_ids(directory: Path, *, config: Mapping[str, Any]) -> frozenset[int]:
    source = directory / "generation_config.json"
    value = (read_json(source) if source.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
    return frozenset(value if isinstance(value, list) else [] if value is None else [value])
