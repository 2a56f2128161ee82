"""A second task, to see that one can be added: transformers' own trainer, and its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lorafit.planning.fake_step import Batch
from lorafit.recipe import Recipe
from lorafit.recipe.sections import TrainingSection
from lorafit.speed.fused_lora import LEVER
from lorafit.tasks.causal_lm_trainer import rows_of
from lorafit.training.trainer.planned import Planned
from lorafit.training.trainer.run_trainer import RunTrainer

ARGUMENTS = TrainingArguments
LEVERS = (LEVER,)


class ToyLm(RunTrainer, Trainer):
    """Means of batches as transformers makes them."""

    padding_free = False
    rows_of = staticmethod(rows_of)
    window: dict[str, Any] = {}

    def __init__(self, **arguments: Any) -> None:
        collate = collator(arguments["processing_class"].pad_token_id)
        super().__init__(**arguments, data_collator=collate)


class PlannedToyLm(Planned, Trainer):
    """What a step of it takes."""


TRAINER, PLANNED = ToyLm, PlannedToyLm


def own_settings(recipe: Recipe) -> dict[str, Any]:
    """What its section has beside those of every task."""
    return recipe.training.model_dump(include={"label_smoothing_factor"}) | {"include_num_input_tokens_seen": "all"}


def collator(pad_token_id: int) -> Any:
    """Padded on the right."""

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
        padded = torch.nn.utils.rnn.pad_sequence
        lengths = torch.tensor([len(row) for row in ids])
        return {
            "input_ids": padded(ids, batch_first=True, padding_value=pad_token_id),
            "labels": padded(labels, batch_first=True, padding_value=-100),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        }

    return collate


def score(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The labels, and the logits of all tokens."""
    return SimpleNamespace(logits=model(**inputs).logits, labels=inputs["labels"])


def scores_of_tokens(scored: Any) -> torch.Tensor:
    """Log-probability of each."""
    logits, labels = scored.logits[:, :-1].float(), scored.labels[:, 1:]
    is_trained = labels != -100
    return -nn.functional.cross_entropy(logits[is_trained], labels[is_trained], reduction="none")


def planned_batch(batch: Batch) -> dict[str, Any]:
    """Ids, labels and a mask."""
    shape = (batch.size, batch.length)
    return {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "labels", "attention_mask")}


measured_batch = planned_batch


def short_rows(rows: datasets.Dataset, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """The last tokens of training rows."""
    ends = [rows[number % len(rows)]["input_ids"][-length:] for number, length in enumerate(lengths)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in ends]


def unpacked(training: TrainingSection) -> dict[str, Any]:
    """Nothing is packed."""
    return {}
