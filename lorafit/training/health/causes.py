"""From what a recipe says to why a run goes wrong, and what to write instead.

Sources of the advice: LoRA's rate is about ten times that of full fine-tuning and its best hardly depends on the rank
(https://thinkingmachines.ai/blog/lora, 2025); 2e-4, a gradient norm of 0.3 and a constant scale are QLoRA's (arXiv
2305.14314); alpha = 2r is PEFT's and Microsoft's usual choice, and a scale of alpha / r shrinks with the rank (arXiv
2312.03732); B wants a higher rate than A (LoRA+, arXiv 2402.12354).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafit.tasks import DEFAULT_TASK

USUAL_RATE = 2e-4
HIGHEST_RATE = 5e-3
"""Above it no LoRA run is known to be steady; the same bound that the recipe's advice has."""


@dataclass(frozen=True)
class Setting:
    """What the rules know of a run besides its figures."""

    learning_rate: float
    warmup_steps: int
    total_steps: int
    epochs: float | None
    """None where `max_steps` decides."""
    r: int
    lora_alpha: float
    use_rslora: bool
    loraplus_lr_ratio: float | None
    max_grad_norm: float
    guessing: float
    """Loss of guessing; infinite where the loss holds more than that (AdaLoRA's penalty)."""
    is_float16: bool
    is_shuffled: bool
    guess: str = DEFAULT_TASK.guess
    """What guessing costs, in words."""

    @property
    def scale(self) -> float:
        """Multiplier of B·A·x."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True)
class Cause:
    """Why, in words, and what to type."""

    why: str
    change: str

    def __str__(self) -> str:
        return f"likely cause: {self.why}; {self.change}"


def number(value: float) -> str:
    """As one writes it in a recipe: 4e-5, 0.3, 4096."""
    if value == round(value) and abs(value) < 1e5:
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{value:.3g}" if -3 <= int(exponent) < 5 else f"{float(mantissa):g}e{int(exponent)}"


def lower_rate(setting: Setting) -> str:
    """A fifth of the learning rate, or the usual one where it is off any scale."""
    lower = setting.learning_rate / 5 if setting.learning_rate <= HIGHEST_RATE else USUAL_RATE
    return f"write training.learning_rate: {number(lower)} instead of {number(setting.learning_rate)}"


def unstable(setting: Setting, *, step: int) -> Cause:
    """Of a run whose loss or gradients grow from `step` on: the setting that is furthest from what is usual."""
    usual_scale = 16.0 if setting.use_rslora else 4.0
    excess = setting.scale / usual_scale
    rate_excess = setting.learning_rate / HIGHEST_RATE
    ratio = setting.loraplus_lr_ratio
    if excess > max(1.0, rate_excess):
        divisor = "sqrt(r)" if setting.use_rslora else "r"
        why = f"the adapter's scale is too high, lora_alpha / {divisor} = {number(setting.scale)}"
        return Cause(why, f"write lora.lora_alpha: {2 * setting.r} instead of {number(setting.lora_alpha)}")
    if rate_excess <= 1 and ratio is not None and setting.learning_rate * ratio > HIGHEST_RATE:
        why = f"B's learning rate is too high, {number(setting.learning_rate)} x {number(ratio)}"
        lower = max(1.0, ratio / 4)
        return Cause(why, f"write optimizer.loraplus_lr_ratio: {number(lower)}, or {lower_rate(setting)[6:]}")
    if rate_excess <= 1 and setting.warmup_steps == 0 and step <= max(20, setting.total_steps // 10):
        why = "there is no warm-up: the first steps are taken at the full learning rate"
        return Cause(why, f"write training.warmup_steps: 0.1, or {lower_rate(setting)[6:]}")
    if rate_excess <= 1 and setting.max_grad_norm == 0:
        why = "the learning rate is too high for gradients that are not clipped"
        return Cause(why, f"write training.max_grad_norm: 1.0, or {lower_rate(setting)[6:]}")
    return Cause("the learning rate is too high", f"{lower_rate(setting)}, or halve lora.lora_alpha")


def one_batch(setting: Setting, *, first: int, last: int) -> Cause:
    """Of a jump that came back."""
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    tighter = 0.3 if setting.max_grad_norm == 0 or setting.max_grad_norm > 0.3 else setting.max_grad_norm / 3
    change = f"look at the rows of {steps}, and write training.max_grad_norm: {number(tighter)} to bound what they do"
    return Cause("rows unlike the others (corrupted, another format or language) in one batch", change)


def wrong_scale() -> Cause:
    """Of a loss that is above guessing before anything was learned."""
    why = "the loss is scaled wrongly, or the tokenizer, template or weights are not this base's"
    return Cause(why, "compare `lorafit preview` with the base's own format; model.model_name_or_path must hold both")


def too_slow(setting: Setting) -> Cause | None:
    """The learning rate or scale, where it is too small to learn with; else None."""
    if setting.learning_rate < 2e-5:
        change = f"write training.learning_rate: {number(USUAL_RATE)} instead of {number(setting.learning_rate)}"
        return Cause("the learning rate is too low", change)
    if setting.scale < 0.05:
        why = f"the adapter's scale is too low, {number(setting.scale)}"
        return Cause(why, f"write lora.lora_alpha: {2 * setting.r} instead of {number(setting.lora_alpha)}")
    return None


def nothing_to_learn(setting: Setting) -> Cause:
    """Of a loss that does not fall though the adapter moves."""
    slow = too_slow(setting)
    if slow is not None:
        return slow
    why = "the answers do not follow from the prompts (shuffled columns, noise), or the base knows them already"
    raised = f"lora.r: {4 * setting.r} if they do" if setting.r <= 4 else "compare columns and template"
    return Cause(why, f"read some rows with `lorafit preview`; {raised}")


def no_gradient(setting: Setting) -> Cause:
    """Of a gradient norm of zero."""
    slow = too_slow(setting)
    if slow is not None and setting.scale < 0.05:
        return slow
    why = "the loss does not depend on the adapter: no trained token in the batches, or modules that the model skips"
    return Cause(why, "look at the trained tokens with `lorafit preview`, and at lora.target_modules")
