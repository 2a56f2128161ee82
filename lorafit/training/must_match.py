"""What must be as it was where a run goes on, key by key: a line for each difference, old -> new. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lorafit.data.digest import TOKENS
from lorafit.errors import Problem, RecipeError, RunDirError
from lorafit.recipe import LoadedRecipe
from lorafit.training.checkpoints import Checkpoint

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


def refuse_changes(loaded: LoadedRecipe, checkpoint: Checkpoint | None, *, now: Mapping[str, Any]) -> None:
    """The run is what it was at `checkpoint`: recipe, base, data, processes. `now` holds what is known of it so far.

    Raises RecipeError or RunDirError with a line for every difference, old -> new.
    """
    if checkpoint is None:
        return
    run = loaded.output_dir()
    then = {name: checkpoint.facts.get(name) for name in now} | {SEQUENCES: sequences_per_step(checkpoint.facts)}
    found = list(changes(then, now))
    if then[SEQUENCES] == now[SEQUENCES] and not str(checkpoint.facts.get("distribution")).startswith("ZeRO"):
        found = [(key, change) for key, change in found if key not in SHARES]
    follows = (TOKENS, SEQUENCES)  # what made them other is among the rest
    found = [(key, change) for key, change in found if key not in follows] or found
    of_recipe = [(key.removeprefix("recipe."), change) for key, change in found if key.startswith("recipe.")]
    refuse(
        [loaded.problem(key, change) for key, change in of_recipe],
        [Problem(f"{run}: {key}", change) for key, change in found if not key.startswith("recipe.")],
    )


def refuse(recipe_problems: list[Problem], other_problems: list[Problem]) -> None:
    """Raise what has been found, all of it at once."""
    if not recipe_problems and not other_problems:
        return
    mend = Problem("", "a run goes on only as it was begun: change these back, or choose another output_dir")
    error = RecipeError if recipe_problems else RunDirError
    raise error([*recipe_problems, *other_problems, mend])
