"""What a merge is verified on: token sequences of the run's own rows, or random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.builders.model_files import BaseModelFiles
from lorafit.launching.child import Child
from lorafit.merging.child_answer import child_answer
from lorafit.merging.processes import prompts_process
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.sections import ModelSection

if TYPE_CHECKING:  # imports peft, and the process that reads a job does without
    from lorafit.merging.adapter_files import Adapter


@dataclass(frozen=True)
class Prompts:
    """Token sequences, and where they are from."""

    ids: tuple[tuple[int, ...], ...]
    source: str
    """`64 held-out rows`, `8 held-out rows, 24 training rows and 32 random sequences`."""


@dataclass(frozen=True)
class PromptsJob:
    """What the process is told that chooses them."""

    base: ModelSection
    recipe: Recipe | None
    """Of the run; None for a plain adapter."""
    stop_token_ids: frozenset[int]
    vocab_size: int
    cache_dir: Path | None


@contextmanager
def prompts_meanwhile(
    adapter: Adapter, base_files: BaseModelFiles, *, cache_dir: Path | None, process: Child | None = None
) -> Iterator[Callable[[], Prompts]]:
    """64 sequences of at most 64 tokens: held-out rows of the run, then its training rows, then random tokens.

    Read while the block runs, and handed out to who asks, by `process`, a `prompts_process`.
    """
    directory = adapter.directory if adapter.run_dir is None else adapter.run_dir.path
    recipe = None if adapter.recipe is None else adapter.recipe.recipe
    job = PromptsJob(adapter.base, recipe, base_files.stop_token_ids, base_files.vocab_size, cache_dir)

    def found() -> Prompts:
        ids, source = child_answer(child, what="the prompts could not be read", where=directory)
        return Prompts(tuple(map(tuple, ids)), source)

    with process or prompts_process() as child:
        child.call(job)
        yield found


def prompts_for(adapter: Adapter, base_files: BaseModelFiles, *, cache_dir: Path | None) -> Prompts:
    """The same, waited for."""
    with prompts_meanwhile(adapter, base_files, cache_dir=cache_dir) as found:
        return found()
