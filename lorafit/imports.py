"""torch, transformers, peft and trl, imported in less time. No torch."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from threading import Thread


@contextmanager
def quick_imports() -> Iterator[None]:
    """Imports in this block take a third less time.

    No garbage collection looks at what they make, now or later: a million objects that stay for as long as the process
    does. And nothing is made ready to be compiled: bitsandbytes 0.50 hands functions that no device we train on calls
    to `torch.compile`, which imports all of Inductor (`_try_torch_compile` in its backends/default/ops.py).
    """
    gc.disable()
    with _environment(TORCHDYNAMO_DISABLE="1"):  # torch.compile looks at it each time (torch 2.13, `_optimize`)
        try:
            yield
        finally:
            gc.freeze()
            gc.enable()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """With these variables, where they are not set already."""
    ours = {name: text for name, text in variables.items() if name not in os.environ}
    os.environ |= ours
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


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
    with suppress(Exception), quick_imports():
        import_module(module)
