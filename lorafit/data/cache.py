"""Prepared tokens on disk, by content: staged, renamed when whole, verified when read."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import pyarrow

TABLES = ("train", "eval")


def load(cache: Path, fingerprint: str) -> tuple[dict[str, Path], dict[str, Any]] | None:
    """The table files and the audit stored under the fingerprint; None when there are none, or not whole."""
    entry = cache / fingerprint
    try:
        facts = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
        tables = {name: entry / f"{name}.arrow" for name in facts["sha256"]}
        if all(_sha256(path) == facts["sha256"][name] for name, path in tables.items()):
            return tables, facts["audit"]
    except OSError:
        if not entry.is_dir():
            return None
    except (ValueError, KeyError, TypeError):
        pass
    # Damaged: made again. Whoever still reads the old files keeps them open.
    shutil.rmtree(entry, ignore_errors=True)
    return None


def store(cache: Path, fingerprint: str, tables: dict[str, pyarrow.Table], audit: dict[str, Any]) -> None:
    """Write the entry in one step. When another process was faster its entry, equal by content, stays."""
    cache.mkdir(parents=True, exist_ok=True)
    stage = cache / f"{fingerprint}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    stage.mkdir()
    try:
        digests = {}
        for name, table in tables.items():
            path = stage / f"{name}.arrow"
            with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            digests[name] = _sha256(path)
        facts = json.dumps({"sha256": digests, "audit": audit})
        (stage / "facts.json").write_text(facts, encoding="utf-8")
        try:
            stage.rename(cache / fingerprint)
        except OSError:
            if not (cache / fingerprint).is_dir():
                raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
