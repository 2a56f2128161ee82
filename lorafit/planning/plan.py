"""`lorafit plan`: asks a process of its own what a recipe takes in memory, time and disk."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorafit.errors import LorafitError, MachineError, Problem, RecipeError
from lorafit.planning.answer import Plan
from lorafit.planning.gpus import Gpu
from lorafit.planning.variants import changed, written_as
from lorafit.recipe import LoadedRecipe, load
from lorafit.recipe.write import recipe_yaml, write_asked_for


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


@dataclass(frozen=True)
class Refused:
    """An error of the user's on its way from one process to another: an exception would lose its problems."""

    kind: type[LorafitError]
    problems: tuple[Problem, ...]


class PlanningFailed(Exception):
    """The process that plans ended without an answer: a bug, with its traceback."""


class Asked:
    """A question that a fresh process is answering meanwhile."""

    def __init__(self, question: Question, *, kind: Literal["plan", "measure"] = "plan") -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="lorafit-plan-")
        asked, self._answered = (Path(self._directory.name, name) for name in ("question", "answer"))
        asked.write_bytes(pickle.dumps(question))
        command = [sys.executable, "-m", "lorafit.planning.job", kind, str(asked), str(self._answered)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        # Its own session: Ctrl-C reaches this process alone, which then ends that one.
        self._process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]

    def answer(self) -> Any:
        """Waits for it. Raises the LorafitError that the process ends with, and PlanningFailed for a bug in it."""
        with self._directory:
            try:
                _, said = self._process.communicate()
            finally:
                self._process.kill()
            if self._process.returncode or not self._answered.is_file():
                raise PlanningFailed(said.strip() or f"it ended with {self._process.returncode}")
            answer = pickle.loads(self._answered.read_bytes())
        if isinstance(answer, Refused):
            raise answer.kind(answer.problems)
        return answer


def ask(question: Question) -> Plan:
    """The plan, by a fresh process; raises as `Asked.answer`."""
    plan: Plan = Asked(question).answer()
    return plan


def measure(question: Question, plan: Plan) -> Plan:
    """The plan with what one step takes for real, on this machine, in a fresh process; raises as `ask`."""
    keys = {"training.gradient_checkpointing": plan.gradient_checkpointing}
    recipe = changed(question.loaded.recipe, keys) or question.loaded.recipe
    asked = replace(question, loaded=replace(question.loaded, recipe=recipe))
    found = Asked(asked, kind="measure").answer()
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
