"""What a run is: for its manifest, and for the checkpoints that it may later go on from."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer

from lorafit import __version__
from lorafit.builders.adapter import CHANGES_BASE_WEIGHTS, AdaptedModule
from lorafit.preflight import Machine
from lorafit.recipe import Recipe
from lorafit.recipe.sections import TrainingSection
from lorafit.storage.run_dir import RunDir
from lorafit.training.checks import Before
from lorafit.training.inputs import RunInputs
from lorafit.training.processes import distribution
from lorafit.training.resume import ROUNDING, SEQUENCES, Departure, kept_keys
from lorafit.training.trainer.committed import CheckpointPolicy

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "safetensors")


def run_facts(
    recipe: Recipe,
    inputs: RunInputs,
    run: RunDir,
    *,
    machine: Machine,
    bf16: bool,
    table: tuple[AdaptedModule, ...],
    steps: int,
    begun: Departure,
) -> dict[str, Any]:
    """What the manifest says of a run before its end."""
    base_files, data = inputs.base_files, inputs.data
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "lorafit": __version__,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
        "started": begun.checkpoint.facts["started"] if begun.checkpoint else now,
        "machine": machine.name,
        "world_size": PartialState().num_processes,
        "seed": recipe.training.seed,
        "bf16": bf16,
        "planned_steps": steps,
        "base": {
            "name": base_files.name if base_files.revision else None,  # a directory is in recipe.yaml, relative
            "commit": base_files.revision,
            "fingerprint": base_files.fingerprint(),
            "tensors": len(base_files.tensors),
            "rows": base_files.vocab_size if base_files.added is None else base_files.added.rows,
        },
        "added_tokens": {} if base_files.added is None else dict(base_files.added.ids),
        "data": {"fingerprint": data.fingerprint, **data.audit.as_dict(), "files": _relative(data.files, run)},
        "modules": [asdict(module) for module in table],
    }


def _relative(files: tuple[str, ...], run: RunDir) -> list[str]:
    """The data files as seen from the run directory, like every path in it."""
    return [os.path.relpath(file, run.path) if Path(file).is_absolute() else file for file in files]


def kept_facts(
    recipe: Recipe, inputs: RunInputs, *, machine: Machine, bf16: bool, divided: TrainingSection
) -> dict[str, Any]:
    """What must be the same when a run goes on, as far as it is known before the model is loaded.

    `divided` is how the sequences of a step are shared out, where that is not as the recipe says.
    """
    on_device = divided.per_device_train_batch_size * divided.gradient_accumulation_steps
    return {
        "recipe": kept_keys(recipe.model_dump(mode="json")),
        "base model": inputs.base_files.fingerprint(),
        **inputs.data.parts,
        "processes": PartialState().num_processes,
        SEQUENCES: on_device * PartialState().num_processes,
        "device": machine.device,
        "bf16": bf16,
    }


def model_facts(trainer: Trainer, before: Before, *, init_method: bool | str) -> dict[str, Any]:
    """The same of the model with its adapter.

    PiSSA, OLoRA and CorDA compute the frozen weights anew, and the adapter that the result is measured against.
    """
    start: dict[str, Any] = {"frozen": before.frozen}
    if init_method in CHANGES_BASE_WEIGHTS:
        start["adapter"] = {
            name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in before.moving.items()
        }
    weights = [hashlib.sha256(json.dumps(start).encode()).hexdigest()]
    if PartialState().num_processes > 1:  # with FSDP2 only the first has them
        broadcast_object_list(weights)
    return {"distribution": distribution(trainer.accelerator), "weights before the first step": weights[0]}


def checkpoint_room(
    recipe: Recipe,
    run: RunDir,
    begun: Departure,
    *,
    started: float,
    kept: dict[str, Any],
    facts: dict[str, Any],
    bytes_of_one: int,
    ways: Sequence[str],
) -> CheckpointPolicy:
    """Where the checkpoints of a run go; `started` is when this session began, by the monotonic clock, and `ways` how
    what is computed is computed."""
    earlier = begun.checkpoint.seconds if begun.checkpoint else 0.0
    rounding = {"machine": facts["machine"], "threads": torch.get_num_threads(), "ways": list(ways)}
    noted = kept | {"started": facts["started"], ROUNDING: rounding | facts["versions"]}
    return CheckpointPolicy(
        run.checkpoints,
        keep=recipe.checkpoints.keep,
        started=started - earlier,
        facts=noted,
        bytes_of_one=bytes_of_one,
    )
