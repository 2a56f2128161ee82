"""The peak memory and the speed of one variant of a recipe; runs in a process that plans."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from lorafit import operating_system
from lorafit.launching import fork
from lorafit.planning.extrapolate_layers import WholeStep, begin_replay, whole_step
from lorafit.planning.fake_step import Batch, FakeRun, Rows
from lorafit.planning.gpus import Gpu
from lorafit.planning.plan_result import Verdict, surroundings, verdict
from lorafit.planning.roofline import Duration, duration
from lorafit.preflight import Machine, bf16_choice, checkpointing_choice, dtype_choice
from lorafit.recipe import LoadedRecipe, Recipe

LOADING = "loading the base model"
NO_CHECKPOINTING_BELOW = 0.85
"""`gradient_checkpointing: auto` is off when the peak without it stays under this share of the memory."""
ONLY_READ = {
    *("max_length", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "max_steps", "learning_rate", "warmup_steps", "gradient_checkpointing"),
}
"""Keys of `training` that change what a step reads, not what it runs: one built model answers for all their values."""


@dataclass(frozen=True)
class Estimate:
    """One variant on one GPU."""

    recipe: Recipe
    checkpointing: bool
    checkpointing_reason: str
    batch: Batch
    allocated: int
    reserved: int
    parts: dict[str, int]
    peak_at: str
    verdict: Verdict
    trained_bytes: int
    one_pass: Duration | None
    """None where the GPU's rates are not known."""
    update: Duration | None

    @property
    def tokens_per_second(self) -> float | None:
        """Of one GPU, of batches that are all as long as they may be."""
        if self.one_pass is None or self.update is None:
            return None
        passes = self.recipe.training.gradient_accumulation_steps
        return passes * self.batch.size * self.batch.length / (passes * self.one_pass.seconds + self.update.seconds)


class Estimator:
    """Answers for variants of one recipe, and keeps the models it has built."""

    def __init__(self, loaded: LoadedRecipe, *, config: PreTrainedConfig, gpu: Gpu, count: int) -> None:
        self._loaded = loaded
        self._config = config
        self.gpu = gpu
        self.count = count
        self._runs: dict[tuple[str, bool], FakeRun] = {}
        self._steps: dict[tuple[str, bool, bool], WholeStep] = {}

    def estimate(self, recipe: Recipe, *, replay: bool = False) -> Estimate:
        """With checkpointing as the recipe says; `auto` is off where the step fits well without it.

        `replay` looks at what the allocator reserves; otherwise it is taken to be what is allocated.
        """
        wanted = recipe.training.gradient_checkpointing
        if self.gpu.is_cpu:
            choice = checkpointing_choice(recipe.training, self._machine())
            return self._estimate(recipe, choice.value, choice.reason, replay=False)
        if wanted != "auto":
            return self._estimate(recipe, wanted, "training.gradient_checkpointing", replay=replay)
        without = self._estimate(recipe, False, "", replay=False)
        share = without.allocated / self.gpu.memory_bytes
        is_on = share >= NO_CHECKPOINTING_BELOW or without.verdict != "fits"
        limit = f"{'above' if share >= NO_CHECKPOINTING_BELOW else 'under'} {NO_CHECKPOINTING_BELOW:.0%}"
        said = f"the planned peak without it is {share:.0%} of the GPU's memory, {limit}"
        if is_on and share < NO_CHECKPOINTING_BELOW:
            said += f", but {without.verdict} beside what CUDA takes"
        return self._estimate(recipe, is_on, said, replay=replay)

    def begin_replay(self, recipe: Recipe) -> None:
        """Begin what the first estimate with `replay` waits for longest, where it can run beside the rest of it."""
        is_spread = self.count > 1 and recipe.launch.strategy == "fsdp2"
        has_room = operating_system.usable_cores() > 1 and fork.is_safe_without_torch_threads()
        if self.gpu.is_cpu or is_spread or self._runs or not has_room:
            return
        run = self._run(recipe, checkpointing=recipe.training.gradient_checkpointing is True)
        begin_replay(run, train_batch(recipe), eval_batch=eval_batch(recipe), passes=_passes(recipe))

    def _estimate(self, recipe: Recipe, checkpointing: bool, reason: str, *, replay: bool) -> Estimate:
        step = self._step(recipe, checkpointing=checkpointing, replay=replay)
        run = self._run(recipe, checkpointing=checkpointing)
        parts = dict(step.peak.parts)
        if self.count > 1 and recipe.launch.strategy == "ddp":
            # One copy of all gradients, in the buckets that the processes exchange.
            parts["communication buffers"] = run.trained_bytes
        label = step.label
        if self.count > 1 and recipe.launch.strategy == "fsdp2" and recipe.quantization is not None:
            whole = _whole_base(parts, self.count)
            if sum(whole.values()) > sum(parts.values()):
                parts, label = whole, LOADING
        allocated = sum(parts.values())
        reserved = allocated + step.reserved - step.peak.total
        parts["reserve"] = reserved - allocated + surroundings(self.gpu, self.count)
        has_rates = self.gpu.bf16_tflops is not None
        return Estimate(
            recipe=recipe,
            checkpointing=checkpointing,
            checkpointing_reason=reason,
            batch=train_batch(recipe),
            allocated=allocated,
            reserved=reserved,
            parts=parts,
            peak_at=label,
            verdict=verdict(allocated, reserved, gpu=self.gpu, count=self.count),
            trained_bytes=run.trained_bytes,
            one_pass=duration(step.work["pass"], self.gpu) if has_rates else None,
            update=duration(step.work["update"], self.gpu) if has_rates else None,
        )

    def _step(self, recipe: Recipe, *, checkpointing: bool, replay: bool) -> WholeStep:
        key = recipe.model_dump_json(), checkpointing, replay
        if key not in self._steps:
            self._steps[key] = whole_step(
                self._run(recipe, checkpointing=checkpointing),
                train_batch(recipe),
                eval_batch=eval_batch(recipe),
                passes=_passes(recipe),
                replay=replay,
            )
        return self._steps[key]

    def _run(self, recipe: Recipe, *, checkpointing: bool) -> FakeRun:
        key = recipe.model_dump_json(exclude={"training": ONLY_READ, "data": True}), checkpointing
        if key not in self._runs:
            machine = self._machine()
            is_spread = self.count > 1 and recipe.launch.strategy == "fsdp2"
            self._runs[key] = FakeRun(
                replace(self._loaded, recipe=_held_as(recipe, machine)),
                config=copy.deepcopy(self._config),
                bf16=bf16_choice(recipe.training, machine).value or recipe.training.fp16,
                checkpointing=checkpointing,
                on_cuda=not self.gpu.is_cpu,
                spread=self.count if is_spread else 1,
            )
        return self._runs[key]

    def _machine(self) -> Machine:
        device, gpus = ("cpu", 0) if self.gpu.is_cpu else ("cuda", self.count)
        return Machine(device, self.gpu.name, gpus, self.gpu.has_bf16, self.gpu.memory_bytes)


def _whole_base(parts: Mapping[str, int], count: int) -> dict[str, int]:
    """What each of `count` GPUs holds of a quantised base before FSDP2 shares it out.

    transformers puts 4-bit weights on the GPU of each process, and accelerate takes them from there, whole:
    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/fsdp_utils.py (fsdp2_prepare_model).
    Scales are never shared out.
    """
    return {"weights": parts["weights"] * count, "quantization state": parts.get("quantization state", 0)}


def _held_as(recipe: Recipe, machine: Machine) -> Recipe:
    """With the type that the base is held in on a CPU without bfloat16."""
    choice = dtype_choice(recipe, machine) if machine.device == "cpu" else None
    if choice is None:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": choice.value})})


def _passes(recipe: Recipe) -> int:
    """From the second on all are alike."""
    return min(2, recipe.training.gradient_accumulation_steps)


def train_batch(recipe: Recipe) -> Batch:
    """The largest that one forward pass of training reads."""
    return _batch(recipe, recipe.training.per_device_train_batch_size)


def eval_batch(recipe: Recipe) -> Batch | None:
    """The largest of an evaluation; None without held-out rows."""
    has_rows = bool(recipe.data.eval) or recipe.data.eval_fraction is not None
    return _batch(recipe, recipe.training.per_device_eval_batch_size) if has_rows else None


def _batch(recipe: Recipe, size: int) -> Batch:
    """The worst case: rows of `max_length`, and among several one that is shorter, so that they need a mask."""
    rows: Rows = "packed" if recipe.training.is_packed else "padded" if size > 1 else "full"
    return Batch(rows, size, recipe.training.max_length)
