"""Merges into several bases beside the quantised model: `python -m lorafit.merging.compare_bases JOB.json`.

One model is in memory at a time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lorafit.builders.adapter import keep_backward_on_cpu
from lorafit.builders.base_model import load_base_model
from lorafit.merging.verify_job import Difference, Job, load_model, logits, settle_process
from lorafit.merging.verify_reference import untie, with_rows
from lorafit.recipe.sections import ModelSection, QuantizationSection


def compare(told: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Base to the difference of the merge into it."""
    jobs = {onto: Job(**job) for onto, job in told["jobs"].items()}
    running = _quantized_logits(told, next(iter(jobs.values())))
    return {onto: vars(Difference.of(_merged_logits(job), running)) for onto, job in jobs.items()}


def _quantized_logits(told: dict[str, Any], job: Job) -> Tensor:
    """The model as it trained: quantised, with the adapter beside it."""
    model = load_base_model(
        ModelSection(**told["model"]),
        QuantizationSection(**told["quantization"]),
        dtype=told["dtype"],
        device_map="cuda" if torch.cuda.is_available() else None,
    )
    with_rows(model, job.rows)
    keep_backward_on_cpu(model)  # repacked, 4-bit weights are unpacked wrongly by peft's DoRA
    return logits(PeftModel.from_pretrained(model, job.adapter).eval(), job)


def _merged_logits(job: Job) -> Tensor:
    model, _ = load_model(job, job.base)
    with_rows(model, job.rows)
    adapted = PeftModel.from_pretrained(model, job.adapter)
    untie(adapted)
    merged = adapted.merge_and_unload()
    return logits(merged.to(getattr(torch, job.main_type)).float(), job)


if __name__ == "__main__":
    settle_process()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(job["findings"]).write_text(json.dumps(compare(job)), encoding="utf-8")
