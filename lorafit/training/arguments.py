"""`training` (and what surrounds it) in, the arguments of the task's trainer out."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from lorafit.recipe.recipe import Recipe
from lorafit.tasks.pages import trainer_page

_NAMES = {one.name for one in fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"
"""The first since transformers 5.23, which warns of the second; to be written out where that is the oldest."""


def training_arguments(
    recipe: Recipe,
    *,
    output_dir: Path,
    run_name: str,
    bf16: bool,
    gradient_checkpointing: bool,
    use_cpu: bool,
    has_eval_rows: bool,
    evaluates_first: bool = True,
) -> TrainingArguments:
    """The arguments of a run whose rows are already what its model takes.

    `output_dir` is where checkpoints go. Checkpoints themselves are asked for by a callback (a share of the run or a
    time is no `save_steps`), so `save_strategy` is `no`, or `best` when the best adapter is kept. A run that goes on
    from a checkpoint does not evaluate first.
    """
    training, page = recipe.training, trainer_page(recipe.task)
    keeps_best = training.load_best_model_at_end or recipe.early_stopping is not None
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "run_name": training.run_name or run_name,
        "num_train_epochs": training.num_train_epochs,
        "max_steps": -1 if training.max_steps is None else training.max_steps,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "per_device_eval_batch_size": training.per_device_eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "lr_scheduler_kwargs": training.lr_scheduler_kwargs,
        "warmup_steps": training.warmup_steps,
        "optim": training.optim,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "bf16": bf16,
        "fp16": training.fp16,
        CHECKPOINTING: gradient_checkpointing,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False} if gradient_checkpointing else None,
        "neftune_noise_alpha": training.neftune_noise_alpha,
        "logging_steps": training.logging_steps,
        "report_to": list(training.report_to) or "none",
        "seed": training.seed,
        "dataloader_num_workers": training.dataloader_num_workers,
        "train_sampling_strategy": training.train_sampling_strategy,
        "torch_compile": training.torch_compile,
        "eval_strategy": training.eval_strategy if has_eval_rows else "no",
        "eval_steps": training.eval_steps,
        "eval_on_start": has_eval_rows and evaluates_first,
        "save_strategy": "best" if keeps_best else "no",
        "save_total_limit": None,  # older checkpoints are removed by their own rules, see training/checkpoints.py
        "load_best_model_at_end": keeps_best,
        "metric_for_best_model": "eval_loss" if keeps_best else None,
        "greater_is_better": False if keeps_best else None,
        # On, it logs a NaN loss as 0.0 and the run ends as if all were well.
        "logging_nan_inf_filter": False,
        "logging_first_step": True,
        "prediction_loss_only": True,
        "disable_tqdm": True,
        "use_cpu": use_cpu,
        "dataloader_pin_memory": not use_cpu,
        "ddp_find_unused_parameters": False,
        "push_to_hub": False,
        "hub_private_repo": True,
    }
    arguments = page.ARGUMENTS(**(settings | page.own_settings(recipe) | training.extra))
    # A process without a launcher takes all GPUs that it sees, for nn.DataParallel, which TRL's trainers refuse.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
