"""A question about a recipe, answered: its peak, its speed, its disk, and what would change them."""

from __future__ import annotations

import difflib
import math
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from lorafit.builders.auto_class import auto_class
from lorafit.builders.hub_snapshot import download_command
from lorafit.builders.model_files import is_on_hub
from lorafit.errors import MachineError, ModelError, Problem, RecipeError
from lorafit.planning.ask_planner import Question
from lorafit.planning.cpu import measured as measured_cpu
from lorafit.planning.cpu import shared
from lorafit.planning.estimate import Estimate, Estimator, eval_batch, train_batch
from lorafit.planning.fitting_changes import advice, fitting
from lorafit.planning.gpus import Gpu
from lorafit.planning.known_shapes import architecture, known_shape, known_shapes
from lorafit.planning.largest_that_fit import largest_that_fit
from lorafit.planning.limits import notes, refuse_unmodelled
from lorafit.planning.plan_result import Disk, Fixed, Plan, RowsOfRun, Speed, line, surroundings
from lorafit.planning.real_step import Measurement, RealRun
from lorafit.planning.recipe_changes import changed
from lorafit.planning.roofline import ARITHMETIC, BANDWIDTH, LAUNCH, SHORTEST
from lorafit.planning.rows_of_run import rows_of_run
from lorafit.preflight import bf16_choice, refuse_what_this_machine_lacks, this_cpu, this_machine
from lorafit.recipe import Recipe
from lorafit.recipe.arithmetic import total_steps
from lorafit.recipe.sections import ModelSection
from lorafit.tasks import TASKS


def answer(question: Question) -> Plan:
    """The whole plan. Raises ModelError, AdapterError and MachineError."""
    refuse_unmodelled(question.loaded)
    if question.gpu.is_cpu:
        question = _on_this_cpu(question)
    config = _config(question)
    estimator = Estimator(question.loaded, config=config, gpu=question.gpu, count=question.count)
    recipe = question.loaded.recipe
    estimator.begin_replay(recipe)
    estimate = estimator.estimate(recipe, replay=True)
    speed = estimate.tokens_per_second
    rows = None if recipe.training.max_steps else rows_of_run(recipe, has_model=question.model_shape is None)
    steps = planned_steps(recipe, rows, count=question.count)
    wants_advice = question.with_advice and estimate.verdict != "fits"
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or recipe.training.max_length
    return Plan(
        gpu=question.gpu.name,
        is_cpu=question.gpu.is_cpu,
        memory_bytes=question.gpu.memory_bytes,
        count=question.count,
        strategy=recipe.launch.strategy,
        batch=str(estimate.batch),
        gradient_checkpointing=estimate.checkpointing,
        checkpointing_reason=estimate.checkpointing_reason,
        allocated_bytes=estimate.allocated,
        reserved_bytes=estimate.reserved,
        device_bytes=estimate.reserved + surroundings(question.gpu, question.count),
        parts=estimate.parts,
        peak_at=estimate.peak_at,
        verdict=estimate.verdict,
        fits=estimate.verdict != "does not fit",
        speed=_speed(estimate, question),
        tokens_per_second=None if speed is None else speed * question.count,
        steps=steps,
        rows=rows,
        seconds=None if steps is None else _seconds(estimate, steps),
        seconds_expected=None if steps is None else _seconds(_as_long_as_the_rows(estimator, estimate, rows), steps),
        disk=_disk(estimate, config),
        advice=advice(estimator, estimate, config=config) if wants_advice else (),
        largest=largest_that_fit(estimator, recipe, longest=longest) if question.with_largest else (),
        fixed=_fixed(estimator, estimate, config) if question.with_fix else None,
        measured_bytes=None,
        measured_seconds=None,
        notes=tuple(notes(recipe, config, gpu=question.gpu, count=question.count)),
    )


def _on_this_cpu(question: Question) -> Question:
    """Its rates measured. Raises MachineError for what no CPU trains."""
    try:
        refuse_what_this_machine_lacks(question.loaded, this_cpu())
    except MachineError as error:
        mend = Problem("--gpu", "there is no GPU here, so the CPU is planned; name one to plan for (--gpu rtx4090)")
        raise MachineError([*error.problems, mend]) from None
    return replace(question, gpu=shared(measured_cpu(question.gpu), question.count))


def measured(question: Question) -> Measurement:
    """A real step and evaluation, with random weights: what is allocated at their peak, and what the step takes.

    Raises MachineError where this machine is not what is planned for.
    """
    recipe, machine = question.loaded.recipe, this_cpu() if question.gpu.is_cpu else this_machine()
    if machine.device != "cuda" and not question.gpu.is_cpu:
        raise MachineError("there is no GPU here to run a step on", where="--measure")
    if recipe.launch.strategy != "ddp":
        raise MachineError("one process runs the step: only ddp can be measured so", where="--measure")
    run = RealRun(
        question.loaded,
        config=_config(question),
        bf16=bf16_choice(recipe.training, machine).value,
        checkpointing=recipe.training.gradient_checkpointing is True,
        device=machine.device,
    )
    passes = min(2, recipe.training.gradient_accumulation_steps)
    try:
        return run.measure(train_batch(recipe), eval_batch=eval_batch(recipe), passes=passes)
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
        raise ModelError(
            f"config.json of {section.model_name_or_path} is not on this machine: run "
            f"`{download_command(section, 'config.json')}`, or plan with --model-shape, one of "
            f"{', '.join(known_shapes())}",
            where="model.model_name_or_path",
        ) from error


def _tokens_of_step(estimate: Estimate) -> int:
    """Of one GPU."""
    return estimate.recipe.training.gradient_accumulation_steps * estimate.batch.size * estimate.batch.length


def planned_steps(recipe: Recipe, rows: RowsOfRun | None, *, count: int) -> int | None:
    """Of the whole run; None where the rows cannot be counted here, or with packing, their tokens."""
    if recipe.training.max_steps is not None:
        return recipe.training.max_steps
    if rows is None:
        return None
    if not recipe.training.is_packed:
        return total_steps(recipe, rows.rows, processes=count).value
    if rows.tokens_per_row is None:
        return None
    packed = math.ceil(rows.rows * rows.tokens_per_row / recipe.training.max_length)  # hardly a token stays empty
    return total_steps(recipe, packed, processes=count).value


def _seconds(estimate: Estimate | None, steps: int) -> float | None:
    """Of that many steps, each of batches as the estimate's."""
    if estimate is None or (speed := estimate.tokens_per_second) is None:
        return None
    return steps * _tokens_of_step(estimate) / speed


def _as_long_as_the_rows(estimator: Estimator, estimate: Estimate, rows: RowsOfRun | None) -> Estimate | None:
    """The same step with batches as long as they are in the mean."""
    if rows is None or rows.batch_length is None or estimate.recipe.training.is_packed:
        return None
    keys = {"training.max_length": round(rows.batch_length), "training.gradient_checkpointing": estimate.checkpointing}
    made = changed(estimate.recipe, keys)
    return None if made is None else estimator.estimate(made)


def _speed(estimate: Estimate, question: Question) -> Speed | None:
    one, update, gpu = estimate.one_pass, estimate.update, question.gpu
    if one is None or update is None or gpu.bf16_tflops is None or gpu.bandwidth_gb is None:
        return None
    passes = estimate.recipe.training.gradient_accumulation_steps
    tokens, seconds = _tokens_of_step(estimate), passes * one.seconds + update.seconds
    bound = "the launches take longer" if one.seconds > one.kernels else "longer than the launches"
    lines = (
        f"an operation takes max({_rates(gpu)}, {SHORTEST * 1e6:g} us); {_source_of_rates(gpu)}",
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


def _rates(gpu: Gpu) -> str:
    assert gpu.bf16_tflops is not None and gpu.fp32_tflops is not None and gpu.bandwidth_gb is not None
    if gpu.is_cpu:
        bf16, fp32 = (f"{rate * 1e3:,.0f} GFLOP/s" for rate in (gpu.bf16_tflops, gpu.fp32_tflops))
        return f"FLOPs / {bf16} ({fp32} in float32), bytes / {gpu.bandwidth_gb:,.1f} GB/s"
    return f"FLOPs / ({ARITHMETIC} x {gpu.bf16_tflops:g} TFLOP/s), bytes / ({BANDWIDTH} x {gpu.bandwidth_gb:,.0f} GB/s)"


def _source_of_rates(gpu: Gpu) -> str:
    return f"measured here just now, {torch.get_num_threads()} threads" if gpu.is_cpu else "assumed shares of the peaks"


def _disk(estimate: Estimate, config: PreTrainedConfig) -> Disk:
    with torch.device("meta"):
        weights = auto_class(TASKS[estimate.recipe.task].model).from_config(config, dtype=config.dtype or torch.float32)
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
    device = then.reserved + surroundings(estimator.gpu, estimator.count)
    said = line(
        then.verdict,
        then.allocated,
        device,
        gpu=estimator.gpu,
        speed=None if speed is None else speed * estimator.count,
    )
    return Fixed(change=changes, verdict=then.verdict, fits=then.verdict == "fits", line=said)
