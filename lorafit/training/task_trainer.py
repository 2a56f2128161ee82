"""The trainer of a run: that of its task, with what watches it, ready for its first step."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lorafit.builders.adapter import set_total_steps
from lorafit.data.prepare import PreparedData
from lorafit.launching import launch
from lorafit.launching.signals import StopRequest
from lorafit.recipe import LoadedRecipe, Recipe
from lorafit.recipe.arithmetic import warm_up
from lorafit.recipe.rules.schedule import WITHOUT_WARM_UP, phases_in_steps
from lorafit.speed.levers import engage_all
from lorafit.storage.run_dir import RunDir
from lorafit.tasks.pages import trainer_page
from lorafit.training.callbacks import CheckpointInterval, EarlyStopping, MetricsFile, RankAllocation, Updates
from lorafit.training.health.watch import HealthWatch
from lorafit.training.inputs import refuse_what_outlasts
from lorafit.training.processes import refuse_other_distribution
from lorafit.training.progress import Progress
from lorafit.training.rows_of_batch import RowFinder
from lorafit.training.save import base_name
from lorafit.training.startup_lines import say_steps
from lorafit.training.trainer.run_trainer import RunTrainer
from lorafit.training.trainer.split_on_oom import HalveBatch

logger = logging.getLogger(__name__)


def planned_steps(trainer: Trainer) -> int:
    """Optimizer steps the trainer will do, by its own arithmetic."""
    loader = trainer.get_train_dataloader()
    return int(trainer.set_initial_training_values(trainer.args, loader)[-1])


def task_trainer(
    model: PeftModel,
    arguments: TrainingArguments,
    *,
    loaded: LoadedRecipe,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    watchers: Sequence[TrainerCallback],
    progress: Progress | None,
    stop: StopRequest,
) -> RunTrainer:
    """The trainer of a run, ready for its first step. Raises RecipeError and MachineError."""
    recipe, run = loaded.recipe, RunDir(loaded.output_dir())
    page = trainer_page(recipe.task)
    arguments.ddp_find_unused_parameters = adapts_separate_experts(model)
    mixed_precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    engaged = engage_all(
        model,
        recipe,
        levers=page.LEVERS,
        is_whole=launch.sharding_asked_for() == "data parallel",
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, model.dtype),
    )
    metrics, updates = MetricsFile(run.metrics), Updates()
    health = HealthWatch(recipe, run, rows_of_batch=RowFinder(data, page.TRAINER.rows_of))
    halving = HalveBatch(run) if recipe.health.on_oom == "halve_batch" else None
    own = [*_callbacks(recipe, metrics, progress=progress), updates, health, *([halving] if halving else [])]
    trainer = page.TRAINER(
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
        processing_class=tokenizer,
        callbacks=[*own, *watchers, CheckpointInterval(recipe.checkpoints.every)],
    )
    trainer.remove_callback(PrinterCallback)
    refuse_other_distribution(loaded, trainer.accelerator, mixed_precision=mixed_precision)
    trainer.metrics, trainer.updates, trainer.steps = metrics, updates, planned_steps(trainer)
    _settle_schedule(trainer, loaded)
    for line in engaged.lines:
        logger.info(line)
    return trainer


def _settle_schedule(trainer: RunTrainer, loaded: LoadedRecipe) -> None:
    """What depends on the number of steps, which packing decides. Raises RecipeError."""
    recipe, arguments, steps = loaded.recipe, trainer.args, trainer.steps
    refuse_what_outlasts(loaded, steps)
    set_total_steps(trainer.model, steps)
    arguments.lr_scheduler_kwargs = phases_in_steps(recipe.training.lr_scheduler_kwargs, steps)
    say_steps(loaded, trainer, steps)
    begins = warm_up(recipe, steps)
    if begins.value != arguments.get_warmup_steps(steps) and recipe.training.lr_scheduler_type not in WITHOUT_WARM_UP:
        arguments.warmup_steps = begins.value  # the schedule is made when training starts
        logger.info(f"warm-up: {begins}")


_SEPARATE_EXPERT = re.compile(r"expert[a-z_]*\.\d+\.", re.IGNORECASE)


def adapts_separate_experts(model: PeftModel) -> bool:
    """Whether an adapter of a module that tokens are routed past may get no gradient in a step.

    Such a step would end data parallel training, which waits for every gradient; looking for those that are missing
    costs a walk through the graph in each. Experts that are one tensor, as transformers holds them, always get one.
    """
    return any(
        parameter.requires_grad and _SEPARATE_EXPERT.search(name) for name, parameter in model.named_parameters()
    )


def _callbacks(recipe: Recipe, metrics: MetricsFile, *, progress: Progress | None) -> list[Any]:
    callbacks: list[Any] = [metrics]
    if progress is not None:
        callbacks.append(progress(metrics))
    if recipe.early_stopping is not None:
        stopping = recipe.early_stopping
        callbacks.append(EarlyStopping(stopping.patience, stopping.min_delta))
    if recipe.adalora is not None:
        callbacks.append(RankAllocation())
    return callbacks
