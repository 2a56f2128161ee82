"""The trainer of a causal language model: TRL's, with our hooks, and a held-out loss per token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import nn
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lorafit.recipe import Recipe
from lorafit.recipe.sections import SFTSection, TrainingSection
from lorafit.speed import levers
from lorafit.training.trainer.planned import Planned
from lorafit.training.trainer.run_trainer import RunTrainer

if TYPE_CHECKING:
    from lorafit.planning.fake_step import Batch

ARGUMENTS = SFTConfig
LEVERS = levers.LEVERS
"""All that there are: they were made for it."""


def own_settings(recipe: Recipe) -> dict[str, Any]:
    """The rows are cut and counted by our own preparation; a length here would make TRL pass over them twice more."""
    training = recipe.training
    assert isinstance(training, SFTSection)
    return {
        "loss_type": training.loss_type,
        "packing": training.packing,
        "max_length": training.max_length if training.packing else None,
        "eval_packing": False,
        "trust_remote_code": recipe.model.trust_remote_code,
    }


def collator(pad_token_id: int) -> Any:
    """TRL's."""
    return DataCollatorForLanguageModeling(pad_token_id=pad_token_id)


def score(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """TRL's own call: log-probabilities of the labels, without the logits of all tokens."""
    return model(**inputs, use_cache=False, fused_lm_head=True)


def scores_of_tokens(scored: Any) -> torch.Tensor:
    """Log-probability of each token after the first of each row."""
    return scored.log_probs[scored.label_mask.bool()]


def rows_of(inputs: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Each document without padding: of [B, T] with an attention_mask, or of one flattened row with cu_seq_lens_q."""
    if "cu_seq_lens_q" in inputs:
        shares = [slice(start, end) for start, end in pairwise(inputs["cu_seq_lens_q"].tolist())]
        return [_row(inputs, 0, share) for share in shares]
    masks: torch.Tensor = inputs["attention_mask"].bool()
    return [_row(inputs, number, mask) for number, mask in enumerate(masks)]


def _row(inputs: dict[str, Any], number: int, share: slice | torch.Tensor) -> dict[str, list[int]]:
    return {name: inputs[name][number, share].tolist() for name in ("input_ids", "labels")}


def short_rows(rows: datasets.Dataset, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """The last tokens of training rows."""
    chosen = rows.select_columns("input_ids")
    ends = [chosen[number % len(chosen)]["input_ids"][-length:] for number, length in enumerate(lengths)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in ends]


def unpacked(training: TrainingSection) -> dict[str, Any]:
    """Rows that stand for packed ones are flattened just so, and not filled up with the others. A router's balance is a
    mean over each micro-batch, and rightly not the same for another division."""
    flattened = {"padding_free": training.is_packed, "router_aux_loss_coef": 0.0}
    return {"packing": False, "extra": training.extra | flattened}


def planned_batch(batch: Batch) -> dict[str, Any]:
    """As TRL's collator makes it: packed rows flattened into one, others beside each other with a mask."""
    if batch.rows != "packed":
        shape = (batch.size, batch.length)
        return {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "labels": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
    shape = (1, batch.size * batch.length)
    # Each row holds one document at least; more of them take a few bytes each.
    boundaries = torch.zeros(batch.size + 1, dtype=torch.int32)
    return {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.zeros(shape, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": batch.length,
        "max_length_k": batch.length,
        "seq_idx": torch.zeros(shape, dtype=torch.int32),
    }


def measured_batch(batch: Batch) -> dict[str, Any]:
    """The same with values: which rows are padded, and where documents begin, is looked at."""
    shape = (batch.size, batch.length)
    ids = torch.randint(0, 256, shape)
    if batch.rows != "packed":
        mask = torch.ones(shape, dtype=torch.long)
        if batch.rows == "padded":
            mask[0, -7:] = 0
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}
    bounds = torch.arange(0, ids.numel() + 1, batch.length, dtype=torch.int32)
    return {
        "input_ids": ids.view(1, -1),
        "labels": ids.clone().view(1, -1),
        "position_ids": torch.arange(batch.length).repeat(batch.size)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "seq_idx": torch.arange(batch.size, dtype=torch.int32).repeat_interleave(batch.length)[None],
        "max_length_q": batch.length,
        "max_length_k": batch.length,
    }


class CausalLm(RunTrainer, SFTTrainer):
    """Trains one adapter on rows that already hold `input_ids` and `labels`."""

    rows_of = staticmethod(rows_of)

    def __init__(self, **arguments: Any) -> None:
        """`arguments` are those of `RunTrainer` and of SFTTrainer."""
        self._held_out: list[torch.Tensor] = []
        super().__init__(**arguments)

    @property
    def window(self) -> dict[str, Any]:
        """What TRL sums up for its next line of metrics, and the tokens that it has counted."""
        metrics = {name: list(values) for name, values in self._metrics["train"].items()}
        return {"metrics": metrics, "tokens": self._total_train_tokens}

    @window.setter
    def window(self, window: dict[str, Any]) -> None:
        self._metrics["train"] = defaultdict(list, {name: list(values) for name, values in window["metrics"].items()})
        self._total_train_tokens = window["tokens"]

    def evaluation_loop(self, *rest: Any, **named: Any) -> Any:
        """`eval_loss` is the mean over held-out tokens, not over batches: the same for every batch size."""
        self._held_out = []
        output: Any = super().evaluation_loop(*rest, **named)
        if self._held_out:
            nll, tokens = torch.cat(self._held_out).double().sum(dim=0).tolist()
            prefix = named.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_loss"] = nll / max(tokens, 1)
            output.metrics[f"{prefix}_tokens"] = int(tokens)
        self._held_out = []
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Negative log-likelihood and trained tokens of each document, gathered without the rows that pad a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = score(self.called(model), inputs)
        sums = torch.stack([-outputs.log_probs, outputs.label_mask.to(outputs.log_probs.dtype)], dim=-1)
        if "seq_idx" in inputs:
            # One flattened row: the sums of each document, by the document its target token belongs to.
            documents = inputs["seq_idx"][0, 1:].long()
            count = int(inputs["seq_idx"].max()) + 1
            per_document = sums.new_zeros(count, 2).index_add_(0, documents, sums[0, : len(documents)])
        else:
            per_document = sums.sum(dim=1)
        gathered = self.accelerator.gather_for_metrics(per_document)
        self._held_out.append(gathered.cpu())
        nll, tokens = per_document.sum(dim=0)
        return nll / tokens.clamp(min=1), None, None

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None beside checkpoints: the one card of a run is written with its adapter."""

    def _send_telemetry(self) -> None:
        """None: what a user trains is theirs."""


class PlannedCausalLm(Planned, SFTTrainer):
    """What a step of it takes."""


TRAINER, PLANNED = CausalLm, PlannedCausalLm
