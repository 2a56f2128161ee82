"""Rules of `training`, `early_stopping`, `launch` and where the run is written."""

import os
from collections.abc import Iterator
from pathlib import Path

from lorafit.recipe.advice import ADVICE_NAMES
from lorafit.recipe.arithmetic import warm_up
from lorafit.recipe.paths import STRATEGIES
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.rules.broken import Broken, Rule
from lorafit.recipe.rules.schedule import WITHOUT_WARM_UP, phases_too_long_for
from lorafit.recipe.suggest import nearest


def one_half_precision(recipe: Recipe) -> Iterator[Broken]:
    """The library refuses fp16 with bf16."""
    if recipe.training.fp16 and recipe.training.bf16 is True:
        yield Broken("training.fp16", "cannot be true with bf16; keep one of the two", ("training.bf16",))


def step_counts_are_whole(recipe: Recipe) -> Iterator[Broken]:
    """Below 1 they are a share of all steps, from 1 on a number of steps."""
    for key in ("warmup_steps", "eval_steps", "logging_steps"):
        value = getattr(recipe.training, key)
        if value is not None and value > 1 and value != int(value):
            message = f"{value} is not a number of steps; write {int(value)}, or a share below 1"
            yield Broken(f"training.{key}", message)


def max_steps_leave_room(recipe: Recipe) -> Iterator[Broken]:
    """Warm-up, evaluations and AdaLoRA's phases end within the run."""
    if recipe.training.max_steps is not None:
        yield from too_long_for(recipe, recipe.training.max_steps)


def too_long_for(recipe: Recipe, steps: int) -> Iterator[Broken]:
    """What does not fit into a run of so many optimizer steps; also for runs whose steps follow from their rows."""
    training, adalora, others = recipe.training, recipe.adalora, ("training.max_steps",)
    run = f"the run's {steps:,} step{'s' * (steps != 1)}"
    written = training.warmup_steps
    if warm_up(recipe, steps).value >= steps and training.lr_scheduler_type not in WITHOUT_WARM_UP:
        if written >= 1:
            message = f"{written:g} steps of warm-up do not end within {run}; lower it"
        else:
            message = f"{written:g} of {run}, rounded up, is all of it, and warm-up begins at the rate 0; write 0"
        yield Broken("training.warmup_steps", message, others)
    else:
        yield from phases_too_long_for(recipe, steps)
    if training.eval_steps is not None and training.eval_steps > steps:
        yield Broken("training.eval_steps", f"{training.eval_steps:g} is more than {run}; lower it", others)
    if adalora is not None and adalora.tinit + adalora.tfinal >= steps:
        message = f"tinit {adalora.tinit} + tfinal {adalora.tfinal} leave none of {run} to prune in; lower them"
        yield Broken("adalora", message, ("adalora.tinit", "adalora.tfinal", *others))
    elif adalora is not None and adalora.tfinal + 1 >= steps:
        message = f"needs a step before those that it ends with to see what matters, and {run} leaves none"
        yield Broken("adalora", f"{message}; train longer, or lower tfinal", ("adalora.tfinal", *others))


HIGHEST_RATE = 10.0
"""Of A, and so of B: `training.learning_rate` says why."""


def rates_stay_below_what_any_run_bears(recipe: Recipe) -> Iterator[Broken]:
    """A slip of the pen (`16e4` for 16) would train for hours before health stops the run."""
    training, ratio = recipe.training, recipe.optimizer.loraplus_lr_ratio
    rate = training.learning_rate
    if ratio is not None and rate * ratio > HIGHEST_RATE:
        message = (
            f"{ratio:g} makes the rate of B {rate:g} x {ratio:g} = {rate * ratio:.3g}, no run bears it; usual is 16"
        )
        yield Broken("optimizer.loraplus_lr_ratio", message, ("training.learning_rate",))
    if rate * training.weight_decay >= 1:
        message = (
            f"{training.weight_decay:g} x learning_rate {rate:g} = {rate * training.weight_decay:.3g} is the share"
        )
        message = f"{message} that every step takes from each weight, all of it and more; usual are 0 to 0.1"
        yield Broken("training.weight_decay", message, ("training.learning_rate",))


def evaluation_has_rows(recipe: Recipe) -> Iterator[Broken]:
    """What watches the held-out loss needs held-out rows, and a time to look."""
    training = recipe.training
    has_rows = bool(recipe.data.eval) or recipe.data.eval_fraction is not None
    watching = {
        "training.load_best_model_at_end": training.load_best_model_at_end,
        "early_stopping": recipe.early_stopping is not None,
        "training.lr_scheduler_type": training.lr_scheduler_type == "reduce_lr_on_plateau",
    }
    for key, is_on in watching.items():
        if is_on and not has_rows:
            yield Broken(key, "needs held-out rows; write data.eval or data.eval_fraction", _EVAL_KEYS)
        elif is_on and training.eval_strategy == "no":
            message = "needs evaluations during the run; write training.eval_strategy: epoch, or steps with eval_steps"
            yield Broken(key, message, _EVAL_KEYS)
    if training.eval_strategy != "no" and not has_rows:
        message = f"{training.eval_strategy}: there are no held-out rows; write data.eval or data.eval_fraction"
        yield Broken("training.eval_strategy", message, _EVAL_KEYS)


_EVAL_KEYS = ("data.eval", "data.eval_fraction", "training.eval_strategy")


def eval_steps_go_with_their_strategy(recipe: Recipe) -> Iterator[Broken]:
    """Without `steps` they are ignored; with it, missing, the library takes logging_steps without a word."""
    training = recipe.training
    others = ("training.eval_strategy", "training.eval_steps")
    if training.eval_steps is not None and training.eval_strategy != "steps":
        message = f"is ignored with eval_strategy: {training.eval_strategy}; write steps there, or leave it out"
        yield Broken("training.eval_steps", message, others)
    if training.eval_strategy == "steps" and training.eval_steps is None:
        message = "steps needs training.eval_steps; write a number of steps, or a share of the run below 1"
        yield Broken("training.eval_strategy", message, others)


def strategy_is_known_or_a_file(recipe: Recipe) -> Iterator[Broken]:
    """What is not a strategy was taken for the path of an accelerate config file."""
    strategy = recipe.launch.strategy
    if strategy in STRATEGIES or Path(strategy).is_file():
        return
    guess = nearest(Path(strategy).name, (*STRATEGIES, "fsdp", "deepspeed"))
    guess = {"fsdp": "fsdp2", "deepspeed": "zero2 or zero3"}.get(guess or "", guess)
    mend = f"did you mean {guess}?" if guess else f"there is no such file; write one of {', '.join(STRATEGIES)}"
    yield Broken("launch.strategy", f'"{Path(strategy).name}" is not a strategy or an accelerate file; {mend}')


def halving_needs_whole_gradients(recipe: Recipe) -> Iterator[Broken]:
    """A step of a model that is spread over processes cannot be left half way: the others wait for this one's part."""
    strategy = recipe.launch.strategy
    if recipe.health.on_oom == "halve_batch" and strategy in ("fsdp2", "zero2", "zero3"):
        message = f"a step cannot be done again in halves with {strategy}; write stop, or launch.strategy: ddp"
        yield Broken("health.on_oom", message, ("launch.strategy",))


def zero_needs_a_shared_disk(recipe: Recipe) -> Iterator[Broken]:
    """Its checkpoints hold a part for each process, which it writes itself."""
    launch = recipe.launch
    if launch.strategy in ("zero2", "zero3") and launch.machines not in ("auto", 1) and not launch.shared_disk:
        message = f"each process writes its part of a checkpoint with {launch.strategy}; write true, and an output_dir"
        message = f"{message} that all machines see, or launch.strategy: fsdp2"
        yield Broken("launch.shared_disk", message, ("launch.strategy", "launch.machines"))


WITH_SHARDED_WEIGHTS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
"""Optimizers that update a part of each weight, as FSDP2 leaves it to a process."""


def optimizer_takes_sharded_weights(recipe: Recipe) -> Iterator[Broken]:
    """bitsandbytes' optimizers, Adafactor and Adagrad fail at the first step (tried with two processes)."""
    if recipe.launch.strategy == "fsdp2" and recipe.training.optim not in WITH_SHARDED_WEIGHTS:
        message = f"{recipe.training.optim} cannot update weights that fsdp2 shards; write adamw_torch_fused"
        yield Broken("training.optim", message, ("launch.strategy",))


def output_stays_out_of_the_model(recipe: Recipe) -> Iterator[Broken]:
    """A run inside the base model's directory would become part of that model."""
    base = recipe.model.model_name_or_path
    if recipe.output_dir is None or not Path(base).is_absolute():
        return
    run = os.path.realpath(recipe.output_dir)
    model = os.path.realpath(base)
    if run == model or run.startswith(model + os.sep):
        message = f"{recipe.output_dir} is inside the base model's directory; choose another"
        yield Broken("output_dir", message, ("model.model_name_or_path",))


LONGEST_NAME = 255
"""Bytes of a file name on the file systems of Linux."""


def output_dir_can_be_a_directory(recipe: Recipe) -> Iterator[Broken]:
    """A name that no directory can have."""
    output_dir = recipe.output_dir or ""
    if output_dir.startswith("~"):  # loading puts the home directory of every user there is in its place
        yield Broken("output_dir", f"{output_dir.split('/')[0]} is no user's home directory; write the path")
    longest = max(len(os.fsencode(part)) for part in output_dir.split("/"))
    if longest > LONGEST_NAME:
        yield Broken("output_dir", f"a name of {longest} bytes is too long for a directory; at most {LONGEST_NAME}")


def silenced_advice_exists(recipe: Recipe) -> Iterator[Broken]:
    """A misspelt name would silence nothing."""
    for name in recipe.silence:
        if name not in ADVICE_NAMES:
            guess = nearest(name, ADVICE_NAMES)
            mend = f"did you mean {guess}?" if guess else f"its names are {', '.join(sorted(ADVICE_NAMES))}"
            yield Broken("silence", f'"{name}" is not the name of an advice; {mend}')


RULES: tuple[Rule, ...] = (
    one_half_precision,
    step_counts_are_whole,
    max_steps_leave_room,
    rates_stay_below_what_any_run_bears,
    evaluation_has_rows,
    eval_steps_go_with_their_strategy,
    strategy_is_known_or_a_file,
    halving_needs_whole_gradients,
    zero_needs_a_shared_disk,
    optimizer_takes_sharded_weights,
    output_stays_out_of_the_model,
    output_dir_can_be_a_directory,
    silenced_advice_exists,
)
