"""The computations of a self-test that must come to the same, on a few rows of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lorafit.builders.adapter import base_of
from lorafit.launching.signals import StopRequest
from lorafit.lines import unsaid
from lorafit.precision import compute_dtype
from lorafit.recipe import LoadedRecipe, Recipe
from lorafit.speed.levers import Engaged
from lorafit.storage.run_dir import RunDir
from lorafit.tasks import TASKS
from lorafit.tasks.pages import TrainerPage, trainer_page
from lorafit.training.arguments import training_arguments
from lorafit.training.health.watch import HealthWatch
from lorafit.training.restore_model import unchanged
from lorafit.training.trainer.run_trainer import RunTrainer

LENGTHS = (64, 10, 45, 16, 57, 13, 51, 19)
"""Tokens of the rows at most. So unlike that a mean of rows, a mean of batches and the mean over tokens differ."""

FEW = 0.25
"""Share of those lengths on a CPU that has a model of more than 100 M parameters to compute: seconds, not minutes."""


@dataclass(frozen=True)
class Check:
    """One comparison of two computations that must come to the same."""

    name: str
    difference: float
    tolerance: float
    setting: str
    """The key of the recipe that avoids what failed."""
    failure: str
    """What is wrong when it fails, and what to write."""

    @property
    def has_passed(self) -> bool:
        """False for NaN, too."""
        return self.difference <= self.tolerance


LOWER_LOSS_SCALES = (2.0**8, 1.0)
"""Tried after the scaler's own first one, 2**16."""


def tolerances(recipe: Recipe, *, dtype: torch.dtype, bf16: bool) -> tuple[float, float]:
    """How far two orders of summation may differ: in a token's log-probability (root mean square, nats), and in the
    gradient (its norm, relative).

    Both grow with the rounding step of the type that products are computed in: 8 steps are what some dozens of layers
    add up to (bfloat16: 0.06). A leak between documents moves tokens by 0.3 nats and more, a wrong scale the gradient
    by a tenth and more. float32 is held to 1e-4, which sums of thousands of terms do not reach.
    """
    computed = [dtype, *([torch.bfloat16] if bf16 else []), *([torch.float16] if recipe.training.fp16 else [])]
    section = recipe.quantization
    if section is not None and section.load_in_4bit:
        computed.append(getattr(torch, compute_dtype(section.bnb_4bit_compute_dtype)))
    elif section is not None:  # LLM.int8() chooses its 16-bit columns by the whole batch, and rounds the rest to 8 bits
        return 0.25, 0.1
    if torch.cuda.is_available() and torch.backends.cuda.matmul.fp32_precision == "tf32":
        computed.append(torch.float16)  # TF32 has its mantissa
    step = max(torch.finfo(kind).eps for kind in computed)
    return max(8 * step, 1e-4), max(8 * step, 1e-4)


class Bench:
    """The rows and trainers that the checks share."""

    def __init__(
        self,
        model: PeftModel,
        loaded: LoadedRecipe,
        *,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        scratch: Path,
        bf16: bool,
        checkpointing: bool,
        engaged: Engaged,
    ) -> None:
        self._model, self._loaded, self._tokenizer, self._scratch = model, loaded, tokenizer, scratch
        self._bf16, self._checkpointing, self._engaged = bf16, checkpointing, engaged
        task = TASKS[loaded.recipe.task]
        self._page, self._unit = trainer_page(task.name), f"{task.unit} a {task.counted}"
        self._rows = self._page.short_rows(rows, _lengths(model))
        self._tolerances = tolerances(loaded.recipe, dtype=model.dtype, bf16=bf16)

    def checks(self) -> Iterator[Check]:
        """What applies to this recipe."""
        one_by_one = self._gradient(per_pass=1)
        four_by_four = self._gradient(per_pass=4)
        yield self._accumulation(one_by_one, four_by_four)
        self._model.eval()
        trainer = four_by_four.trainer
        rows = self._rows[:4]
        alone = torch.cat([self._scores(trainer, _alone(row)) for row in rows])
        together = self._scores(trainer, trainer.data_collator(rows))
        yield self._packing(alone, together) if trainer.padding_free else self._padding(alone, together)
        with self._model.disable_adapter():
            switched_off = self._scores(trainer, trainer.data_collator(rows))
        with _taken_out(self._model):
            base = self._scores(trainer, trainer.data_collator(rows))
        yield self._adapter_off(base, switched_off)

    @torch.no_grad()
    def _scores(self, trainer: RunTrainer, batch: dict[str, Any]) -> torch.Tensor:
        """Of each token that is trained, in the order of the rows, wherever they lie."""
        inputs = trainer._prepare_inputs(batch)
        with trainer.accelerator.autocast():
            scored = self._page.score(trainer.model, inputs)
        return self._page.scores_of_tokens(scored).double().cpu()

    def _accumulation(self, one_by_one: _Step, four_by_four: _Step) -> Check:
        difference = one_by_one.distance(four_by_four)
        failure = (
            f"8 micro-batches of 1 row and 2 of 4, the same rows, differ by {difference:.1%} in loss or gradient "
            f"(at most {self._tolerances[1]:.2%}): accumulation is scaled wrongly; write 1 here and a larger "
            "training.per_device_train_batch_size, or change the versions of transformers and trl"
        )
        return Check("accumulation", difference, self._tolerances[1], "training.gradient_accumulation_steps", failure)

    def _packing(self, alone: torch.Tensor, together: torch.Tensor) -> Check:
        difference, attention = _distance(alone, together), self._attention()
        lever = self._engaged.of_attention(attention)
        failure = (
            f"a packed document is not computed as it is alone, {difference:.2g} {self._unit} apart (at most "
            f"{self._tolerances[0]:.2g}): with {attention} attention it sees its neighbours; write false"
        )
        other = "model.attn_implementation: sdpa" if lever is None else f"speed.{lever.key}: false"
        return Check("packing", difference, self._tolerances[0], "training.packing", f"{failure}, or {other}")

    def _padding(self, alone: torch.Tensor, together: torch.Tensor) -> Check:
        difference, attention = _distance(alone, together), self._attention()
        failure = (
            f"a padded row is not computed as it is alone, {difference:.2g} {self._unit} apart (at most "
            f"{self._tolerances[0]:.2g}): {attention} sees the padding or counts it as positions; write sdpa or eager, "
            "or training.packing: true"
        )
        return Check("padding", difference, self._tolerances[0], "model.attn_implementation", failure)

    def _adapter_off(self, base: torch.Tensor, switched_off: torch.Tensor) -> Check:
        difference, kind = _distance(base, switched_off), PeftType(self._model.peft_config["default"].peft_type).value
        failure = (
            f"switched off, the {kind} adapter still moves the model by {difference:.2g} {self._unit} (at most "
            f"{self._tolerances[0]:.2g}), so nothing can be compared with the base; leave out lora.extra and the "
            "variant of LoRA, or change the version of peft"
        )
        return Check("adapter off", difference, self._tolerances[0], "lora", failure)

    def _attention(self) -> str:
        return str(base_of(self._model).config._attn_implementation)

    def _gradient(self, *, per_pass: int) -> _Step:
        """Of one optimizer step over all rows. A loss scale at which it overflows is lowered, as training lowers it."""
        step = self._step(per_pass=per_pass, loss_scale=None)
        for loss_scale in LOWER_LOSS_SCALES:
            if step.is_finite() or step.trainer.accelerator.scaler is None:
                break
            step = self._step(per_pass=per_pass, loss_scale=loss_scale)
        return step

    def _step(self, *, per_pass: int, loss_scale: float | None) -> _Step:
        """Through the trainer's own loop."""
        arguments = training_arguments(
            _one_step(self._loaded.recipe, self._page, per_pass=per_pass, steps=len(self._rows) // per_pass),
            output_dir=self._scratch,
            run_name="selftest",
            bf16=self._bf16,
            gradient_checkpointing=self._checkpointing,
            use_cpu=not torch.cuda.is_available(),
            has_eval_rows=False,
        )
        step = _Step()
        health = HealthWatch(self._loaded.recipe, RunDir(self._scratch), rows_of_batch=lambda batch: [])
        step.trainer = self._page.TRAINER(
            stop=StopRequest(),
            loraplus_lr_ratio=None,
            engaged=self._engaged.uncompiled(),
            health=health,
            halving=None,
            base_name=None,
            model=self._model,
            args=arguments,
            train_dataset=Dataset.from_list(self._rows),
            processing_class=self._tokenizer,
            callbacks=[step],
        )
        step.trainer.remove_callback(PrinterCallback)
        scaler = step.trainer.accelerator.scaler
        if scaler is not None and loss_scale is not None:
            scaler.load_state_dict(scaler.state_dict() | {"scale": loss_scale})
        with unsaid("lorafit.training.health"):  # of one step it knows nothing
            step.loss = step.trainer.train().training_loss
        return step


class _Step(TrainerCallback):
    """The loss and the gradient of one optimizer step."""

    trainer: RunTrainer
    loss: float

    def on_pre_optimizer_step(  # type: ignore[override]  # given by name
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **_: Any
    ) -> None:
        """Take a copy, complete and before anything is done with it."""
        scaler = self.trainer.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        self.gradient = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach() / scale
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def is_finite(self) -> bool:
        """Whether the gradient is: with fp16 it overflows until the loss scale is found."""
        return all(bool(torch.isfinite(gradient).all()) for gradient in self.gradient.values())

    def distance(self, other: _Step) -> float:
        """The larger of the relative differences of the loss and of the gradient."""
        apart = sum(_square(self.gradient[name] - gradient) for name, gradient in other.gradient.items()) ** 0.5
        length = sum(_square(gradient) for gradient in self.gradient.values()) ** 0.5
        of_loss = abs(self.loss - other.loss) / max(abs(self.loss), 1e-30)
        return float(torch.tensor([apart / max(length, 1e-30), of_loss]).max())  # NaN where either is


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())


def _one_step(recipe: Recipe, page: TrainerPage, *, per_pass: int, steps: int) -> Recipe:
    """The recipe's training without all that does not decide what a forward and backward pass compute."""
    extra = {
        key: value
        for key, value in recipe.training.extra.items()
        if not key.startswith(("dataloader_", "torch_compile"))
    }
    changes: dict[str, Any] = {
        "per_device_train_batch_size": per_pass,
        "gradient_accumulation_steps": steps,
        "max_steps": 1,
        "learning_rate": 0.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "lr_scheduler_kwargs": None,
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "neftune_noise_alpha": None,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": (),
        "torch_compile": False,
        "dataloader_num_workers": 0,
        "train_sampling_strategy": "sequential",
        "extra": extra,
    }
    training = recipe.training.model_copy(update=changes)
    training = training.model_copy(update=page.unpacked(training))
    return recipe.model_copy(update={"training": training, "early_stopping": None})


def _lengths(model: nn.Module) -> list[int]:
    """Of the eight rows."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    share = FEW if parameters > 1e8 and not torch.cuda.is_available() else 1.0
    return [max(int(longest * share), 2) for longest in LENGTHS]


def _alone(row: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """One row as the model takes it without padding, packing, mask or positions: nothing there can be wrong."""
    return {name: torch.tensor([values]) for name, values in row.items()}


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square; infinite where the two are not of the same tokens."""
    return float((one - other).square().mean().sqrt()) if one.shape == other.shape else float("inf")


@contextmanager
def _taken_out(model: PeftModel) -> Iterator[None]:
    """Every layer that peft put in, replaced by the one it wraps."""
    with unchanged(model):
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, BaseTunerLayer):
                    setattr(parent, name, child.get_base_layer())
                elif isinstance(child, AuxiliaryTrainingWrapper):
                    setattr(parent, name, child.original_module)
        yield


def switch_off_noise(model: nn.Module) -> None:
    """Dropout of every kind, and a router's jitter, which are modules or numbers of modules."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "jitter" in name):
                setattr(module, name, 0.0)


def wake_adapter(model: nn.Module) -> None:
    """Other weights for the adapter: as it starts, with B zero, it is neutral whether it is switched off or not."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.Generator(parameter.device).manual_seed(0)
            scale = 0.1 * parameter.detach().float().square().mean().sqrt() or 0.02
            values = torch.randn(parameter.shape, generator=noise, device=parameter.device)
            parameter.data = parameter.data + (values * scale).to(parameter.dtype)
