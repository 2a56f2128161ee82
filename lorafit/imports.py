"""torch, transformers, peft and trl, imported in less time. No torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from threading import Thread


@contextmanager
def without_collections() -> Iterator[None]:
    """Imports in this block take a fifth less time, and no later garbage collection looks at what they made: a million
    objects that stay for as long as the process does."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def imported_meanwhile(module: str) -> Iterator[None]:
    """Import `module` in a thread while the block runs, which must not import parts of the same libraries.

    What goes wrong there goes wrong again, and is said, where the module is used.
    """
    thread = Thread(target=_import, args=(module,), name=f"import {module}")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _import(module: str) -> None:
    with suppress(Exception), without_collections():
        import_module(module)
