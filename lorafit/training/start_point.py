"""Where a run begins: at its first step, or after the newest checkpoint that is whole. No torch here."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafit.data.digest import DATE
from lorafit.errors import Problem, RunDirError
from lorafit.recipe import LoadedRecipe
from lorafit.recipe.load import load
from lorafit.storage.files import read_regular
from lorafit.storage.run_dir import RunDir
from lorafit.storage.stage import remove_abandoned
from lorafit.training.checkpoints import Checkpoint, newest_verified, quarantine
from lorafit.training.must_match import ROUNDING, SEQUENCES, changes, kept_keys, refuse

logger = logging.getLogger(__name__)

Begin = Literal["new", "resume", "restart"]
"""`new`: in an unused directory. `resume`: after the newest checkpoint. `restart`: the same, or from the first step
where there are checkpoints and all of them are damaged."""

FINISHED = ("finished", "stopped early")


@dataclass(frozen=True)
class StartPoint:
    """Where a run begins."""

    checkpoint: Checkpoint | None
    """None: at its first step."""
    damaged: tuple[tuple[Path, str], ...] = ()
    """Checkpoints that were passed over, and why."""
    is_again: bool = False
    """Whether the directory holds what an earlier session left."""

    @property
    def as_of(self) -> str | None:
        """The date of the rows of the run that goes on, where a template writes it."""
        return self.checkpoint.facts.get(DATE) if self.checkpoint else None


def start_point(run: RunDir, begin: Begin) -> StartPoint:
    """Where the run in this directory begins; nothing is changed there yet. Raises RunDirError."""
    if begin == "new":
        run.refuse_used()
        return StartPoint(None)
    if not run.is_begun():
        run.refuse_used()
    search = newest_verified(run.checkpoints)
    if search.newest is None and search.damaged and begin == "resume":
        problems = [Problem(str(path), reason) for path, reason in search.damaged]
        message = "none of its checkpoints is as it was committed; `--resume --restart` starts over from the first step"
        raise RunDirError([*problems, Problem(str(run.path), message)])
    return StartPoint(search.newest, search.damaged, is_again=run.is_begun())


def finished_manifest(loaded: LoadedRecipe, run: RunDir) -> dict[str, Any] | None:
    """The manifest of a run that has come to its end; None of any other.

    Raises RecipeError when the recipe no longer is that of the run: nothing more would be trained.
    """
    try:
        manifest: dict[str, Any] = json.loads(read_regular(run.manifest))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.get("outcome") not in FINISHED or not run.adapter.is_dir():
        return None
    then, now = (kept_keys(recipe.model_dump(mode="json")) for recipe in (load(run.recipe).recipe, loaded.recipe))
    refuse([loaded.problem(key, f"{change}: the run is finished") for key, change in changes(then, now)], [])
    return manifest


def restore_run_dir(run: RunDir, start: StartPoint, *, now: Mapping[str, Any]) -> None:
    """Make the run directory what it was where it starts; by one process alone. `now` are the facts."""
    if start.is_again:
        remove_abandoned(run.path)
        remove_abandoned(run.checkpoints)
        if torn := run.set_torn_events_aside():
            lines = f"{torn} line{'s' * (torn > 1)} of {run.events.name} not whole"
            aside = (run.quarantine / run.events.name).relative_to(run.path)
            logger.warning(f"{lines}; set aside as {aside}")
    step = start.checkpoint.step if start.checkpoint else 0
    for path, reason in start.damaged:
        target = quarantine(path, run.quarantine)
        message = f"{path.name} was set aside as {target.relative_to(run.path)}: {reason}"
        logger.warning(message)
        run.add_event("quarantined", message, step=step)
    if start.checkpoint:
        message = f"goes on after step {step}, from {start.checkpoint.path.relative_to(run.path)}"
        before, count = start.checkpoint.facts["processes"], now["processes"]
        if before != count:
            message = f"{message}, in {count} process{'es' * (count > 1)} instead of {before}"
            message = f"{message}, with {now[SEQUENCES]} sequences per step as before"
        others = [f"{key} {change}" for key, change in changes(start.checkpoint.facts[ROUNDING], now[ROUNDING])]
        if others:
            logger.warning(f"{', '.join(others)}: the adapter may differ in its last bits from an undisturbed run's")
    elif start.is_again:
        message = "there is no checkpoint to go on from: starts again at the first step"
    else:
        return
    logger.info(f"resume: {message}")
    run.add_event("resumed", message, step=step)
