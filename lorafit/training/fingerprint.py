"""What a run is, in what must be the same when it goes on; each checkpoint holds it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer

from lorafit.builders.adapter import CHANGES_BASE_WEIGHTS
from lorafit.recipe import Recipe
from lorafit.recipe.sections import TrainingSection
from lorafit.training.invariants import Before
from lorafit.training.must_match import SEQUENCES, kept_keys
from lorafit.training.processes import distribution


def fingerprint(
    recipe: Recipe, *, base: str, data: Mapping[str, Any], device: str, bf16: bool, divided: TrainingSection
) -> dict[str, Any]:
    """What is known before the model is loaded: `base` and `data` are the hashes of its files, and of the rows' parts.

    `divided` is how the sequences of a step are shared out, where that is not as the recipe says.
    """
    on_device = divided.per_device_train_batch_size * divided.gradient_accumulation_steps
    return {
        "recipe": kept_keys(recipe.model_dump(mode="json")),
        "base model": base,
        **data,
        "processes": PartialState().num_processes,
        SEQUENCES: on_device * PartialState().num_processes,
        "device": device,
        "bf16": bf16,
    }


def model_fingerprint(trainer: Trainer, before: Before, *, init_method: bool | str) -> dict[str, Any]:
    """What is known of the model with its adapter.

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
