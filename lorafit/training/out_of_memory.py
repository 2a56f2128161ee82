"""An out-of-memory error, told in one line with what would fit."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from lorafit import operating_system
from lorafit.builders.base_model import OUT_OF_MEMORY, OUT_OF_MEMORY_WORDS
from lorafit.errors import MachineError, ModelError
from lorafit.preflight import this_machine
from lorafit.recipe import LoadedRecipe, Recipe

Doing = Literal["loading the base model", "training", "evaluating"]

_ASKED = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMGT]i?B)", re.I)
_UNITS = {"bytes": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out; a library may have wrapped the error that says so."""
    if error is None or isinstance(error, MachineError):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return (isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY_WORDS.search(str(error)))) or is_out_of_memory(
        error.__cause__
    )


def bytes_asked(error: BaseException | None) -> int | None:
    """The allocation that failed, where the message tells its size."""
    while error is not None:
        if found := _ASKED.search(str(error)):
            unit = found[2] if found[2] == "bytes" else found[2][0].upper()
            return int(float(found[1]) * _UNITS[unit])
        error = error.__cause__
    return None


def peak_memory_bytes() -> int:
    """Peak of the GPU allocator, or of this process's memory on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return operating_system.peak_bytes()


def forget_peak() -> None:
    """Measure from here: loading, the self-test and an initialisation by SVD are no part of training."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def out_of_memory_is_said(
    loaded: LoadedRecipe, *, doing: Callable[[], Doing], checkpointing: bool = False
) -> Iterator[None]:
    """Raises MachineError, with what would fit beyond `checkpointing`, where the block runs out of memory; while the
    base model is loaded that is not looked at."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError, ModelError) as error:
        if not is_out_of_memory(error):
            raise
        was_doing = doing()
        key, mends = _what_would_fit(loaded.recipe, was_doing, checkpointing=checkpointing)
        first, *others = mends
        wanted = "".join([f"; make room with {first}", *(f"; or {other}" for other in others)])
        message = f"out of memory while {was_doing}: {memory_figures(error)}{wanted}"
        raise MachineError(loaded.problem(key, message)) from error


def memory_figures(error: BaseException | None) -> str:
    """What was asked for, and the most that was in use."""
    asked, machine = bytes_asked(error), this_machine()
    wanted = "more" if asked is None else _readable(asked)
    peak, whole = _readable(peak_memory_bytes()), _readable(machine.memory_bytes)
    return f"{wanted} was asked for, the peak so far was {peak} of {whole}"


def _readable(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _what_would_fit(recipe: Recipe, doing: Doing, *, checkpointing: bool) -> tuple[str, list[str]]:
    """The key that decides the memory, and recipe lines that lower it, what costs the least first."""
    training = recipe.training
    if doing == "loading the base model":
        halves = ["model.dtype: bfloat16 (half the size)"] if recipe.model.dtype == "float32" else []
        return "model.model_name_or_path", [*halves, OUT_OF_MEMORY]
    if doing == "evaluating":
        size = training.per_device_eval_batch_size
        key, mends = "training.per_device_eval_batch_size", []
        if size > 1:
            mends.append(f"training.per_device_eval_batch_size: {size // 2} (the same held-out loss)")
    else:
        size, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
        key, mends = "training.per_device_train_batch_size", []
        if not checkpointing:
            mends.append("training.gradient_checkpointing: true (about 1.45 times the computation)")
        if size > 1:
            half = size // 2
            same = f"{half} with training.gradient_accumulation_steps: {-(-size * steps // half)}"
            mends.append(f"training.per_device_train_batch_size: {same} (the same batch for the optimizer)")
        if (size > 1 or training.is_packed) and recipe.health.on_oom == "stop":
            mends.append("health.on_oom: halve_batch, which does that by itself")
    mends.append(f"training.max_length: {max(training.max_length // 2, 2)}")
    if recipe.quantization is None:
        mends.append("quantization.load_in_4bit: true")
    mends.append("a smaller base model")
    return key, mends
