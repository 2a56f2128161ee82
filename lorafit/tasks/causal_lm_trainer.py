"""The trainer of a causal language model: TRL's, with our hooks, and a held-out loss per token."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from trl import SFTTrainer

from lorafit.training.trainer.run_trainer import RunTrainer


class CausalLm(RunTrainer, SFTTrainer):
    """Trains one adapter on rows that already hold `input_ids` and `labels`."""

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
