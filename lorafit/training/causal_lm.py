"""The trainer of a causal language model: TRL's, with our hooks, and a held-out loss per token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from trl import SFTTrainer

from lorafit.speed.levers import Engaged
from lorafit.training.trainer.committed import Committed
from lorafit.training.trainer.finite_steps import FiniteSteps
from lorafit.training.trainer.peft_steps import PeftSteps
from lorafit.training.trainer.split_on_oom import SplitOnOom
from lorafit.training.trainer.stoppable import Stoppable


class CausalLm(Stoppable, FiniteSteps, Committed, SplitOnOom, PeftSteps, SFTTrainer):
    """Trains one adapter on rows that already hold `input_ids` and `labels`."""

    called: Callable[[Any], Any]
    """What the model is called through; a lever may put something around it."""

    def __init__(self, *, engaged: Engaged, **arguments: Any) -> None:
        """`arguments` are those of the classes above, and of SFTTrainer."""
        self._held_out: list[torch.Tensor] = []
        self.called = lambda model: model
        super().__init__(**arguments)
        engaged.put_on(self)

    @property
    def window(self) -> dict[str, Any]:
        """What TRL sums up for its next line of metrics, and the tokens that it has counted."""
        metrics = {name: list(values) for name, values in self._metrics["train"].items()}
        return {"metrics": metrics, "tokens": self._total_train_tokens}

    @window.setter
    def window(self, window: dict[str, Any]) -> None:
        self._metrics["train"] = defaultdict(list, {name: list(values) for name, values in window["metrics"].items()})
        self._total_train_tokens = window["tokens"]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        """The loss of a batch, of the model as it is to be called."""
        return super().compute_loss(self.called(model), inputs, *rest, **named)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it would walk the whole model at each step, for the figure of a full fine-tuning."""
        return 0

    def evaluation_loop(self, *rest: Any, **named: Any) -> Any:
        """`eval_loss` is the mean over held-out tokens, not over batches: the same for every batch size."""
        self._held_out = []
        output = super().evaluation_loop(*rest, **named)
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
            outputs = self.called(model)(**inputs, use_cache=False, fused_lm_head=True)
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


def planned_steps(trainer: Trainer) -> int:
    """Optimizer steps the trainer will do, by its own arithmetic."""
    loader = trainer.get_train_dataloader()
    return int(trainer.set_initial_training_values(trainer.args, loader)[-1])
