"""What a merge is verified on: token sequences of the run's own rows, or random ones."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lorafit.builders.model_files import BaseModelFiles
from lorafit.merging.adapter_files import Adapter
from lorafit.merging.fresh_process import run_process


@dataclass(frozen=True)
class Prompts:
    """Token sequences, and where they are from."""

    ids: tuple[tuple[int, ...], ...]
    source: str
    """`64 held-out rows`, `8 held-out rows, 24 training rows and 32 random sequences`."""


def prompts_for(adapter: Adapter, base_files: BaseModelFiles, *, base: str | None, cache_dir: Path | None) -> Prompts:
    """64 sequences of at most 64 tokens: held-out rows of the run, then its training rows, then random tokens.

    Read in a process of its own: preparing rows may take more memory than merging. `base` is the base model that was
    asked for instead of the recorded one.
    """
    directory = adapter.directory if adapter.run_dir is None else adapter.run_dir.path
    with tempfile.TemporaryDirectory(prefix="lorafit-") as work:
        job, found = Path(work) / "job.json", Path(work) / "prompts.json"
        facts = {
            "directory": str(directory),
            "base": base,
            "stop_token_ids": sorted(base_files.stop_token_ids),
            "vocab_size": base_files.vocab_size,
            "cache_dir": None if cache_dir is None else str(cache_dir),
            "out": str(found),
        }
        job.write_text(json.dumps(facts), encoding="utf-8")
        run_process("lorafit.merging.prompts_job", job, what="the prompts could not be read", where=directory)
        answer = json.loads(found.read_text(encoding="utf-8"))
    return Prompts(tuple(map(tuple, answer["ids"])), answer["source"])
