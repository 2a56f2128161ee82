"""Tasks of lm-evaluation-harness, run on a model that is loaded already."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafit.errors import MachineError, RecipeError
from lorafit.tasks.score import Score, ratio

BATCH = 8
"""Requests of one forward pass. The harness orders them by length itself."""


class Harness:
    """The tasks of one evaluation; none do nothing."""

    def __init__(self, tasks: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises MachineError without the package, RecipeError for a task that cannot be used."""
        self._names = list(dict.fromkeys(tasks))
        self._tokenizer = tokenizer
        if not self._names:
            return
        if importlib.util.find_spec("lm_eval") is None:
            message = "needs lm-evaluation-harness, which is not installed: pip install 'lorafit[eval]'"
            raise MachineError(message, where="eval.tasks")
        # An extra that takes seconds to import: only who names tasks has it and waits for it.
        self._library = {
            name: importlib.import_module(f"lm_eval{name}") for name in ("", ".tasks", ".models.huggingface")
        }
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._manager = self._library[".tasks"].TaskManager()
        self._load()

    def _load(self) -> None:
        for name in self._names:
            try:
                self._manager.load([name])
            except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
                said = " ".join(str(error).split())[:300]
                message = f"{name!r} cannot be used as a task: {type(error).__name__}: {said}; `lm_eval ls tasks` names"
                raise RecipeError(f"{message} those there are", where="eval.tasks") from error

    def scores(self, model: PreTrainedModel | PeftModel) -> dict[str, dict[str, Score]]:
        """Task to its metrics, of each the value of every document."""
        if not self._names:
            return {}
        wrapped = self._library[".models.huggingface"].HFLM(
            pretrained=model, tokenizer=self._tokenizer, batch_size=BATCH, device=str(model.device)
        )
        results = self._library[""].simple_evaluate(
            model=wrapped, tasks=self._names, task_manager=self._manager, bootstrap_iters=0, log_samples=True
        )
        rising = results["higher_is_better"]
        return {task: _scores(samples, rising.get(task, {})) for task, samples in results["samples"].items()}


def _scores(samples: Sequence[Mapping[str, Any]], rising: Mapping[str, bool | None]) -> dict[str, Score]:
    """Metrics that give each document a number; others (perplexities of whole sets) cannot be paired."""
    values: dict[str, list[float]] = {}
    rises: dict[str, bool] = {}
    for sample in sorted(samples, key=lambda sample: (str(sample["filter"]), sample["doc_id"])):
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                values.setdefault(name, []).append(float(sample[metric]))
                rises[name] = rising.get(metric) is not False
    return {
        name: Score(np.array([[value, 1.0] for value in of_metric]), ratio, rises[name])
        for name, of_metric in values.items()
    }
