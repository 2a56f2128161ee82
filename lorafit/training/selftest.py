"""Does this set-up compute what is meant? The run's own model, collator and trainer on a few of its rows.

Packed documents see only themselves, padding changes nothing, the gradient does not depend on how a batch is divided,
and with the adapter switched off the model is its base. Each of these has been broken by a release of a library or by
an attention that ignores its mask, and none of them shows in the loss curve.
"""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafit import __version__
from lorafit.builders.sft_config import sft_config
from lorafit.durable import write_file
from lorafit.errors import VerificationError
from lorafit.recipe import LoadedRecipe, Recipe
from lorafit.run_dir import RunDir
from lorafit.speed import varlen_attention
from lorafit.stopping import StopRequest
from lorafit.training.health.watch import HealthWatch
from lorafit.training.inputs import RunInputs
from lorafit.training.out_of_memory import out_of_memory_is_said
from lorafit.training.trainer import LoraTrainer
from lorafit.training.unchanged import unchanged

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


@dataclass(frozen=True)
class SelfTest:
    """What was tried and what came of it; the JSON of `lorafit train --selftest`."""

    combination: dict[str, Any]
    """What it holds for: it is not tried again before one of these changes."""
    checks: tuple[Check, ...]
    seconds: float

    def line(self) -> str:
        """For people."""
        names = ", ".join(f"{check.name} {check.difference:.2g} of {check.tolerance:.2g}" for check in self.checks)
        return f"self-test passed in {self.seconds:.1f} s, differences: {names}"

    def result(self) -> dict[str, Any]:
        """For machines."""
        checks = [{key: value for key, value in asdict(check).items() if key != "failure"} for check in self.checks]
        return {"combination": self.combination, "checks": checks, "seconds": self.seconds}

    def figures(self) -> dict[str, float]:
        """For the event of a run."""
        return {check.name: check.difference for check in self.checks} | {"seconds": self.seconds}


def mark(cache: Path, combination: dict[str, Any]) -> Path:
    """The file that says of a combination that it has passed."""
    text = json.dumps(combination, sort_keys=True)
    return cache / "selftest" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def is_remembered(cache: Path | None, combination: dict[str, Any]) -> bool:
    """Whether it has passed before."""
    return cache is not None and mark(cache, combination).is_file()


def remember_passed(cache: Path | None, tested: SelfTest) -> None:
    """So that the next run of this combination need not try it."""
    if cache is not None:
        file = mark(cache, tested.combination)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(tested.result(), indent=1) + "\n")


def combination_of(model: PeftModel, recipe: Recipe, *, bf16: bool) -> dict[str, Any]:
    """All that decides which code computes a step."""
    base = model.get_base_model()
    config = model.peft_config["default"]
    quantization = recipe.quantization
    packages = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
    return {
        "model": type(base).__name__,
        "attention": base.config._attn_implementation,
        "packing": recipe.training.packing,
        "loss": recipe.training.loss_type,
        "speed": recipe.speed.model_dump(),
        "adapter": [config.peft_type.value, config.use_dora, sorted(config.modules_to_save or ())],
        "quantization": None if quantization is None else quantization.model_dump(mode="json"),
        "dtype": str(base.dtype),
        "autocast": "bf16" if bf16 else "fp16" if recipe.training.fp16 else "no",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"lorafit": __version__} | {package: version(package) for package in packages},
    }


def self_test(
    model: PeftModel, loaded: LoadedRecipe, *, inputs: RunInputs, bf16: bool, checkpointing: bool
) -> SelfTest:
    """Try everything. Raises VerificationError with what failed; the model is what it was, whatever happens."""
    started = time.monotonic()
    recipe = loaded.recipe
    combination = combination_of(model, recipe, bf16=bf16)
    with tempfile.TemporaryDirectory(prefix="lorafit-") as scratch, unchanged(model), _quick_collections():
        _switch_off_noise(model)
        _wake_adapter(model)
        bench = _Bench(model, loaded, inputs=inputs, scratch=Path(scratch), bf16=bf16, checkpointing=checkpointing)
        checks = tuple(bench.checks())
    failed = [check for check in checks if not check.has_passed]
    if any(check.name in ("packing", "padding") for check in failed):  # then rows together differ from rows alone, too
        failed = [check for check in failed if check.name != "accumulation"]
    if failed:
        raise VerificationError(loaded.problem(check.setting, check.failure) for check in failed)
    return SelfTest(combination, checks, round(time.monotonic() - started, 2))


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
        computed.append(getattr(torch, section.bnb_4bit_compute_dtype))
    elif section is not None:  # LLM.int8() chooses its 16-bit columns by the whole batch, and rounds the rest to 8 bits
        return 0.25, 0.1
    if torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32:
        computed.append(torch.float16)  # TF32 has its mantissa
    step = max(torch.finfo(kind).eps for kind in computed)
    return max(8 * step, 1e-4), max(8 * step, 1e-4)


class SelfTested(Exception):
    """Raised instead of the first step, with the result, where no more than the self-test was asked for."""

    def __init__(self, tested: SelfTest) -> None:
        super().__init__(tested)
        self.tested = tested


def self_test_once(
    model: PeftModel,
    loaded: LoadedRecipe,
    *,
    inputs: RunInputs,
    bf16: bool,
    checkpointing: bool,
    cache_dir: Path | None,
    say: Callable[[str], None],
    only: bool,
) -> SelfTest | None:
    """`self_test`, unless this combination has passed it before. Raises VerificationError; SelfTested with `only`.

    With several processes it is left out: their trainers gather figures from one another in every step, and not all
    would come to the same end.
    """
    if not only and is_remembered(cache_dir, combination_of(model, loaded.recipe, bf16=bf16)):
        return None
    if PartialState().num_processes > 1:
        say("self-test left out with several processes: `lorafit train RECIPE --selftest` does it in one")
        return None
    with out_of_memory_is_said(loaded, doing=lambda: "training"):
        tested = self_test(model, loaded, inputs=inputs, bf16=bf16, checkpointing=checkpointing)
    remember_passed(cache_dir, tested)
    if only:
        raise SelfTested(tested)
    say(tested.line())
    return tested


class _Bench:
    """The rows and trainers that the checks share."""

    def __init__(
        self,
        model: PeftModel,
        loaded: LoadedRecipe,
        *,
        inputs: RunInputs,
        scratch: Path,
        bf16: bool,
        checkpointing: bool,
    ) -> None:
        self._model, self._loaded, self._inputs, self._scratch = model, loaded, inputs, scratch
        self._bf16, self._checkpointing = bf16, checkpointing
        self._rows = _short_rows(inputs, model)
        self._tolerances = tolerances(loaded.recipe, dtype=model.dtype, bf16=bf16)

    def checks(self) -> Iterator[Check]:
        """What applies to this recipe."""
        one_by_one = self._gradient(per_pass=1)
        four_by_four = self._gradient(per_pass=4)
        yield self._accumulation(one_by_one, four_by_four)
        self._model.eval()
        trainer = four_by_four.trainer
        rows = self._rows[:4]
        alone = torch.cat([_log_probs(trainer, _alone(row)) for row in rows])
        together = _log_probs(trainer, trainer.data_collator(rows))
        yield self._packing(alone, together) if trainer.padding_free else self._padding(alone, together)
        with self._model.disable_adapter():
            switched_off = _log_probs(trainer, trainer.data_collator(rows))
        with _taken_out(self._model):
            base = _log_probs(trainer, trainer.data_collator(rows))
        yield self._adapter_off(base, switched_off)

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
        is_ours = attention == varlen_attention.NAME
        failure = (
            f"a packed document is not computed as it is alone, {difference:.2g} nats a token apart (at most "
            f"{self._tolerances[0]:.2g}): with {attention} attention it sees its neighbours; write false"
        )
        other = "speed.varlen_attention: false" if is_ours else "model.attn_implementation: sdpa"
        return Check("packing", difference, self._tolerances[0], "training.packing", f"{failure}, or {other}")

    def _padding(self, alone: torch.Tensor, together: torch.Tensor) -> Check:
        difference, attention = _distance(alone, together), self._attention()
        failure = (
            f"a padded row is not computed as it is alone, {difference:.2g} nats a token apart (at most "
            f"{self._tolerances[0]:.2g}): {attention} sees the padding or counts it as positions; write sdpa or eager, "
            "or training.packing: true"
        )
        return Check("padding", difference, self._tolerances[0], "model.attn_implementation", failure)

    def _adapter_off(self, base: torch.Tensor, switched_off: torch.Tensor) -> Check:
        difference, kind = _distance(base, switched_off), self._model.peft_config["default"].peft_type.value
        failure = (
            f"switched off, the {kind} adapter still moves the model by {difference:.2g} nats a token (at most "
            f"{self._tolerances[0]:.2g}), so nothing can be compared with the base; leave out lora.extra and the "
            "variant of LoRA, or change the version of peft"
        )
        return Check("adapter off", difference, self._tolerances[0], "lora", failure)

    def _attention(self) -> str:
        return str(self._model.get_base_model().config._attn_implementation)

    def _gradient(self, *, per_pass: int) -> _Step:
        """Of one optimizer step over all rows, through the trainer's own loop."""
        arguments = sft_config(
            _one_step(self._loaded.recipe, per_pass=per_pass, steps=len(self._rows) // per_pass),
            output_dir=self._scratch,
            run_name="selftest",
            bf16=self._bf16,
            gradient_checkpointing=self._checkpointing,
            use_cpu=not torch.cuda.is_available(),
            has_eval_rows=False,
        )
        step = _Step()
        health = HealthWatch(
            self._loaded.recipe, RunDir(self._scratch), say=lambda line: None, rows_of_batch=lambda batch: []
        )
        base = self._model.get_base_model()
        head = vars(base).get("forward")
        step.trainer = LoraTrainer(
            stop=StopRequest(),
            loraplus_lr_ratio=None,
            health=health,
            halving=None,
            base_name=None,
            model=self._model,
            args=arguments,
            train_dataset=Dataset.from_list(self._rows),
            processing_class=self._inputs.tokenizer,
            callbacks=[step],
        )
        if head is not None:
            base.forward = head  # the run's own, which this trainer would have put another before
        step.trainer.remove_callback(PrinterCallback)
        step.loss = step.trainer.train().training_loss
        return step


class _Step(TrainerCallback):
    """The loss and the gradient of one optimizer step."""

    trainer: LoraTrainer
    loss: float

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **_: Any
    ) -> None:
        """Take a copy, complete and before anything is done with it."""
        self.gradient = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def distance(self, other: _Step) -> float:
        """The larger of the relative differences of the loss and of the gradient."""
        apart = sum(_square(self.gradient[name] - gradient) for name, gradient in other.gradient.items()) ** 0.5
        length = sum(_square(gradient) for gradient in self.gradient.values()) ** 0.5
        of_loss = abs(self.loss - other.loss) / max(abs(self.loss), 1e-30)
        return float(torch.tensor([apart / max(length, 1e-30), of_loss]).max())  # NaN where either is


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())


def _one_step(recipe: Recipe, *, per_pass: int, steps: int) -> Recipe:
    """The recipe's training without all that does not decide what a forward and backward pass compute."""
    extra = {key: value for key, value in recipe.training.extra.items() if not key.startswith("dataloader_")}
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
        "packing": False,
        # Rows that stand for packed ones: flattened just so, and not filled up with the others. A router's balance is a
        # mean over each micro-batch, and rightly not the same for another division.
        "extra": extra | {"padding_free": recipe.training.packing, "router_aux_loss_coef": 0.0},
    }
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes), "early_stopping": None})


def _short_rows(inputs: RunInputs, model: nn.Module) -> list[dict[str, list[int]]]:
    """The last tokens of eight training rows, all of them trained on: every one is compared."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    share = FEW if parameters > 1e8 and not torch.cuda.is_available() else 1.0
    chosen, rows = inputs.data.train.select_columns("input_ids"), []
    for number, longest in enumerate(LENGTHS):
        tokens = chosen[number % len(chosen)]["input_ids"][-max(int(longest * share), 2) :]
        rows.append({"input_ids": tokens, "labels": tokens})
    return rows


def _alone(row: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """One row as the model takes it without padding, packing, mask or positions: nothing there can be wrong."""
    return {name: torch.tensor([values]) for name, values in row.items()}


@torch.no_grad()
def _log_probs(trainer: LoraTrainer, batch: dict[str, Any]) -> torch.Tensor:
    """Log-probability of each token after the first of each row, in the order of the rows, wherever they lie."""
    inputs = trainer._prepare_inputs(batch)
    with trainer.accelerator.autocast():
        outputs = trainer.model(**inputs, use_cache=False, fused_lm_head=True)
    return outputs.log_probs[outputs.label_mask.bool()].double().cpu()


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


@contextmanager
def _quick_collections() -> Iterator[None]:
    """A trainer begins with a garbage collection; over all that the libraries hold each takes longer than a check."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _switch_off_noise(model: nn.Module) -> None:
    """Dropout of every kind, and a router's jitter, which are modules or numbers of modules."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "jitter" in name):
                setattr(module, name, 0.0)


def _wake_adapter(model: nn.Module) -> None:
    """Other weights for the adapter: as it starts, with B zero, it is neutral whether it is switched off or not."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.Generator(parameter.device).manual_seed(0)
            scale = 0.1 * parameter.detach().float().square().mean().sqrt() or 0.02
            values = torch.randn(parameter.shape, generator=noise, device=parameter.device)
            parameter.data = parameter.data + (values * scale).to(parameter.dtype)
