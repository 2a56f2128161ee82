"""Derived numbers of a run, each with the arithmetic it is printed with."""

import math
from dataclasses import dataclass

from lorafit.recipe.recipe import Recipe


@dataclass(frozen=True)
class Number:
    """A derived number and how it came about."""

    value: int
    arithmetic: str

    def __str__(self) -> str:
        return f"{self.value:,} {self.arithmetic}"


def sequences_per_step(recipe: Recipe, processes: int) -> Number:
    """Sequences (packed rows with `packing`) behind one optimizer step."""
    per_device = recipe.training.per_device_train_batch_size
    accumulated = recipe.training.gradient_accumulation_steps
    shares = f"{per_device} per device x {accumulated} accumulated x {processes} process{'es' * (processes > 1)}"
    unit = "packed rows" if recipe.training.is_packed else "sequences"
    return Number(per_device * accumulated * processes, f"{unit} per step = {shares}")


def steps_per_epoch(recipe: Recipe, rows: int, *, processes: int) -> Number:
    """Optimizer steps of one epoch: every process gets as many batches, and a last step may be short (transformers)."""
    training = recipe.training
    batches = math.ceil(math.ceil(rows / training.per_device_train_batch_size) / processes)
    steps = math.ceil(batches / training.gradient_accumulation_steps)
    per_step = sequences_per_step(recipe, processes).value
    return Number(steps, f"steps per epoch = {rows:,} rows / {per_step}, rounded up")


def total_steps(recipe: Recipe, rows: int, *, processes: int) -> Number:
    """Optimizer steps of the run."""
    training = recipe.training
    if training.max_steps is not None:
        return Number(training.max_steps, "steps = training.max_steps")
    per_epoch = steps_per_epoch(recipe, rows, processes=processes).value
    epochs = training.num_train_epochs
    return Number(
        math.ceil(epochs * per_epoch), f"steps = {per_epoch:,} per epoch x {epochs:g} epoch{'s' * (epochs != 1)}"
    )


def share_of(steps: int, share: float) -> Number:
    """Below 1 a share of all steps, rounded up; from 1 on a number of steps (transformers)."""
    if share >= 1:
        return Number(int(share), "steps")
    return Number(math.ceil(steps * share), f"steps = {share:g} x {steps:,}")


def warm_up(recipe: Recipe, steps: int) -> Number:
    """Steps of warm-up. The default share is left out of a run that, rounded up, it would take whole: the first step of
    a warm-up has the rate 0."""
    training = recipe.training
    number = share_of(steps, training.warmup_steps)
    if number.value >= steps and "warmup_steps" not in training.model_fields_set:
        return Number(0, f"steps: {training.warmup_steps:g} x {steps}, rounded up, would be the whole run")
    return number


def checkpoint_interval(recipe: Recipe, steps: int) -> Number | None:
    """Steps between two checkpoints; None where the recipe gives a time."""
    every = recipe.checkpoints.every
    if isinstance(every, int):
        return Number(every, "steps")
    if not every.endswith("%"):
        return None
    return Number(max(1, round(steps * float(every.rstrip("%")) / 100)), f"steps = {every} of {steps:,}")
