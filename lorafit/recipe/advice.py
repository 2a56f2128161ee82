"""Advice: the recipe is legal, but likely not what is wanted. One function each, silenced by its name."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lorafit.recipe.recipe import Recipe


@dataclass(frozen=True)
class Advice:
    """One piece of advice."""

    name: str
    """What `silence: [...]` takes."""
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message} (silence: [{self.name}])"


def advise(recipe: Recipe, *, train_rows: int | None = None) -> tuple[Advice, ...]:
    """What a colleague would say about `recipe`, but for what it silences. `train_rows` where they are counted."""
    found = (Advice(name, *said) for name, advice in _ADVICE.items() for said in advice(recipe, train_rows))
    return tuple(advice for advice in found if advice.name not in recipe.silence)


Said = Iterator[tuple[str, str]]


def _low_learning_rate(recipe: Recipe, _: int | None) -> Said:
    """LoRA's best rate is about ten times that of full fine-tuning, whatever the model's size."""
    rate = recipe.training.learning_rate
    if rate < 5e-5:
        yield "training.learning_rate", f"{rate:g} is a rate for full fine-tuning; LoRA usually wants 1e-4 to 4e-4"


def _high_learning_rate(recipe: Recipe, _: int | None) -> Said:
    rate = recipe.training.learning_rate
    if rate > 5e-3:
        yield "training.learning_rate", f"{rate:g} is far above what LoRA runs bear; usual are 1e-4 to 4e-4"


def _alpha(recipe: Recipe, _: int | None) -> Said:
    lora = recipe.lora
    if lora.lora_alpha is None:
        return
    if lora.use_rslora:
        scale, formula, high = lora.lora_alpha / math.sqrt(lora.r), f"{lora.lora_alpha} / sqrt({lora.r})", 16.0
    else:
        scale, formula, high = lora.lora_alpha / lora.r, f"{lora.lora_alpha} / {lora.r}", 4.0
    if not 0.25 <= scale <= high:
        message = f"the adapter is scaled by {formula} = {scale:.3g}; usual are 0.25 to {high:g}"
        yield "lora.lora_alpha", f"{message}, and the learning rate must make up for it"


def _many_epochs(recipe: Recipe, train_rows: int | None) -> Said:
    training = recipe.training
    if training.max_steps is not None:
        return
    few = train_rows is not None and train_rows < 1000
    if training.num_train_epochs > (3 if few else 5):
        rows = f" over {train_rows:,} rows" if train_rows is not None else ""
        message = f"{training.num_train_epochs:g} epochs{rows} are learnt by heart"
        yield "training.num_train_epochs", f"{message}; hold rows out and add early_stopping, or write 1 to 3"


def _epochs_overridden(recipe: Recipe, _: int | None) -> Said:
    training = recipe.training
    if training.max_steps is not None and "num_train_epochs" in training.model_fields_set:
        yield "training.num_train_epochs", f"max_steps {training.max_steps} decides; num_train_epochs is not used"


def _fp16(recipe: Recipe, _: int | None) -> Said:
    if recipe.training.fp16:
        message = "float16 overflows where bfloat16 does not; write bf16: auto unless the GPU is older than Ampere"
        yield "training.fp16", message


def _dropout(recipe: Recipe, _: int | None) -> Said:
    if recipe.lora.lora_dropout > 0:
        yield "lora.lora_dropout", f"{recipe.lora.lora_dropout:g} keeps faster paths from being used, and helps rarely"


def _checkpointing(recipe: Recipe, _: int | None) -> Said:
    training = recipe.training
    tokens = training.max_length * training.per_device_train_batch_size
    arithmetic = f"{training.max_length} x {training.per_device_train_batch_size} = {tokens:,} tokens a forward pass"
    if training.gradient_checkpointing is True and tokens <= 2048:
        yield "training.gradient_checkpointing", f"costs about 1.45 times the FLOPs; {arithmetic} rarely need it"
    if training.gradient_checkpointing is False and tokens >= 8192:
        yield "training.gradient_checkpointing", f"off, the activations of {arithmetic} are all kept; auto decides"


def _random_start(recipe: Recipe, _: int | None) -> Said:
    if recipe.lora.init_lora_weights is False:
        yield "lora.init_lora_weights", "false starts with a random change of the base model; true starts with none"


def _base_bias(recipe: Recipe, _: int | None) -> Said:
    if recipe.lora.bias != "none":
        message = f"{recipe.lora.bias} trains biases of the base: switching the adapter off no longer gives the base"
        yield "lora.bias", message


def _no_held_out_rows(recipe: Recipe, _: int | None) -> Said:
    if not recipe.data.eval and recipe.data.eval_fraction is None:
        message = "no held-out rows: nothing will show whether the adapter generalises; e.g. data.eval_fraction: 0.05"
        yield "data.eval", message


def _unpinned_code(recipe: Recipe, _: int | None) -> Said:
    model = recipe.model
    if model.trust_remote_code and model.revision == "main":
        yield "model.trust_remote_code", "runs whatever code main holds that day; pin model.revision to a commit"


_ADVICE: dict[str, Callable[[Recipe, int | None], Said]] = {
    "low-learning-rate": _low_learning_rate,
    "high-learning-rate": _high_learning_rate,
    "alpha": _alpha,
    "many-epochs": _many_epochs,
    "epochs-overridden": _epochs_overridden,
    "fp16": _fp16,
    "dropout": _dropout,
    "checkpointing": _checkpointing,
    "random-start": _random_start,
    "base-bias": _base_bias,
    "no-held-out-rows": _no_held_out_rows,
    "unpinned-code": _unpinned_code,
}
ADVICE_NAMES = frozenset((*_ADVICE, "positions", "experts"))
"""What `silence` takes; `positions` and `experts` are given where the base is read."""
