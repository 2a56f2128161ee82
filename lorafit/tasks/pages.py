"""How the models of each task are measured, by its name: the same few functions on the page of each.

Beside what is trained with, in `trainers.py`: a model is measured without TRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import datasets
from torch import nn
from transformers import PreTrainedConfig

from lorafit.pulse import Counted
from lorafit.tasks import TaskName, causal_lm
from lorafit.tasks.sequences import SequenceLosses


class Page(Protocol):
    """What the module of a task has."""

    def held_out(
        self,
        model: nn.Module,
        rows: datasets.Dataset,
        *,
        pad_token_id: int,
        batch_tokens: int = ...,
        counted: Counted = ...,
    ) -> SequenceLosses:
        """Sums of what a model makes of each held-out row: what `eval`, the sweep and reports have in common."""

    def guessing(self, config: PreTrainedConfig) -> float:
        """The loss of a guess by a model of this size that has learned nothing."""


PAGES: Mapping[TaskName, Page] = {"causal_lm": causal_lm}
