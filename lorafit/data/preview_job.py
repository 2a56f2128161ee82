"""The first rows of a run: what runs in a process of its own, because who reports does without torch.

They are the rows that were trained on: when the data, the tokenizer or the template is no longer what the manifest
says, it says so instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorafit.data.cache import cache_directory
from lorafit.data.preview import prepared_preview
from lorafit.errors import RunDirError
from lorafit.recipe import load
from lorafit.storage.run_dir import RunDir


def examples(path: Path, rows: int) -> dict[str, Any]:
    """As `lorafit preview --json` shows them. Raises the LorafitError that keeps them from being read or shown."""
    run = RunDir(path)
    fingerprint, view = prepared_preview(load(run.recipe).recipe, rows=rows, cache_dir=cache_directory())
    trained_on = json.loads(run.manifest.read_text(encoding="utf-8"))["data"]["fingerprint"]
    if fingerprint != trained_on:
        raise RunDirError("the data, the template, the tokenizer or a library is no longer that of the run")
    return view.as_dict()
