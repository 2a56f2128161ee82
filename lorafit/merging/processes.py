"""The processes that work for a merge: each imports what it needs, and waits for what it is asked. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lorafit.launching import fork
from lorafit.launching.child import Child


def prompts_process() -> Child:
    """Chooses what is compared: preparing rows may take more memory than merging."""
    return Child("lorafit.merging.prompts_job:choose", waits=True)


def written_process(*, copied: bool = False) -> Child:
    """Loads what was written: without peft, which a merged model has to do without."""
    return Child("lorafit.merging.verify_written:compare", waits=True, copied=copied)


def reference_process(*, copied: bool = False) -> Child:
    """Computes what base and adapter have to give."""
    return Child("lorafit.merging.verify_reference:reference", waits=True, copied=copied)


@dataclass(frozen=True)
class Processes:
    """All of one merge."""

    prompts: Child
    written: Child
    reference: Child


@contextmanager
def processes() -> Iterator[Processes]:
    """Begun before anything else is imported; they end with the block.

    Where that is safe, two of them are copies of this process: one as soon as it has transformers, the other when it
    has peft as well, which takes them no time and hardly any memory. Meanwhile the first imports datasets.
    """
    copied = fork.is_safe()
    with (
        prompts_process() as prompts,
        written_process(copied=copied) as written,
        reference_process(copied=copied) as reference,
    ):
        yield Processes(prompts, written, reference)
