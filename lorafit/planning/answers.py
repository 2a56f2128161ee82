"""A question about a recipe, answered: its peak, its speed, its disk, and what would change them."""

from __future__ import annotations

from transformers import PreTrainedConfig

from lorafit.builders.model_files import is_on_hub
from lorafit.errors import ModelError
from lorafit.planning.answer import Disk, Plan, surroundings
from lorafit.planning.estimate import Estimate, Estimator
from lorafit.planning.known_shapes import architecture, known_shapes
from lorafit.planning.plan import Question
from lorafit.recipe.sections import ModelSection


def answer(question: Question) -> Plan:
    """The whole plan. Raises ModelError and AdapterError."""
    config = _config(question)
    estimator = Estimator(question.loaded, config=lambda recipe: config, gpu=question.gpu, count=question.count)
    estimate = estimator.estimate(question.loaded.recipe, replay=True)
    return _plan(question, estimate, config)


def _config(question: Question) -> PreTrainedConfig:
    """Of a shipped shape, or of config.json in a directory or in the Hub's cache; nothing is downloaded."""
    section = question.loaded.recipe.model
    if question.model_shape is not None:
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


def _plan(question: Question, estimate: Estimate, config: PreTrainedConfig) -> Plan:
    recipe, speed = estimate.recipe, estimate.tokens_per_second
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
        speed=None,
        tokens_per_second=None if speed is None else speed * question.count,
        steps=None,
        seconds=None,
        disk=Disk(0, 0, 0, 0),
        advice=(),
        largest=(),
        notes=(),
    )
