"""The model of a run and its trainer, ready for the first step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from lorafit.builders.adapter import AdaptedModule, adapted_modules, set_total_steps
from lorafit.builders.sft_config import sft_config
from lorafit.errors import LorafitError
from lorafit.launching import launch
from lorafit.launching.signals import StopRequest
from lorafit.recipe import LoadedRecipe, Recipe
from lorafit.recipe.arithmetic import warm_up
from lorafit.recipe.rules.schedule import WITHOUT_WARM_UP, phases_in_steps
from lorafit.speed.levers import Engaged, engage_all
from lorafit.storage.run_dir import RunDir
from lorafit.training.announce import Say, say_adapter, say_steps
from lorafit.training.callbacks import CheckpointInterval, EarlyStopping, MetricsFile, RankAllocation, Updates
from lorafit.training.causal_lm import CausalLm, planned_steps
from lorafit.training.checks import refuse_wrong_trainable_set
from lorafit.training.ground import Ground, refuse_what_outlasts
from lorafit.training.health.watch import HealthWatch
from lorafit.training.model import model_with_adapter
from lorafit.training.out_of_memory import out_of_memory_is_said
from lorafit.training.processes import refuse_other_distribution
from lorafit.training.progress import Progress
from lorafit.training.rows_of_batch import RowFinder
from lorafit.training.trainer.split_on_oom import HalveBatch


@dataclass(frozen=True)
class Setup:
    """The model and its trainer, ready for the first step."""

    model: PeftModel
    table: tuple[AdaptedModule, ...]
    trainer: CausalLm
    metrics: MetricsFile
    updates: Updates
    halving: HalveBatch | None
    engaged: Engaged
    steps: int


def set_up(
    loaded: LoadedRecipe,
    run: RunDir,
    ground: Ground,
    *,
    say: Say,
    base: PreTrainedModel | None,
    watchers: Sequence[TrainerCallback],
    stop: StopRequest,
    progress: Progress | None,
) -> Setup:
    """Load the base, attach the adapter, build the trainer."""
    recipe, data = loaded.recipe, ground.inputs.data
    # Before the model: a model that will be spread over processes is loaded in parts, which the arguments settle.
    arguments = sft_config(
        recipe,
        output_dir=run.checkpoints,
        run_name=run.path.name,
        bf16=ground.bf16,
        gradient_checkpointing=ground.checkpointing,
        use_cpu=ground.machine.device == "cpu",
        has_eval_rows=data.eval is not None,
        evaluates_first=ground.begun.checkpoint is None,
    )
    with out_of_memory_is_said(loaded, doing=lambda: "loading the base model", checkpointing=ground.checkpointing):
        model = model_with_adapter(loaded, ground.inputs, base=base)
    refuse_wrong_trainable_set(model, bias=recipe.lora.bias)
    arguments.ddp_find_unused_parameters = adapts_separate_experts(model)
    table = adapted_modules(model)
    say_adapter(table, model, say)
    mixed_precision = "bf16" if ground.bf16 else "fp16" if recipe.training.fp16 else "no"
    engaged = engage_all(
        model,
        recipe,
        is_whole=launch.sharding_asked_for() == "data parallel",
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, model.dtype),
    )
    metrics = MetricsFile(run.metrics)
    health = HealthWatch(recipe, run, say=say, rows_of_batch=RowFinder(data))
    halving = HalveBatch(run, say=say) if recipe.health.on_oom == "halve_batch" else None
    updates = Updates()
    own = [*_callbacks(loaded, metrics, progress=progress), updates, health, *([halving] if halving else [])]
    trainer = CausalLm(
        stop=stop,
        loraplus_lr_ratio=recipe.optimizer.loraplus_lr_ratio,
        engaged=engaged,
        health=health,
        halving=halving,
        base_name=base_name(recipe),
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=ground.inputs.tokenizer,
        callbacks=[*own, *watchers, CheckpointInterval(recipe.checkpoints.every)],
    )
    trainer.remove_callback(PrinterCallback)
    refuse_other_distribution(loaded, trainer.accelerator, mixed_precision=mixed_precision)
    steps = planned_steps(trainer)
    refuse_what_outlasts(loaded, steps)
    set_total_steps(model, steps)
    arguments.lr_scheduler_kwargs = phases_in_steps(recipe.training.lr_scheduler_kwargs, steps)
    say_steps(loaded, trainer, steps, say)
    begins = warm_up(recipe, steps)
    if begins.value != arguments.get_warmup_steps(steps) and recipe.training.lr_scheduler_type not in WITHOUT_WARM_UP:
        arguments.warmup_steps = begins.value  # the schedule is made when training starts
        say(f"warm-up: {begins}")
    for line in engaged.lines:
        say(line)
    return Setup(model, table, trainer, metrics, updates, halving, engaged, steps)


_SEPARATE_EXPERT = re.compile(r"expert[a-z_]*\.\d+\.", re.IGNORECASE)


def adapts_separate_experts(model: PeftModel) -> bool:
    """Whether an adapter of a module that tokens are routed past may get no gradient in a step.

    Such a step would end data parallel training, which waits for every gradient; looking for those that are missing
    costs a walk through the graph in each. Experts that are one tensor, as transformers holds them, always get one.
    """
    return any(
        parameter.requires_grad and _SEPARATE_EXPERT.search(name) for name, parameter in model.named_parameters()
    )


@contextmanager
def nothing_left_of(run: RunDir) -> Iterator[None]:
    """A run that is refused here leaves no directory; the trainer makes that of its checkpoints when it is built."""
    made = run.path if not run.path.exists() else run.checkpoints
    try:
        yield
    except LorafitError:
        with suppress(OSError):  # not there, or not empty
            run.checkpoints.rmdir()
            made.rmdir()
        raise


def _callbacks(loaded: LoadedRecipe, metrics: MetricsFile, *, progress: Progress | None) -> list[Any]:
    recipe = loaded.recipe
    callbacks: list[Any] = [metrics]
    if progress is not None:
        callbacks.append(progress(metrics))
    if recipe.early_stopping is not None:
        stopping = recipe.early_stopping
        callbacks.append(EarlyStopping(stopping.patience, stopping.min_delta))
    if recipe.adalora is not None:
        callbacks.append(RankAllocation())
    return callbacks


def base_name(recipe: Recipe) -> str | None:
    """What an adapter may say of its base: a Hub id, but no path of this machine."""
    name = recipe.model.model_name_or_path
    return None if Path(name).is_absolute() else name
