"""Merges into several bases beside the quantised model: what runs in a process of its own.

One model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import Tensor

from lorafit.builders.base_model import load_base_model
from lorafit.merging.verify_job import Difference, Job, load_model, logits
from lorafit.merging.verify_reference import untie, with_rows
from lorafit.recipe.sections import ModelSection, QuantizationSection


def compare(
    model: ModelSection, quantization: QuantizationSection, dtype: str, jobs: Mapping[str, Job]
) -> dict[str, Difference]:
    """Base to the difference of the merge into it."""
    running = _quantized_logits(model, quantization, dtype, job=next(iter(jobs.values())))
    return {onto: Difference.of(_merged_logits(job), running) for onto, job in jobs.items()}


def _quantized_logits(section: ModelSection, quantization: QuantizationSection, dtype: str, *, job: Job) -> Tensor:
    """The model as it trained: quantised, with the adapter beside it."""
    model = load_base_model(
        section,
        quantization,
        dtype=dtype,
        device_map="cuda" if torch.cuda.is_available() else None,
    )
    with_rows(model, job.rows)
    return logits(PeftModel.from_pretrained(model, job.adapter).eval(), job)


def _merged_logits(job: Job) -> Tensor:
    model, _ = load_model(job, job.base)
    with_rows(model, job.rows)
    adapted = PeftModel.from_pretrained(model, job.adapter)
    untie(adapted)
    merged = adapted.merge_and_unload()
    return logits(merged.to(getattr(torch, job.main_type)).float(), job)
