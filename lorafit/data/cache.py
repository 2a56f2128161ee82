"""Prepared tokens on disk, by content: staged, renamed when whole, verified when read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from lorafit.storage.files import sha256_of, write_file
from lorafit.storage.seal import Damaged, identity, verified
from lorafit.storage.stage import discard, make_directory, remove_abandoned, staged

FORMAT = 2
"""Of an entry: another number finds none of the entries that were written in another way."""


def cache_directory() -> Path:
    """Where prepared tokens are kept: `$LORAFIT_CACHE`, else `lorafit` beside the Hugging Face cache."""
    if chosen := os.environ.get("LORAFIT_CACHE"):
        return Path(chosen)
    return Path(HF_HOME).parent / "lorafit"


@dataclass(frozen=True)
class Entry:
    """What is stored under one fingerprint."""

    tables: dict[str, Path]
    audit: dict[str, Any]
    prompts: list[Any]
    tokens: str
    """The start of a hash of the tokens and labels."""


def load(cache: Path, fingerprint: str) -> Entry | None:
    """The entry; None when there is none, or when it is not whole.

    A table is taken for what it was as long as its size and times are what they were when it was written; else it is
    hashed, at about a second for each gigabyte.
    """
    entry = cache / fingerprint
    remove_abandoned(cache)
    try:
        facts = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
        tables = {name: entry / f"{name}.arrow" for name in facts["tables"]}
        verified(entry, {tables[name].name: seal for name, seal in facts["tables"].items()})
        touched = [name for name, path in tables.items() if facts["tables"][name]["identity"] != identity(path)]
        if touched:  # copied to another disk, for one
            with suppress(OSError):
                for name in touched:
                    facts["tables"][name]["identity"] = identity(tables[name])
                write_file(entry / "facts.json", json.dumps(facts))
        return Entry(tables, facts["audit"], facts["prompts"], facts["tokens"])
    except OSError:
        if not entry.is_dir():
            return None
    except (Damaged, ValueError, KeyError, TypeError, AttributeError):
        pass
    # Damaged: made again. Whoever still reads the old files keeps them open.
    with suppress(OSError):
        discard(entry)
    return None


@contextmanager
def new_entry(cache: Path, fingerprint: str) -> Iterator[Path]:
    """A directory that becomes the entry when the block ends, and is gone when it raises.

    When another process was faster its entry, equal by content, stays. What killed processes left goes.
    """
    make_directory(cache)
    with suppress(FileExistsError), staged(cache / fingerprint) as stage:
        yield stage


def seal(stage: Path, tables: Mapping[str, Path], *, audit: dict[str, Any], prompts: list[Any], tokens: str) -> None:
    """Write down what the finished tables of a new entry are."""
    known = {name: {"sha256": sha256_of(path), "identity": identity(path)} for name, path in tables.items()}
    facts = {"tables": known, "audit": audit, "prompts": prompts, "tokens": tokens}
    (stage / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
