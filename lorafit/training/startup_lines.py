"""What a run says of itself before its first step."""

from __future__ import annotations

import logging
from collections.abc import Sized
from typing import cast

from peft import PeftModel
from transformers import Trainer

from lorafit.builders.adapter import adapted_modules
from lorafit.data.prepare import PreparedData
from lorafit.recipe import LoadedRecipe

logger = logging.getLogger(__name__)


def say_data(data: PreparedData) -> None:
    """The audit in one line, and what it warns of."""
    logger.info(f"data: {data.audit.summary()}")
    for warning in data.audit.warnings:
        logger.warning(warning)


def say_adapter(model: PeftModel) -> None:
    """How much is trained, and where."""
    table = adapted_modules(model)
    trained, total = model.get_nb_trainable_parameters()
    logger.info(f"adapter: {len(table)} modules, {trained:,} trained parameters, {trained / total:.2%} of {total:,}")
    groups: dict[tuple[str, int, float, float], list[int]] = {}
    for module in table:
        key = (module.name.rpartition(".")[2], module.r, module.alpha, module.scale)
        groups.setdefault(key, []).append(module.parameters)
    for (name, rank, alpha, scale), sizes in groups.items():
        logger.info(
            f"  {name:<16} x{len(sizes):<4} r={rank} alpha={alpha:g} scale={scale:.3g} {sum(sizes):>12,} parameters"
        )


def say_steps(loaded: LoadedRecipe, trainer: Trainer, steps: int) -> None:
    """The steps, with the arithmetic of one."""
    training = loaded.recipe.training
    per_device, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    processes = trainer.accelerator.num_processes
    sequences = per_device * accumulated * processes
    unit = "packed rows" if training.is_packed else "sequences"
    shares = f"{per_device} per device x {accumulated} accumulated x {processes} process{'es' * (processes > 1)}"
    logger.info(f"{sequences} {unit} per step = {shares}")
    logger.info(f"{steps} steps over {len(cast(Sized, trainer.train_dataset)):,} {unit}")
