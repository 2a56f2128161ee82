"""Whether and where a run goes on: what it left behind, and what must be as it was. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorafit.data.digest import DATE, TOKENS
from lorafit.errors import Problem, RecipeError, RunDirError
from lorafit.recipe import LoadedRecipe
from lorafit.recipe.load import load
from lorafit.storage.files import read_regular
from lorafit.storage.run_dir import RunDir
from lorafit.storage.stage import remove_abandoned
from lorafit.training.checkpoints import Checkpoint, newest_verified, quarantine

Begin = Literal["new", "resume", "restart"]
"""`new`: in an unused directory. `resume`: after the newest checkpoint. `restart`: the same, or from the first step
where there are checkpoints and all of them are damaged."""

MAY_CHANGE = frozenset(
    {
        # Names of things whose content is compared instead
        *("output_dir", "model.model_name_or_path", "model.revision", "data.template"),
        *(f"data.{side}.{key}" for side in ("train", "eval") for key in ("path", "hub", "name", "split", "revision")),
        # The number of processes and how the model is spread over them are compared as they come out
        "launch",
        # What is told, kept and watched
        *("training.logging_steps", "training.report_to", "training.run_name", "silence"),
        *("checkpoints.every", "checkpoints.keep", "health"),
        # What has no part in the weights
        *("training.per_device_eval_batch_size", "training.dataloader_num_workers", "merge", "eval", "rank_sweep"),
    }
)
"""Keys and sections of a recipe that a run may go on with changed. Every other key, also one that is new, must stay."""

ROUNDING = "how it is computed"
"""Facts of a checkpoint that a run may go on without, in other last bits: versions, machine, threads, fast paths."""

SEQUENCES = "sequences per step"
SHARES = (
    "processes",
    *(f"recipe.training.{key}" for key in ("per_device_train_batch_size", "gradient_accumulation_steps")),
)
"""How those of a step are divided: a run may go on with another division of as many, but under ZeRO, whose checkpoints
hold a part for each process."""

FINISHED = ("finished", "stopped early")


@dataclass(frozen=True)
class Departure:
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


def departure(run: RunDir, begin: Begin) -> Departure:
    """Where the run in this directory begins; nothing is changed there yet. Raises RunDirError."""
    if begin == "new":
        run.refuse_used()
        return Departure(None)
    if not run.is_begun():
        run.refuse_used()
    search = newest_verified(run.checkpoints)
    if search.newest is None and search.damaged and begin == "resume":
        problems = [Problem(str(path), reason) for path, reason in search.damaged]
        message = "none of its checkpoints is as it was committed; `--resume --restart` starts over from the first step"
        raise RunDirError([*problems, Problem(str(run.path), message)])
    return Departure(search.newest, search.damaged, is_again=run.is_begun())


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


def settle(run: RunDir, begun: Departure, *, now: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Make the run directory what it was at the point of departure; by one process alone. `now` are the facts."""
    if begun.is_again:
        remove_abandoned(run.path)
        remove_abandoned(run.checkpoints)
        if torn := run.set_torn_events_aside():
            lines = f"{torn} line{'s' * (torn > 1)} of {run.events.name} not whole"
            aside = (run.quarantine / run.events.name).relative_to(run.path)
            say(f"warning: {lines}; set aside as {aside}")
    step = begun.checkpoint.step if begun.checkpoint else 0
    for path, reason in begun.damaged:
        target = quarantine(path, run.quarantine)
        message = f"{path.name} was set aside as {target.relative_to(run.path)}: {reason}"
        say(f"warning: {message}")
        run.add_event("quarantined", message, step=step)
    if begun.checkpoint:
        message = f"goes on after step {step}, from {begun.checkpoint.path.relative_to(run.path)}"
        before, count = begun.checkpoint.facts["processes"], now["processes"]
        if before != count:
            message = f"{message}, in {count} process{'es' * (count > 1)} instead of {before}"
            message = f"{message}, with {now[SEQUENCES]} sequences per step as before"
        others = [f"{key} {change}" for key, change in changes(begun.checkpoint.facts[ROUNDING], now[ROUNDING])]
        if others:
            say(f"warning: {', '.join(others)}: the adapter may differ in its last bits from an undisturbed run's")
    elif begun.is_again:
        message = "there is no checkpoint to go on from: starts again at the first step"
    else:
        return
    say(f"resume: {message}")
    run.add_event("resumed", message, step=step)


def kept_keys(value: Any, key: str = "") -> Any:
    """A recipe as JSON holds it, without what may change."""
    if isinstance(value, list):  # of sources: their places are no part of a key
        return [kept_keys(entry, key) for entry in value]
    if not isinstance(value, dict):
        return value
    below = {name: f"{key}.{name}".lstrip(".") for name in value}
    return {name: kept_keys(value[name], below[name]) for name in value if below[name] not in MAY_CHANGE}


def changes(then: Any, now: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Each key that differs, with `old -> new`."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*then, *now)):
            yield from changes(then.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    elif _are_sources(then) and _are_sources(now) and len(then) == len(now):
        for index, (one, other) in enumerate(zip(then, now, strict=True)):
            yield from changes(one, other, f"{key}.{index}")
    elif then != now:
        yield key, f"{json.dumps(then)} -> {json.dumps(now)}"


def _are_sources(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value)


def sequences_per_step(facts: Mapping[str, Any]) -> int:
    """Those of a checkpoint; older ones say only how they were divided."""
    training = facts["recipe"]["training"]
    shares = training["per_device_train_batch_size"], training["gradient_accumulation_steps"], facts["processes"]
    return int(facts.get(SEQUENCES, math.prod(shares)))


def divided_anew(loaded: LoadedRecipe, checkpoint: Checkpoint | None, *, processes: int) -> LoadedRecipe:
    """The recipe with the sequences of a step divided among other processes than those the run was begun with.

    As many on a device as before, or the next smaller number that goes. Raises RunDirError where none does.
    """
    if checkpoint is None:
        return loaded
    training, whole = loaded.recipe.training, sequences_per_step(checkpoint.facts)
    then = checkpoint.facts["recipe"]["training"]
    shares = {key: getattr(training, key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    if math.prod(shares.values()) * processes == whole or any(then[key] != value for key, value in shares.items()):
        return loaded
    if whole % processes:
        possible = ", ".join(str(count) for count in range(1, min(whole, 64) + 1) if whole % count == 0)
        message = f"{checkpoint.facts['processes']} -> {processes}: they cannot share the {whole} sequences of a step"
        raise RunDirError(f"{message}; go on in {possible}", where=f"{checkpoint.path.parent.parent}: processes")
    device = next(
        size
        for size in range(min(shares["per_device_train_batch_size"], whole), 0, -1)
        if whole % (size * processes) == 0
    )
    divided = {"per_device_train_batch_size": device, "gradient_accumulation_steps": whole // (device * processes)}
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"training": training.model_copy(update=divided)}))


def refuse_changes(loaded: LoadedRecipe, run: RunDir, checkpoint: Checkpoint, *, now: Mapping[str, Any]) -> None:
    """The run is what it was at `checkpoint`: recipe, base, data, processes. `now` holds the facts known so far.

    Raises RecipeError or RunDirError with a line for every difference, old -> new.
    """
    then = {name: checkpoint.facts.get(name) for name in now} | {SEQUENCES: sequences_per_step(checkpoint.facts)}
    found = list(changes(then, now))
    if then[SEQUENCES] == now[SEQUENCES] and not str(checkpoint.facts.get("distribution")).startswith("ZeRO"):
        found = [(key, change) for key, change in found if key not in SHARES]
    follows = (TOKENS, SEQUENCES)  # what made them other is among the rest
    found = [(key, change) for key, change in found if key not in follows] or found
    of_recipe = [(key.removeprefix("recipe."), change) for key, change in found if key.startswith("recipe.")]
    refuse(
        [loaded.problem(key, change) for key, change in of_recipe],
        [Problem(f"{run.path}: {key}", change) for key, change in found if not key.startswith("recipe.")],
    )


def refuse(recipe_problems: list[Problem], other_problems: list[Problem]) -> None:
    """Raise what has been found, all of it at once."""
    if not recipe_problems and not other_problems:
        return
    mend = Problem("", "a run goes on only as it was begun: change these back, or choose another output_dir")
    error = RecipeError if recipe_problems else RunDirError
    raise error([*recipe_problems, *other_problems, mend])
