"""The class of transformers that builds and loads the models of a kind."""

from __future__ import annotations

from typing import Any

import transformers

from lorafit.tasks import ModelKind


def auto_class(kind: ModelKind) -> Any:
    """Its class, one of `transformers.AutoModelFor...`."""
    return getattr(transformers, kind.auto_class)
