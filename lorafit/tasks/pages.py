"""The pages of each task: what its models are given, how they are measured, and how they are trained.

A task has the module of its name (`causal_lm`), and beside it that of its rows (`causal_lm_rows`), which are read
without torch, and of its trainer (`causal_lm_trainer`), since a model is measured without TRL. Each holds the same few
names for every task, which stand here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from lorafit.pulse import Counted
from lorafit.tasks import TaskName

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, TrainingArguments

    from lorafit.data.encode import Encode
    from lorafit.planning.fake_step import Batch
    from lorafit.recipe import Recipe
    from lorafit.recipe.sections import TrainingSection
    from lorafit.speed.lever import Lever
    from lorafit.tasks.score import Score
    from lorafit.tasks.sequences import SequenceLosses
    from lorafit.training.trainer.planned import Planned
    from lorafit.training.trainer.run_trainer import RunTrainer


class RowsPage(Protocol):
    """What models of a task are given."""

    encode: Encode
    """Rows to sequences, with the checks of what is wrong with them."""


class Page(Protocol):
    """How models of a task are measured."""

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

    def scores(self, losses: SequenceLosses, text_bytes: npt.NDArray[np.int64]) -> dict[str, Score]:
        """The figures that they make, the loss first; `text_bytes` [S] are those of what is trained of each row."""

    def guessing(self, config: PreTrainedConfig) -> float:
        """The loss of a guess by a model of this size that has learned nothing."""


class TrainerPage(Protocol):
    """How models of a task are trained."""

    TRAINER: type[RunTrainer]
    """A trainer of TRL's or transformers', with our hooks."""

    PLANNED: type[Planned]
    """The same trainer around a model that is nowhere yet."""

    ARGUMENTS: type[TrainingArguments]
    """What `training` becomes."""

    LEVERS: tuple[Lever, ...]
    """What may make it faster."""

    def own_settings(self, recipe: Recipe) -> dict[str, Any]:
        """What ARGUMENTS takes beside what every trainer's do."""

    def collator(self, pad_token_id: int) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
        """Rows to a batch, outside of a trainer."""

    def score(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """What the model makes of a batch when it is measured, called as the trainer calls it."""

    def planned_batch(self, batch: Batch) -> dict[str, Any]:
        """Rows of this number and length, of zeros, as the trainer's collator hands them on."""

    def measured_batch(self, batch: Batch) -> dict[str, Any]:
        """The same with values."""

    def short_rows(self, rows: datasets.Dataset, lengths: Sequence[int]) -> list[dict[str, Any]]:
        """For the self-test: rows of at most so many tokens, one of each length, all of whose tokens are trained."""

    def scores_of_tokens(self, scored: Any) -> Tensor:
        """For the self-test: all that `score` says of the trained tokens, in the order of the rows, wherever they lie
        in the batch."""

    def unpacked(self, training: TrainingSection) -> dict[str, Any]:
        """For the self-test: what changes in it for rows that are taken as they are, each a micro-batch's."""


def rows_page(task: TaskName) -> RowsPage:
    """What the models of a task are given."""
    return cast(RowsPage, import_module(f"{__package__}.{task}_rows"))


def page(task: TaskName) -> Page:
    """How the models of a task are measured."""
    return cast(Page, import_module(f"{__package__}.{task}"))


def trainer_page(task: TaskName) -> TrainerPage:
    """How they are trained."""
    return cast(TrainerPage, import_module(f"{__package__}.{task}_trainer"))
