"""What can be trained: one entry of `TASKS` for each task, names alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from lorafit.tasks.task import MODEL_KINDS, BaseModels, Figure, ModelKind, Task, TaskName

__all__ = ["DEFAULT_TASK", "MODEL_KINDS", "TASKS", "ModelKind", "Task", "TaskName", "model_kind"]

MAX_EXPONENT = 700
"""exp of more is not a float."""


def perplexity(loss: float) -> float:
    """exp(loss): among how many equally likely tokens the model hesitates."""
    return math.exp(loss) if loss < MAX_EXPONENT else math.inf


TASKS: Mapping[TaskName, Task] = {
    "causal_lm": Task(
        name="causal_lm",
        model=MODEL_KINDS["CAUSAL_LM"],
        bases=BaseModels(
            table="MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
            other_class=re.compile(r"For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering)$"),
            wanted=("predicts the next token", "a causal language model"),
        ),
        arguments="trl.SFTConfig",
        figure=Figure("perplexity", perplexity),
        pipeline_tag="text-generation",
        tag="sft",
    ),
}
"""By what `task` of a recipe says."""

DEFAULT_TASK = TASKS["causal_lm"]
"""Of a recipe that names none, and of an adapter whose `task_type` is empty."""


def model_kind(task_type: object) -> ModelKind:
    """Of an adapter's `task_type`; of one that lorafit does not know, that of the default task."""
    return MODEL_KINDS.get(str(task_type), DEFAULT_TASK.model)
