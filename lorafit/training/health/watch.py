"""Feeds the rules of health with what is logged, says what they find, and stops the run where the recipe wants it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafit.errors import HealthStop, VerificationError
from lorafit.recipe import Recipe
from lorafit.storage.run_dir import RunDir
from lorafit.tasks import TASKS
from lorafit.tasks.pages import page
from lorafit.training.health.causes import Setting
from lorafit.training.health.history import WINDOW, Evaluation, History, Point
from lorafit.training.health.rules import RULES, Finding, Movement, Weights, not_finite, zero_b

logger = logging.getLogger(__name__)

RowsOfBatch = Callable[[dict[str, Any]], list[str]]


class HealthWatch(TrainerCallback):
    """One for each run. All processes see the same figures, the first decides, and all stop at the same step."""

    def __init__(self, recipe: Recipe, run: RunDir, *, rows_of_batch: RowsOfBatch) -> None:
        self._recipe, self._run, self._rows_of_batch = recipe, run, rows_of_batch
        self._actions: dict[str, str] = recipe.health.model_dump()
        self._history = History()
        self._setting: Setting | None = None
        self._held: dict[str, int] = {}
        self._starts: dict[str, torch.Tensor | None] = {}
        self._first_step = 0
        self._count = 0

    def on_train_begin(  # type: ignore[override]  # given by name
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **_: Any
    ) -> None:
        """Take down where the B matrices start; a run that goes on has its history in the trainer's state."""
        self._setting = setting_of(self._recipe, model, total_steps=state.max_steps)
        self._starts = {
            name: parameter.detach().clone() if parameter.any() else None for name, parameter in _updates(model).items()
        }
        self._count, self._first_step = len(self._starts), state.global_step
        for entry in state.log_history:
            self._history.add(entry, step=int(entry["step"]))
            self._judge(self._setting)  # what was said before is not said again

    def on_log(  # type: ignore[override]  # given by name
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        model: Any,
        **_: Any,
    ) -> None:
        """Judge what was just logged."""
        added = self._history.add(logs, step=state.global_step)
        if added is None or self._setting is None:
            return
        finding = self._judge(self._setting) or self._judge_movement(model, added, state.global_step)
        if isinstance(added, Evaluation) and not math.isfinite(added.loss):
            weights = weights_of(model)
            words = f"held-out loss is {added.loss}"
            broken = not_finite(words, [], weights=weights, history=self._history, setting=self._setting)
            finding = broken if self._is_new("on_nan") else finding
        self._act(finding, step=state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Weight decay alone moves every weight. Raises VerificationError when there never was a gradient."""
        norms = [point.grad_norm for point in self._history.points if point.grad_norm is not None]
        if norms and max(norms) == 0:
            mend = "look at the trained tokens with `lorafit preview`, at lora.target_modules and the adapter's scale"
            raise VerificationError(f"every logged gradient was zero: nothing was learned; {mend}", where="training")

    def may_save(self, model: nn.Module, *, step: int) -> bool:
        """Whether the adapter is finite in every process; a checkpoint of any other would only be gone on from.

        Raises HealthStop.
        """
        assert self._setting is not None
        finite = all(torch.isfinite(_local(p.detach())).all() for p in model.parameters() if p.requires_grad)
        if not reduce(torch.tensor(float(not finite), device=PartialState().device)):
            return True
        finding = not_finite(
            "the adapter is not finite", [], weights=weights_of(model), history=self._history, setting=self._setting
        )
        self._act(finding if self._is_new("on_nan") else None, step=step)
        return False

    def broken_step(self, found: list[tuple[str, dict[str, Any]]], model: nn.Module, *, step: int) -> None:
        """Called by all processes when a loss or gradient norm is not finite in any, before any weight is touched.

        `found` are the words and the batch of each in this process. Raises HealthStop.
        """
        setting = self._setting or setting_of(self._recipe, model, total_steps=step)  # None in a self-test
        every = gather_object([(what, self._rows_of_batch(batch)) for what, batch in found])
        # One broken loss breaks the gradient everywhere: name the rows it came from, not all rows of the step.
        every = [(what, rows) for what, rows in every if what.startswith("loss")] or every
        rows = [row for _, found_rows in every for row in found_rows]
        weights = weights_of(model)
        finding = not_finite(every[0][0], rows, weights=weights, history=self._history, setting=setting)
        self._act(finding if self._is_new("on_nan") else None, step=step)

    def _judge(self, setting: Setting) -> Finding | None:
        """The first rule that holds and was not said lately; each that holds is silent until it has not for a while."""
        found = [finding for rule in RULES if (finding := rule(self._history, setting)) is not None]
        found = [finding for finding in found if self._actions[finding.rule] != "ignore"]
        new = [finding for finding in found if self._is_new(finding.rule)]
        return new[0] if new else None

    def _judge_movement(self, model: Any, added: Point | Evaluation, step: int) -> Finding | None:
        """How far B has come; those that have moved enough are not looked at again."""
        if not self._starts or isinstance(added, Evaluation):
            return None
        assert self._setting is not None
        changes = _changes(_updates(model), self._starts)
        movement = Movement(
            steps=step - self._first_step,
            still=tuple(_short(name) for name, change in changes.items() if change == 0),
            count=self._count,
            largest=max(changes.values(), default=0.0) if len(changes) == self._count else 1.0,
            may_be_pruned=self._recipe.adalora is not None,
        )
        if self._actions["on_zero_b"] == "ignore":
            return None
        finding = zero_b(movement, self._history, self._setting)
        if finding is not None:
            self._starts = {}  # said once
        for name in [name for name, change in changes.items() if change > 1e-5]:
            self._starts.pop(name, None)
        return finding

    def _is_new(self, rule: str) -> bool:
        """Whether `rule`, which holds now, did not hold in the last `WINDOW` logged steps."""
        now, last = len(self._history.points), self._held.get(rule)
        self._held[rule] = now
        return last is None or now - last > WINDOW

    def _act(self, finding: Finding | None, *, step: int) -> None:
        """As the first process decides: an event and one line, or the end of the run. Raises HealthStop."""
        if PartialState().num_processes > 1:
            finding = broadcast_object_list([finding])[0]
        if finding is None:
            return
        action = self._actions[finding.rule]
        if action == "ignore":
            return
        message = f"step {step}: {finding}"
        if PartialState().is_main_process:
            said = replace(finding, rows=tuple(os.path.relpath(row, self._run.path) for row in finding.rows))
            self._run.add_event(
                "health", str(said), step=step, rule=finding.rule, action=action, figures=finding.figures
            )
        if action == "stop":
            raise HealthStop(
                f"{message}; no adapter was written (health.{finding.rule}: warn goes on)", where="training"
            )
        logger.warning(f"{message} (health.{finding.rule}: ignore silences this)")


def setting_of(recipe: Recipe, model: Any, *, total_steps: int) -> Setting:
    """What the rules know of a run besides its figures."""
    training, lora, adalora = recipe.training, recipe.lora, recipe.adalora
    r = lora.r if adalora is None else adalora.init_r
    warmup = training.warmup_steps
    return Setting(
        learning_rate=training.learning_rate,
        warmup_steps=int(warmup) if warmup >= 1 else round(warmup * total_steps),
        total_steps=total_steps,
        epochs=training.num_train_epochs if training.max_steps is None else None,
        r=r,
        lora_alpha=lora.lora_alpha if lora.lora_alpha is not None else 2 * r,
        use_rslora=lora.use_rslora,
        loraplus_lr_ratio=recipe.optimizer.loraplus_lr_ratio,
        max_grad_norm=training.max_grad_norm,
        guessing=math.inf if adalora is not None else page(recipe.task).guessing(model.config),
        guess=TASKS[recipe.task].guess,
        is_float16=training.fp16 or any(parameter.dtype == torch.float16 for parameter in model.parameters()),
        is_shuffled=training.train_sampling_strategy != "sequential",
    )


def _updates(model: nn.Module) -> dict[str, torch.Tensor]:
    """What of the adapter starts with no effect: B, or E with AdaLoRA. Of a spread model, this process's part."""
    parameters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    part = "lora_E" if any("lora_E" in name for name in parameters) else "lora_B", "lora_embedding_B"
    local = {name: _local(p.detach()) for name, p in parameters.items() if any(word in name for word in part)}
    return {name: parameter for name, parameter in local.items() if parameter.numel()}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _changes(now: dict[str, torch.Tensor], starts: dict[str, torch.Tensor | None]) -> dict[str, float]:
    """Root mean square change of each matrix in `starts` (None: it started at zero), in one transfer."""
    changes = [now[name].float() - (0 if start is None else start.float()) for name, start in starts.items()]
    sizes = torch.stack([change.square().mean().sqrt() for change in changes]).tolist()
    return dict(zip(starts, sizes, strict=True))


def weights_of(model: nn.Module) -> Weights:
    """One look at all weights, once something is not finite."""
    broken: dict[bool, str] = {}
    largest = 0.0
    for name, parameter in model.named_parameters():
        values = _local(parameter.detach())
        if not values.is_floating_point() or not values.numel():
            continue
        is_adapter = parameter.requires_grad
        if not torch.isfinite(values).all():
            broken.setdefault(is_adapter, _short(name))
        elif is_adapter:
            largest = max(largest, values.float().square().mean().sqrt().item())
    return Weights(broken_base=broken.get(False), broken_adapter=broken.get(True), largest=largest)


def _short(name: str) -> str:
    """A parameter's name as the base model has it."""
    for part in ("module.", "base_model.model.", ".default", ".base_layer", ".weight"):
        name = name.replace(part, "")
    return name
