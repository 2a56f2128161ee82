"""The trainer of a causal language model: TRL's, with our hooks, and a held-out loss per token."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lorafit.builders.adapter import set_total_steps
from lorafit.data.prepare import PreparedData
from lorafit.launching import launch
from lorafit.launching.signals import StopRequest
from lorafit.recipe import LoadedRecipe, Recipe
from lorafit.recipe.arithmetic import warm_up
from lorafit.recipe.rules.schedule import WITHOUT_WARM_UP, phases_in_steps
from lorafit.speed.levers import engage_all
from lorafit.storage.run_dir import RunDir
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


class CausalLm(RunTrainer, SFTTrainer):
    """Trains one adapter on rows that already hold `input_ids` and `labels`."""

    def __init__(self, **arguments: Any) -> None:
        """`arguments` are those of `RunTrainer` and of SFTTrainer."""
        self._held_out: list[torch.Tensor] = []
        super().__init__(**arguments)

    @property
    def window(self) -> dict[str, Any]:
        """What TRL sums up for its next line of metrics, and the tokens that it has counted."""
        metrics = {name: list(values) for name, values in self._metrics["train"].items()}
        return {"metrics": metrics, "tokens": self._total_train_tokens}

    @window.setter
    def window(self, window: dict[str, Any]) -> None:
        self._metrics["train"] = defaultdict(list, {name: list(values) for name, values in window["metrics"].items()})
        self._total_train_tokens = window["tokens"]

    def evaluation_loop(self, *rest: Any, **named: Any) -> Any:
        """`eval_loss` is the mean over held-out tokens, not over batches: the same for every batch size."""
        self._held_out = []
        output = super().evaluation_loop(*rest, **named)
        if self._held_out:
            nll, tokens = torch.cat(self._held_out).double().sum(dim=0).tolist()
            prefix = named.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_loss"] = nll / max(tokens, 1)
            output.metrics[f"{prefix}_tokens"] = int(tokens)
        self._held_out = []
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Negative log-likelihood and trained tokens of each document, gathered without the rows that pad a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self.called(model)(**inputs, use_cache=False, fused_lm_head=True)
        sums = torch.stack([-outputs.log_probs, outputs.label_mask.to(outputs.log_probs.dtype)], dim=-1)
        if "seq_idx" in inputs:
            # One flattened row: the sums of each document, by the document its target token belongs to.
            documents = inputs["seq_idx"][0, 1:].long()
            count = int(inputs["seq_idx"].max()) + 1
            per_document = sums.new_zeros(count, 2).index_add_(0, documents, sums[0, : len(documents)])
        else:
            per_document = sums.sum(dim=1)
        gathered = self.accelerator.gather_for_metrics(per_document)
        self._held_out.append(gathered.cpu())
        nll, tokens = per_document.sum(dim=0)
        return nll / tokens.clamp(min=1), None, None

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None beside checkpoints: the one card of a run is written with its adapter."""

    def _send_telemetry(self) -> None:
        """None: what a user trains is theirs."""


def planned_steps(trainer: Trainer) -> int:
    """Optimizer steps the trainer will do, by its own arithmetic."""
    loader = trainer.get_train_dataloader()
    return int(trainer.set_initial_training_values(trainer.args, loader)[-1])


def causal_lm_trainer(
    model: PeftModel,
    arguments: SFTConfig,
    *,
    loaded: LoadedRecipe,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    watchers: Sequence[TrainerCallback],
    progress: Progress | None,
    stop: StopRequest,
    say: Callable[[str], None],
) -> CausalLm:
    """The trainer of a run, ready for its first step. Raises RecipeError and MachineError."""
    recipe, run = loaded.recipe, RunDir(loaded.output_dir())
    arguments.ddp_find_unused_parameters = adapts_separate_experts(model)
    mixed_precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    engaged = engage_all(
        model,
        recipe,
        is_whole=launch.sharding_asked_for() == "data parallel",
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, model.dtype),
    )
    metrics, updates = MetricsFile(run.metrics), Updates()
    health = HealthWatch(recipe, run, say=say, rows_of_batch=RowFinder(data))
    halving = HalveBatch(run, say=say) if recipe.health.on_oom == "halve_batch" else None
    own = [*_callbacks(recipe, metrics, progress=progress), updates, health, *([halving] if halving else [])]
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
        processing_class=tokenizer,
        callbacks=[*own, *watchers, CheckpointInterval(recipe.checkpoints.every)],
    )
    trainer.remove_callback(PrinterCallback)
    refuse_other_distribution(loaded, trainer.accelerator, mixed_precision=mixed_precision)
    trainer.metrics, trainer.updates, trainer.steps = metrics, updates, planned_steps(trainer)
    _settle_schedule(trainer, loaded, say)
    for line in engaged.lines:
        say(line)
    return trainer


def _settle_schedule(trainer: CausalLm, loaded: LoadedRecipe, say: Callable[[str], None]) -> None:
    """What depends on the number of steps, which packing decides. Raises RecipeError."""
    recipe, arguments, steps = loaded.recipe, trainer.args, trainer.steps
    refuse_what_outlasts(loaded, steps)
    set_total_steps(trainer.model, steps)
    arguments.lr_scheduler_kwargs = phases_in_steps(recipe.training.lr_scheduler_kwargs, steps)
    say_steps(loaded, trainer, steps, say)
    begins = warm_up(recipe, steps)
    if begins.value != arguments.get_warmup_steps(steps) and recipe.training.lr_scheduler_type not in WITHOUT_WARM_UP:
        arguments.warmup_steps = begins.value  # the schedule is made when training starts
        say(f"warm-up: {begins}")


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
