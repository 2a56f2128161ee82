"""The rules of health: pure functions of the figures logged so far. Each sees the newest figure and says what it finds.

Levels and noise are medians and median deviations over windows (history.py), so one odd step changes neither; the
fixed bounds are far from what healthy runs show and stated with each rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean, median

from lorafit.training.health.causes import (
    Cause,
    Setting,
    lower_rate,
    no_gradient,
    nothing_to_learn,
    number,
    one_batch,
    too_slow,
    unstable,
    wrong_scale,
)
from lorafit.training.health.history import (
    MEMORY,
    SUSTAINED,
    WINDOW,
    History,
    highest_healthy,
    jump,
    lowest_level,
    noise,
)


@dataclass(frozen=True)
class Finding:
    """What one rule found."""

    rule: str
    """The key of `health` that decides on it."""
    what: str
    cause: Cause
    figures: dict[str, float] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    """Rows of data (`file:line`) that it is about, where they are known."""

    def __str__(self) -> str:
        more = f" and {len(self.rows) - 8} more" if len(self.rows) > 8 else ""
        rows = f"; rows {', '.join(self.rows[:8])}{more}" if self.rows else ""
        return f"{self.what}{rows}; {self.cause}"


Rule = Callable[[History, Setting], Finding | None]


def divergence(history: History, setting: Setting) -> Finding | None:
    """Three logged losses in a row above all that is healthy by the losses before, or above the first and guessing.

    Rows in the order of their files may change from one kind to another: then three times the rise is asked for.
    """
    losses = history.losses
    if len(losses) < SUSTAINED:
        return None
    newest = losses[-SUSTAINED:]
    figures = {"loss": round(median(newest), 4)}
    if min(losses[0], *newest) > 2 * setting.guessing and len(losses) <= WINDOW:
        what = f"the loss began at {losses[0]:.3g}, guessing costs {setting.guessing:.3g} ({setting.guess})"
        return Finding("on_divergence", what, wrong_scale(), figures | {"guessing": round(setting.guessing, 4)})
    earlier = losses[:-SUSTAINED]
    if not earlier:
        return None
    limit, best = highest_healthy(earlier), lowest_level(earlier)
    if not setting.is_shuffled:
        limit += 2 * (limit - best)
    if min(newest) <= min(limit, max(losses[0], setting.guessing) + 0.5):
        return None
    first = history.points[-SUSTAINED].step
    what = f"the loss has been above {min(newest):.3g} since step {first} and was {best:.3g} at its lowest"
    return Finding("on_divergence", what, unstable(setting, step=first), figures | {"lowest": round(best, 4)})


def spike(history: History, setting: Setting) -> Finding | None:
    """A loss that jumped by 1 nat, a half and 8 deviations, and came back within two logged steps."""
    losses = [point.loss for point in history.points]
    if not all(map(math.isfinite, losses[-WINDOW:])):
        return None
    seen = jump(losses[-2 * WINDOW :], least_rise=lambda level: max(1.0, level / 2))
    if seen is None or not seen.is_over:
        return None
    first, last = _steps_of(history, seen.first + max(0, len(losses) - 2 * WINDOW))
    what = f"the loss jumped from {seen.level:.3g} to {seen.height:.3g} at step {last} and came back"
    figures = {"loss": round(seen.height, 4), "level": round(seen.level, 4)}
    return Finding("on_spike", what, one_batch(setting, first=first, last=last), figures)


def exploding_gradient(history: History, setting: Setting) -> Finding | None:
    """A gradient norm above twenty times its median, or three in a row above 1000 times what clipping leaves."""
    newest = _norms(history, last=SUSTAINED)
    bound = 1000 * (setting.max_grad_norm or 1.0)
    if len(newest) == SUSTAINED and min(newest) > bound:
        what = f"the gradient norm is {number(newest[-1])}, clipped to {number(setting.max_grad_norm or math.inf)}"
        cause = unstable(setting, step=history.points[-SUSTAINED].step)
        if history.points[0].grad_norm in newest and history.losses[0] > 2 * setting.guessing:
            cause = wrong_scale()
        return Finding("on_exploding_gradient", what, cause, {"grad_norm": newest[-1]})
    recent = [point.grad_norm or 0.0 for point in history.points[-2 * WINDOW :]]
    if not all(0 < norm < math.inf for norm in recent):
        return None
    logs = [math.log(norm) for norm in recent]
    seen = jump(logs, least_rise=lambda _: math.log(20))
    if seen is None:
        return None
    index = seen.first + len(history.points) - len(logs)
    level, height = math.exp(seen.level), math.exp(seen.height)
    _, last = _steps_of(history, index)
    cause = one_batch(setting, first=last, last=last) if seen.is_over else unstable(setting, step=last)
    ended = "and came back" if seen.is_over else "and stays there"
    what = f"the gradient norm jumped from {number(level)} to {number(height)} at step {last} {ended}"
    return Finding("on_exploding_gradient", what, cause, {"grad_norm": height, "level": level})


def vanishing_gradient(history: History, setting: Setting) -> Finding | None:
    """Three gradient norms in a row below 1e-7, or 1e-4 of the first twenty's median while the loss is still high."""
    norms = _norms(history, last=SUSTAINED)
    if len(norms) < SUSTAINED:
        return None
    largest = max(norms)
    first = [norm for point in history.points[:WINDOW] if (norm := point.grad_norm) and math.isfinite(norm)]
    usual = median(first) if first else 0.0
    losses = history.losses
    is_high = bool(losses) and median(losses[-SUSTAINED:]) > 0.5 * median(losses[:WINDOW])
    if largest >= 1e-7 and not (is_high and len(history.points) > WINDOW and largest < 1e-4 * usual):
        return None
    figures = {"grad_norm": largest, "usual": usual}
    since = history.points[-SUSTAINED].step
    what = f"the gradient norm has been at most {number(largest)} since step {since}"
    return Finding("on_vanishing_gradient", what, no_gradient(setting), figures)


def plateau(history: History, setting: Setting) -> Finding | None:
    """Thirty logged steps and a fifth of the run in, the loss is where it began: within 1 %, and surely within 5 %.

    Noise that would hide a fall of 5 % keeps it quiet, and so does a held-out loss that fell by 3 %.
    """
    losses = history.losses
    if len(losses) < 30:
        return None
    step = history.points[-1].step
    if step < 0.2 * setting.total_steps or history.points[-WINDOW].step <= setting.warmup_steps:
        return None
    start, now = max(losses[0], fmean(losses[:3])), fmean(losses[-10:])
    fall = start - now
    held_out = [evaluation.loss for evaluation in history.evaluations]
    if start < 0.05 or not -0.05 * start < fall < 0.01 * start or (held_out and held_out[-1] < 0.97 * held_out[0]):
        return None
    error = noise(losses[-MEMORY:]) * math.sqrt(1 / 3 + 1 / 10)
    if fall + 2 * error > 0.05 * start:
        return None
    what = f"the loss is {now:.4g} after {step} steps and was {start:.4g} at the start"
    return Finding("on_plateau", what, nothing_to_learn(setting), {"loss": round(now, 4), "start": round(start, 4)})


def overfitting(history: History, setting: Setting) -> Finding | None:
    """Two held-out losses above the lowest, the last by 2 %, or one by 10 %, while the training loss fell by 2 %."""
    held_out = history.evaluations
    if len(held_out) < 3:
        return None
    best = min(held_out, key=lambda evaluation: evaluation.loss)
    after = [evaluation.loss for evaluation in held_out if evaluation.step > best.step]
    if not after:
        return None
    ratio = after[-1] / best.loss
    is_rising = ratio > 1.1 or (len(after) > 1 and min(after[-2:]) > best.loss and ratio > 1.02)
    losses = [(point.step, point.loss) for point in history.points]
    then = [loss for step, loss in losses if step <= best.step][-5:]
    now = [loss for step, loss in losses if step > best.step][-5:]
    if not is_rising or not then or not now or median(now) > 0.98 * median(then):
        return None
    what = (
        f"the held-out loss rose from {best.loss:.4g} at step {best.step} to {after[-1]:.4g} while the training loss "
        f"fell from {median(then):.4g} to {median(now):.4g}"
    )
    figures = {"eval_loss": after[-1], "lowest": best.loss, "lowest_step": float(best.step), "loss": median(now)}
    return Finding("on_overfitting", what, _learnt_by_heart(setting, best.step, best.epoch), figures)


def _learnt_by_heart(setting: Setting, step: int, epoch: float) -> Cause:
    stop = "add early_stopping: {patience: 2} to keep the best adapter"
    if setting.epochs is None:
        return Cause("the rows are learnt by heart", f"write training.max_steps: {max(step, 1)}, or {stop}")
    fewer = number(max(round(epoch, 1), 0.1))
    change = f"write training.num_train_epochs: {fewer} instead of {number(setting.epochs)}, or {stop}"
    return Cause("the rows are learnt by heart", change)


@dataclass(frozen=True)
class Movement:
    """How far the B matrices of the adapter are from where they started (E of AdaLoRA, whose B starts at random)."""

    steps: int
    still: tuple[str, ...]
    """Those that have not moved at all."""
    count: int
    largest: float
    """Largest root mean square change of a matrix."""
    may_be_pruned: bool
    """AdaLoRA sets what it prunes back to zero."""


def zero_b(movement: Movement, history: History, setting: Setting) -> Finding | None:
    """A B that has not moved in ten steps, or all of them so slowly that the whole run will not move them by 1e-5.

    At 1e-5 an update of rank 16 is 1e-4 of what it is added to, below what bfloat16 can tell apart.
    """
    if movement.steps < 10 or not movement.count:
        return None
    reach = movement.largest * setting.total_steps / movement.steps
    is_still = len(movement.still) == movement.count if movement.may_be_pruned else bool(movement.still)
    figures = {"still": float(len(movement.still)), "of": float(movement.count), "largest_change": movement.largest}
    if not is_still and reach >= 1e-5:
        return None
    norms = [norm for norm in _norms(history, last=SUSTAINED) if norm > 0]
    if is_still:
        what = f"after {movement.steps} steps {len(movement.still)} of {movement.count} B matrices have not moved"
        what += f" ({', '.join(movement.still[:2])}{' ...' if len(movement.still) > 2 else ''})"
    else:
        what = f"after {movement.steps} steps no B matrix has moved by more than {number(movement.largest)}"
    cause = too_slow(setting)
    if cause is None and (not norms or max(norms) < 1e-7):
        cause = no_gradient(setting)
    if cause is None:
        why = "the optimizer does not move these B matrices: they are frozen, or their learning rate is 0"
        cause = Cause(why, "look at lora.target_modules, optimizer.loraplus_lr_ratio and training.lr_scheduler_kwargs")
    return Finding("on_zero_b", what, cause, figures)


@dataclass(frozen=True)
class Weights:
    """What the weights show once something is not finite."""

    broken_base: str | None
    """A weight of the base that is not finite."""
    broken_adapter: str | None
    largest: float
    """Largest root mean square of an adapter weight."""


def not_finite(found: str, rows: list[str], *, weights: Weights, history: History, setting: Setting) -> Finding:
    """Why a loss or gradient norm is not finite: the base, the number format, an unstable run, or the rows."""
    points = history.points[-WINDOW:]
    losses = [point.loss for point in points]
    norms = [norm for norm in _norms(history, last=WINDOW) if norm > 0]
    is_wild = len(losses) > 1 and losses[-1] > highest_healthy(losses[:-1])
    is_steep = len(norms) > 1 and norms[-1] > 20 * median(norms[:-1])
    step = history.points[-1].step if history.points else 0
    if weights.broken_base is not None:
        mend = "fetch the base again, or write model.dtype: float32 if it overflows when it is read"
        cause = Cause(f"weights of the base are not finite ({weights.broken_base})", mend)
    elif weights.broken_adapter is not None or weights.largest > 1 or is_wild or is_steep:
        cause = unstable(setting, step=step)
    elif setting.is_float16:
        mend = "write model.dtype: bfloat16 and training.bf16: auto, or float32 on GPUs without bfloat16"
        cause = Cause("float16 overflows above 65504", mend)
    else:
        why = "these rows, or what the model makes of them, in a run that was healthy until then"
        cause = Cause(why, f"look at them with `lorafit preview` and take them out, or {lower_rate(setting)}")
    return Finding("on_nan", found, cause, rows=tuple(rows))


RULES: tuple[Rule, ...] = (divergence, exploding_gradient, spike, vanishing_gradient, plateau, overfitting)
"""In the order in which they are asked. What comes first explains the rest: one finding a logged step."""


def _norms(history: History, *, last: int) -> list[float]:
    recent = [point.grad_norm for point in history.points[-last:]]
    return [norm for norm in recent if norm is not None and math.isfinite(norm)]


def _steps_of(history: History, index: int) -> tuple[int, int]:
    """First and last step that the logged point at `index` speaks of."""
    before = history.points[index - 1].step if index else 0
    return before + 1, history.points[index].step
