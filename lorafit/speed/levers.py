"""Which levers a run uses, settled on its own model before the first step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from peft import PeftModel

from lorafit.builders.adapter import base_of
from lorafit.recipe import Recipe
from lorafit.recipe.sections import SpeedSection
from lorafit.speed.lever import ROUTED, Lever, has_router_loss

LEVERS: tuple[Lever, ...] = tuple(import_module(f"{__package__}.{key}").LEVER for key in SpeedSection.model_fields)
"""One for each key of `speed`, from the file of its name: so that a new one is a key and a file, and nothing else."""


@dataclass(frozen=True)
class Engaged:
    """The levers that are on."""

    levers: tuple[Lever, ...]
    lines: tuple[str, ...]
    """For people: each that is on, or why it is not."""

    def put_on(self, trainer: Any) -> None:
        """Those that go on a trainer: TRL's puts its own head on every model it is given, and calls the model."""
        for lever in self.levers:
            if lever.goes_on == "trainer":
                lever.engage(trainer)

    def uncompiled(self) -> Engaged:
        """Those of a trainer of the same model that compiles nothing."""
        return replace(self, levers=tuple(lever for lever in self.levers if not lever.is_for_compiled))

    def of_attention(self, name: str) -> Lever | None:
        """The one whose attention this is; None for the libraries' own."""
        return next((lever for lever in self.levers if lever.attention == name), None)


def engage_all(
    model: PeftModel, recipe: Recipe, *, levers: tuple[Lever, ...], is_whole: bool, dtype: torch.dtype
) -> Engaged:
    """Pull the levers that the recipe allows and this model takes; those of the trainer are put on when it is there.

    `dtype` is what products are computed in; `is_whole` is false where FSDP or ZeRO spread the weights over processes,
    whose own hooks the levers would pass by.
    """
    base, engaged, lines = base_of(model), [], []
    asked = [lever for lever in levers if _is_asked_for(lever, recipe)]
    passed_by = [lever for lever in asked if not lever.is_for_compiled]
    if is_whole and not recipe.training.torch_compile:
        passed_by = []
    for lever in asked:
        if lever in passed_by:
            continue
        is_lost = not lever.keeps_router_loss and has_router_loss(base, recipe)
        reason = ROUTED if is_lost else lever.why_not(base, recipe, dtype)
        if reason is not None:
            lines.append(f"{lever.name} off: {reason}")
            continue
        lines.append(f"{lever.name} on{lever.engage(base) if lever.goes_on == 'model' else ''}")
        engaged.append(lever)
    if passed_by:
        compiled = recipe.training.torch_compile
        why = "torch_compile fuses by itself" if compiled else "the weights are spread over processes"
        lines.append(f"plain path for {', '.join(lever.name for lever in passed_by)}: {why}")
    return Engaged(tuple(engaged), tuple(lines))


def engage_planned(
    model: PeftModel, recipe: Recipe, *, levers: tuple[Lever, ...], on_cuda: bool, in_16_bits: bool
) -> None:
    """Those that change what a step takes, on a model that is nowhere yet."""
    if recipe.training.torch_compile or recipe.launch.strategy != "ddp":
        return
    base = base_of(model)
    for lever in levers:
        if _is_asked_for(lever, recipe) and lever.is_planned and lever.is_planned(base, on_cuda, in_16_bits):
            lever.engage(base)


def _is_asked_for(lever: Lever, recipe: Recipe) -> bool:
    is_on: bool = recipe.speed.model_dump()[lever.key]
    training = recipe.training
    return (
        is_on
        and (training.is_packed or not lever.is_for_packed)
        and (training.torch_compile or not lever.is_for_compiled)
    )
