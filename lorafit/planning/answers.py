"""A question about a recipe, answered: its peak, its speed, its disk, and what would change them."""

from __future__ import annotations

import difflib

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lorafit.builders.model_files import is_on_hub
from lorafit.data import scan
from lorafit.errors import DataError, MachineError, ModelError, RecipeError
from lorafit.planning.advice import advice, fitting
from lorafit.planning.answer import Disk, Fixed, Plan, Speed, line, surroundings
from lorafit.planning.estimate import Estimate, Estimator, eval_batch, train_batch
from lorafit.planning.known_shapes import architecture, known_shape, known_shapes
from lorafit.planning.largest import largest_that_fit
from lorafit.planning.plan import Question
from lorafit.planning.real_step import RealRun
from lorafit.planning.roofline import ARITHMETIC, BANDWIDTH, LAUNCH, SHORTEST
from lorafit.planning.unmodelled import notes, refuse_unmodelled
from lorafit.preflight import bf16_choice, this_machine
from lorafit.recipe import Recipe
from lorafit.recipe.arithmetic import total_steps
from lorafit.recipe.sections import ModelSection


def answer(question: Question) -> Plan:
    """The whole plan. Raises ModelError, AdapterError and MachineError."""
    refuse_unmodelled(question.loaded)
    config = _config(question)
    estimator = Estimator(question.loaded, config=config, gpu=question.gpu, count=question.count)
    recipe = question.loaded.recipe
    estimate = estimator.estimate(recipe, replay=True)
    speed = estimate.tokens_per_second
    steps = _steps(recipe, count=question.count)
    step_seconds = None if speed is None else _tokens_of_step(estimate) / speed
    wants_advice = question.with_advice and estimate.verdict != "fits"
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or recipe.training.max_length
    return Plan(
        gpu=question.gpu.name,
        memory_bytes=question.gpu.memory_bytes,
        count=question.count,
        strategy=recipe.launch.strategy,
        batch=str(estimate.batch),
        gradient_checkpointing=estimate.checkpointing,
        checkpointing_reason=estimate.checkpointing_reason,
        allocated_bytes=estimate.allocated,
        reserved_bytes=estimate.reserved,
        device_bytes=estimate.reserved + surroundings(question.count),
        parts=estimate.parts,
        peak_at=estimate.peak_at,
        verdict=estimate.verdict,
        fits=estimate.verdict != "does not fit",
        speed=_speed(estimate, question),
        tokens_per_second=None if speed is None else speed * question.count,
        steps=steps,
        seconds=None if steps is None or step_seconds is None else steps * step_seconds,
        disk=_disk(estimate, config),
        advice=advice(estimator, estimate, config=config) if wants_advice else (),
        largest=largest_that_fit(estimator, recipe, longest=longest) if question.with_largest else (),
        fixed=_fixed(estimator, estimate, config) if question.with_fix else None,
        measured_bytes=None,
        notes=tuple(notes(recipe, config, count=question.count)),
    )


def measured(question: Question) -> int:
    """Bytes allocated at the peak of a real step and evaluation, with random weights, on this machine's GPU.

    Raises MachineError where there is none.
    """
    recipe, machine = question.loaded.recipe, this_machine()
    if machine.device != "cuda":
        raise MachineError("there is no GPU here to run a step on", where="--measure")
    if recipe.launch.strategy != "ddp":
        raise MachineError("one process runs the step: only ddp can be measured so", where="--measure")
    run = RealRun(
        question.loaded,
        config=_config(question),
        bf16=bf16_choice(recipe.training, machine).value,
        checkpointing=recipe.training.gradient_checkpointing is True,
        device="cuda",
    )
    passes = min(2, recipe.training.gradient_accumulation_steps)
    try:
        return run.measure(train_batch(recipe), eval_batch=eval_batch(recipe), passes=passes).allocated
    except torch.OutOfMemoryError as error:
        raise MachineError(f"the step does not fit: {str(error).splitlines()[0]}", where="--measure") from error


def _config(question: Question) -> PreTrainedConfig:
    """Of a shipped shape, or of config.json in a directory or in the Hub's cache; nothing is downloaded."""
    section = question.loaded.recipe.model
    if question.model_shape is not None:
        if known_shape(question.model_shape) is None:
            near = difflib.get_close_matches(question.model_shape, known_shapes(), n=1, cutoff=0.4)
            mend = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(known_shapes())}"
            raise RecipeError(f"{question.model_shape!r} is not a shape that is shipped; {mend}", where="--model-shape")
        return architecture(ModelSection(model_name_or_path=question.model_shape))
    if not is_on_hub(section):
        return architecture(section)
    try:
        return architecture(section.model_copy(update={"extra": {**section.extra, "local_files_only": True}}))
    except ModelError as error:
        name = section.model_name_or_path
        raise ModelError(
            f"config.json of {name} is not on this machine: run `hf download {name} config.json`, or plan with "
            f"--model-shape, one of {', '.join(known_shapes())}",
            where="model.model_name_or_path",
        ) from error


def _tokens_of_step(estimate: Estimate) -> int:
    """Of one GPU."""
    return estimate.recipe.training.gradient_accumulation_steps * estimate.batch.size * estimate.batch.length


def _steps(recipe: Recipe, *, count: int) -> int | None:
    """None where the rows cannot be counted without a tokenizer (packing), the Hub, or at all."""
    if recipe.training.max_steps is not None:
        return recipe.training.max_steps
    if recipe.training.packing:
        return None
    try:
        data = scan(recipe.data, seed=recipe.training.seed)
    except DataError:
        return None
    return None if data.skipped_hub else total_steps(recipe, data.train_rows, processes=count).value


def _speed(estimate: Estimate, question: Question) -> Speed | None:
    one, update, gpu = estimate.one_pass, estimate.update, question.gpu
    if one is None or update is None or gpu.bf16_tflops is None or gpu.bandwidth_gb is None:
        return None
    passes = estimate.recipe.training.gradient_accumulation_steps
    tokens, seconds = _tokens_of_step(estimate), passes * one.seconds + update.seconds
    bound = "the launches take longer" if one.seconds > one.kernels else "longer than the launches"
    lines = (
        f"an operation takes max(FLOPs / ({ARITHMETIC} x {gpu.bf16_tflops:g} TFLOP/s), "
        f"bytes / ({BANDWIDTH} x {gpu.bandwidth_gb:,.0f} GB/s), {SHORTEST * 1e6:g} us); assumed shares of the peaks",
        f"one pass: {one.launches:,.0f} operations, {one.flops / 1e12:,.1f} TFLOP, {one.kernels:.4g} s of kernels, "
        f"{one.launches * LAUNCH:.4g} s of launches at {LAUNCH * 1e6:g} us: {bound}",
        f"one step: {passes} x {one.seconds:.4g} s + {update.seconds:.4g} s of update = {seconds:.4g} s for {tokens:,} "
        f"tokens = {tokens / seconds:,.0f} tokens/s"
        + (f", on {question.count} GPUs {tokens / seconds * question.count:,.0f}" if question.count > 1 else ""),
    )
    return Speed(
        tokens_per_second=tokens / seconds * question.count,
        pass_seconds=one.seconds,
        update_seconds=update.seconds,
        model_flops_utilization=one.flops / one.seconds / (gpu.bf16_tflops * 1e12),
        arithmetic=lines,
    )


def _disk(estimate: Estimate, config: PreTrainedConfig) -> Disk:
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    states = estimate.parts.get("optimizer", 0)
    return Disk(
        base_bytes=sum(parameter.nbytes for parameter in weights.parameters()),
        adapter_bytes=estimate.trained_bytes,
        checkpoint_bytes=estimate.trained_bytes + states,
        checkpoints=estimate.recipe.checkpoints.keep + 1,  # an old one goes when the new one is whole
    )


def _fixed(estimator: Estimator, estimate: Estimate, config: PreTrainedConfig) -> Fixed:
    changes, then = fitting(estimator, estimate, config=config)
    speed = then.tokens_per_second
    device = then.reserved + surroundings(estimator.count)
    said = line(
        then.verdict,
        then.allocated,
        device,
        gpu=estimator.gpu,
        speed=None if speed is None else speed * estimator.count,
    )
    return Fixed(change=changes, verdict=then.verdict, fits=then.verdict == "fits", line=said)
