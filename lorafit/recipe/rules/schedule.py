"""Rules of `training.lr_scheduler_type` and its arguments, which transformers takes as they are."""

from collections.abc import Iterator, Mapping
from typing import Any

from lorafit.recipe.arithmetic import share_of
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules.broken import Broken, Rule
from lorafit.recipe.rules.values import Takes, refused_values
from lorafit.recipe.suggest import nearest

_SHARE = Takes(float, 0, 1)
_SHAPES = Takes(str, choices=("linear", "cosine", "1-sqrt"))
_WAVES = {"num_cycles": Takes(float, 0, 1000, is_above=True)}
_MIN_LR = _WAVES | {"min_lr": Takes(float, 0, or_null=True), "min_lr_rate": Takes(float, 0, 1, or_null=True)}
SCHEDULE_ARGUMENTS: Mapping[str, Mapping[str, Takes]] = {
    "linear": {},
    "constant": {},
    "constant_with_warmup": {},
    "cosine": _WAVES,
    "cosine_with_restarts": _WAVES,
    "polynomial": {"lr_end": Takes(float, 0), "power": Takes(float, 0, 100, is_above=True)},
    "inverse_sqrt": {"timescale": Takes(int, 1, or_null=True)},
    "cosine_with_min_lr": _MIN_LR,
    "cosine_warmup_with_min_lr": _MIN_LR | {"warmup_lr_rate": Takes(float, 0, 1, or_null=True)},
    "warmup_stable_decay": {
        **{"num_decay_steps": Takes(float, 0, is_above=True), "num_stable_steps": Takes(float, 0, or_null=True)},
        **{"warmup_type": _SHAPES, "decay_type": _SHAPES, "min_lr_ratio": _SHARE, **_WAVES},
    },
    "reduce_lr_on_plateau": {
        "mode": Takes(str, choices=("min",)),  # what is watched is the held-out loss
        "factor": Takes(float, 0, 1, is_above=True, is_below=True),
        **{name: Takes(int, 0) for name in ("patience", "cooldown")},
        **{name: Takes(float, 0) for name in ("threshold", "min_lr", "eps")},
        "threshold_mode": Takes(str, choices=("rel", "abs")),
    },
}
"""Arguments of each schedule of transformers.optimization, and their values; a test compares the names."""

PHASES = ("num_decay_steps", "num_stable_steps")
"""Arguments that are a number of steps, or below 1 a share of the run, as `training.warmup_steps` is."""

WITHOUT_WARM_UP = ("constant", "reduce_lr_on_plateau")

_ARGUMENTS, _TYPE, _RATE = "training.lr_scheduler_kwargs", "training.lr_scheduler_type", "training.learning_rate"
_LR_END_OF_THE_LIBRARY = 1e-7


def schedule_knows_its_arguments(recipe: Recipe) -> Iterator[Broken]:
    """The library would raise after the model is loaded, or ignore them (`constant`)."""
    schedule = recipe.training.lr_scheduler_type
    known = SCHEDULE_ARGUMENTS[schedule]
    given = recipe.training.lr_scheduler_kwargs or {}
    for key in given:
        if key not in known:
            takes = ", ".join(sorted(known)) or "nothing"
            guess = nearest(key, known)
            message = f"not an argument of {schedule}; " + (f"did you mean {guess}?" if guess else f"it takes {takes}")
            yield Broken(f"{_ARGUMENTS}.{key}", message, (_TYPE,))
    needed: dict[str, tuple[str, ...]] = {
        "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
        "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    }
    needed["warmup_stable_decay"] = ("num_decay_steps",)
    names = needed.get(schedule, ())
    if names and sum(given.get(name) is not None for name in names) != 1:
        example = f"write lr_scheduler_kwargs: {{{names[-1]}: 0.1}}"
        message = f"{schedule} needs {'exactly one of ' if len(names) > 1 else ''}{' and '.join(names)}; {example}"
        yield Broken(_TYPE, message, (_ARGUMENTS,))


def schedule_takes_these_values(recipe: Recipe) -> Iterator[Broken]:
    """Wrong ones are a traceback, at times after the first step, or a rate that nobody asked for."""
    training = recipe.training
    given, known = training.lr_scheduler_kwargs or {}, SCHEDULE_ARGUMENTS[training.lr_scheduler_type]
    refused = refused_values(given, known)
    for key, message in refused.items():
        yield Broken(f"{_ARGUMENTS}.{key}", message, (_TYPE,))
    for key in PHASES:
        value = given.get(key)
        if key in known and key not in refused and value is not None and value > 1 and value != int(value):
            message = f"{value} is not a number of steps; write {int(value)}, or a share below 1"
            yield Broken(f"{_ARGUMENTS}.{key}", message, (_TYPE,))
    for key in ("min_lr", "lr_end"):
        value = given.get(key)
        if key in known and key not in refused and value is not None and value >= training.learning_rate:
            message = f"{value:g} is not below learning_rate {training.learning_rate:g}: the rate would rise, or never"
            yield Broken(f"{_ARGUMENTS}.{key}", f"{message} fall; lower it", (_TYPE, _RATE))
    if "lr_end" in known and "lr_end" not in given and training.learning_rate <= _LR_END_OF_THE_LIBRARY:
        message = f"{training.learning_rate:g} is not above the end of the schedule, {_LR_END_OF_THE_LIBRARY:g}"
        yield Broken(_RATE, f"{message}; raise it, or write lr_scheduler_kwargs: {{lr_end: 0}}", (_TYPE, _ARGUMENTS))


def schedule_uses_its_warm_up(recipe: Recipe) -> Iterator[Broken]:
    """`constant` and `reduce_lr_on_plateau` ignore a warm-up."""
    training = recipe.training
    is_written = "warmup_steps" in training.model_fields_set and training.warmup_steps > 0
    if is_written and training.lr_scheduler_type in WITHOUT_WARM_UP:
        mend = "constant_with_warmup" if training.lr_scheduler_type == "constant" else "cosine"
        message = (
            f"is ignored with lr_scheduler_type: {training.lr_scheduler_type}; leave it out, or write {mend} there"
        )
        yield Broken("training.warmup_steps", message, (_TYPE,))


def phases_too_long_for(recipe: Recipe, steps: int) -> Iterator[Broken]:
    """Phases of a schedule that do not add up to a run of so many steps: what is left over has the lowest rate."""
    training = recipe.training
    if training.lr_scheduler_type != "warmup_stable_decay" or any(schedule_takes_these_values(recipe)):
        return
    given = phases_in_steps(training.lr_scheduler_kwargs, steps) or {}
    begins, others = share_of(steps, training.warmup_steps).value, ("training.max_steps", "training.warmup_steps")
    decay, stable = given.get("num_decay_steps", 0), given.get("num_stable_steps")
    told = f"{begins:,} steps of warm-up" + (f" + {stable:,} stable" if stable is not None else "")
    told = f"{told} + {decay:,} of decay"
    if begins + (stable or 0) + decay > steps:
        message = f"{told} are more than the run's {steps:,}; lower them, or write a share below 1"
        yield Broken(f"{_ARGUMENTS}.num_decay_steps", message, (_TYPE, *others))
    elif stable is not None and not given.get("min_lr_ratio") and begins + stable + decay < steps:
        message = f"{told} are less than the run's {steps:,}, and the rate of the others is 0; leave it out"
        yield Broken(f"{_ARGUMENTS}.num_stable_steps", message, (_TYPE, *others))


def phases_in_steps(arguments: Mapping[str, Any] | None, steps: int) -> dict[str, Any] | None:
    """The arguments of a schedule of a run of so many steps, shares of it counted."""
    if arguments is None:
        return None
    counted = {key: share_of(steps, arguments[key]).value for key in PHASES if arguments.get(key) is not None}
    return {**arguments, **counted}


RULES: tuple[Rule, ...] = (schedule_knows_its_arguments, schedule_takes_these_values, schedule_uses_its_warm_up)
