"""What each task is trained with, by its name: a trainer of TRL's or transformers', with our hooks."""

from __future__ import annotations

from collections.abc import Mapping

from lorafit.tasks import TaskName
from lorafit.tasks.causal_lm_trainer import CausalLm
from lorafit.training.trainer.run_trainer import RunTrainer

TRAINERS: Mapping[TaskName, type[RunTrainer]] = {"causal_lm": CausalLm}
