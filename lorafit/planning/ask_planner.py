"""`lorafit plan`: asks a process of its own what a recipe takes in memory, time and disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.errors import MachineError, RecipeError
from lorafit.launching.child import Child, ChildFailed
from lorafit.planning.gpus import Gpu
from lorafit.planning.plan_result import Plan
from lorafit.planning.recipe_changes import changed, written_as
from lorafit.recipe import LoadedRecipe, load
from lorafit.recipe.recipe_yaml import recipe_yaml, write_asked_for


@dataclass(frozen=True)
class Question:
    """What is to be planned."""

    loaded: LoadedRecipe
    gpu: Gpu
    count: int
    """GPUs."""
    model_shape: str | None = None
    """A shipped shape, instead of the recipe's model."""
    with_advice: bool = True
    """What to change, where the recipe does not fit with room to spare."""
    with_largest: bool = False
    """The largest batch, length and rank that fit."""
    with_fix: bool = False
    """The changes that make it fit."""


def begin(question: Question) -> Child:
    """A fresh process that answers it meanwhile with a Plan: planning replaces functions of the libraries."""
    return Child("lorafit.planning.make_plan:answer", question, environment={"CUDA_VISIBLE_DEVICES": ""})


def ask(question: Question) -> Plan:
    """The plan. Raises the LorafitError that keeps it from being made, and ChildFailed for a bug in the planning."""
    plan: Plan = _answer(begin(question))
    return plan


def _answer(child: Child) -> Any:
    try:
        return child.answer()
    except ChildFailed as error:
        if not error.was_killed:
            raise
        raise MachineError(error.reason, where="the process that plans") from error


def measure(question: Question, plan: Plan) -> Plan:
    """The plan with what one step takes for real, on this machine, in a fresh process; raises as `ask`."""
    keys = {"training.gradient_checkpointing": plan.gradient_checkpointing}
    recipe = changed(question.loaded.recipe, keys) or question.loaded.recipe
    asked = replace(question, loaded=replace(question.loaded, recipe=recipe))
    found = _answer(Child("lorafit.planning.make_plan:measured", asked))
    return replace(plan, measured_bytes=found.allocated, measured_seconds=found.seconds)


def refuse_to_overwrite(out: Path) -> None:
    """Before anything is planned. Raises RecipeError."""
    if out.exists():
        raise RecipeError("is there already and is never overwritten; choose another --output", where=str(out))


def write_fixed(question: Question, plan: Plan, out: Path) -> str:
    """Write the recipe with the changes that make it fit to a new file; what was done, in a line.

    Raises MachineError where there are not enough.
    """
    if plan.fixed is None or not plan.fixed.fits:
        smallest = f"the least it takes is {plan.fixed.line}" if plan.fixed else "nothing can be changed"
        mend = "take a GPU with more memory, several with --count, or rows that are shorter (training.max_length)"
        raise MachineError(f"cannot be made to fit: {smallest}; {mend}", where=str(question.loaded.path))
    recipe = changed(question.loaded.recipe, plan.fixed.change)
    assert recipe is not None  # it was planned
    made = f"changed to fit: {written_as(plan.fixed.change)}" if plan.fixed.change else "it fits as it was"
    head = f"# {question.loaded.path.name}, {made}\n# Plan: {plan.fixed.line}\n"
    write_asked_for(out, head + recipe_yaml(recipe, out.absolute().parent), option="--output", overwrite=False)
    load(out)  # what was written is a recipe
    return f"{out}: {made}"
