"""Space on disk: what a run will need, reckoned before its model is loaded, and what is said when it runs out."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors import SafetensorError

from lorafit.builders.adapter import CHANGES_BASE_WEIGHTS
from lorafit.builders.experts import used_patterns_are_known
from lorafit.builders.lora_config import lora_config
from lorafit.builders.model_files import BaseModelFiles
from lorafit.errors import DiskError
from lorafit.launching import launch
from lorafit.planning.empty_base import empty_base
from lorafit.planning.known_shapes import architecture
from lorafit.recipe import LoadedRecipe
from lorafit.storage.no_room import NO_ROOM
from lorafit.storage.run_dir import RunDir
from lorafit.tasks import TASKS
from lorafit.training.checkpoints import KEPT_AT_LEAST

_STATES = {"adamw": 2, "ademamix": 3, "adagrad": 1, "rmsprop": 1, "lion": 1, "sgd": 0}
"""Values that an optimizer keeps for each trained one."""

BESIDES = 2**20
"""Settings, logs, random states and the tables inside the files."""


@dataclass(frozen=True)
class Space:
    """Bytes that a run's files take."""

    adapter: int
    checkpoint: int
    checkpoints: int
    """Kept at once, with the best and the one that is being written."""

    @property
    def whole(self) -> int:
        """When the adapter is written beside the checkpoints."""
        return self.adapter + self.checkpoints * self.checkpoint


def space_needed(loaded: LoadedRecipe, base_files: BaseModelFiles, *, bf16: bool) -> Space:
    """What a run of this recipe writes, from the model's settings alone. Raises ModelError and AdapterError."""
    recipe = loaded.recipe
    of_base = architecture(recipe.model)
    if base_files.trained_token_ids:
        of_base.get_text_config().vocab_size = base_files.vocab_size
    task = TASKS[recipe.task]
    base = empty_base(recipe.model, recipe.quantization, config=of_base, task=task)
    # Where an adapter starts changes none of its sizes, and is computed from weights that are not here.
    plain = {"init_lora_weights": True, "eva_config": None, "corda_config": None}
    config = lora_config(
        recipe.lora.model_copy(update=plain),
        adalora=recipe.adalora,
        model=base,
        where=loaded.problem,
        by_fsdp=launch.shards_by_fsdp(recipe.launch),
        token_ids=base_files.trained_token_ids,
        task=task,
    )
    with torch.device("meta"), used_patterns_are_known():
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # TRL turns the adapter of a quantised model into bfloat16, and without bfloat16 autocast it is turned back.
    value_bytes = 2 if recipe.quantization is not None and bf16 else 4
    weights = value_bytes * sum(parameter.numel() for parameter in trained)
    copied = {path for pattern in ("*token*", "vocab*", "merges*") for path in base_files.directory.glob(pattern)}
    files = BESIDES + sum(path.stat().st_size for path in copied)
    # What is saved in place of one that moved part of the base into itself has twice the rank.
    adapter = files + weights * (2 if recipe.lora.init_lora_weights in CHANGES_BASE_WEIGHTS else 1)
    checkpoint = files + weights + _optimizer_bytes(recipe.training.optim, trained, value_bytes=value_bytes)
    if recipe.adalora is not None:
        checkpoint += weights  # how much each value has mattered so far
    keeps_best = recipe.training.load_best_model_at_end or recipe.early_stopping is not None
    return Space(adapter, checkpoint, max(recipe.checkpoints.keep, KEPT_AT_LEAST) + keeps_best + 1)


def _optimizer_bytes(optimizer: str, trained: list[torch.nn.Parameter], *, value_bytes: int) -> int:
    if optimizer == "adafactor":  # one value a row and one a column
        return 4 * sum(sum(parameter.shape) for parameter in trained)
    states = next(count for name, count in _STATES.items() if name in optimizer)
    values = sum(parameter.numel() for parameter in trained)
    # bitsandbytes leaves tensors of less than 4,096 values as they are, and adds a scale to each block of 256.
    large = sum(parameter.numel() for parameter in trained if parameter.numel() >= 4096) if "8bit" in optimizer else 0
    return states * (value_bytes * (values - large) + large + large // 64)


def refuse_too_little_space(space: Space, run: RunDir) -> None:
    """The run fits beside what lies on its disk; checkpoints of an earlier session are part of it. Raises DiskError."""
    there = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    needed, free = max(space.whole - there, space.adapter), _free(run.path)
    if free < needed:
        parts = f"{space.adapter:,} for the adapter + {space.checkpoints} checkpoints of {space.checkpoint:,}"
        has = f", {there:,} of them there already" if there else ""
        message = f"the run needs {needed:,} bytes ({parts}{has}), {free:,} are free on its disk"
        raise DiskError(f"{message}; make room, or choose another output_dir", where=str(run.path))


@contextmanager
def full_disk_is_said(directory: Path, *, writing: str, needed: int) -> Iterator[None]:
    """An error of writing into `directory` that comes of a disk without room, or one that cannot be written to,
    becomes a DiskError; torch and safetensors hide what the system said."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _reason(error, directory)
        if reason is None:
            raise
        free = _free(directory)
        message = f"{os.strerror(reason)}: {writing} needs {needed:,} bytes, {free:,} are free"
        raise DiskError(f"{message}; make room and go on with --resume", where=str(directory)) from error


def _reason(error: Exception, directory: Path) -> int | None:
    """The number of the system's error, if it is one of a full or closed disk."""
    if isinstance(error, OSError):
        return error.errno if error.errno in NO_ROOM else None
    if isinstance(error, SafetensorError):
        told = re.search(r"os error (\d+)", str(error))
        return int(told[1]) if told and int(told[1]) in NO_ROOM else None
    if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
        return None
    # torch's writer says only that it is not where it should be: see whether a megabyte can be written.
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as own:
        return own.errno if own.errno in NO_ROOM else None
    return None


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
