"""The trainer of a run: a held-out loss per token, a stop at the first NaN, the fast paths that were chosen."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafit.speed.answer_head import use_answer_head
from lorafit.speed.fixed_length import longest_held_out, with_fixed_length
from lorafit.training.halving import HalveBatch
from lorafit.training.health.watch import HealthWatch
from lorafit.training.out_of_memory import Doing
from lorafit.training.save import settle_files
from lorafit.training.stopping import StoppableTrainer


class LoraTrainer(StoppableTrainer):
    """Trains one adapter on rows that already hold `input_ids` and `labels`."""

    def __init__(
        self,
        *,
        answer_head: bool,
        fixed_length: bool,
        health: HealthWatch,
        halving: HalveBatch | None,
        base_name: str | None,
        **sft_arguments: Any,
    ) -> None:
        self._has_fixed_length = fixed_length
        self._health = health
        self._halving = halving
        self._base_name = base_name
        self._batches_of_step: list[dict[str, Any]] = []
        self._broken_losses: list[tuple[str, dict[str, Any]]] = []
        self._held_out: list[torch.Tensor] = []
        super().__init__(**sft_arguments)
        if answer_head:
            use_answer_head(self.model.get_base_model())

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        """The loss of a batch, watched for a lack of memory and brought to one length where that was asked for."""
        called = model if self._halving is None else self._halving.watched(self, model)
        return super().compute_loss(self._of_fixed_length(called), inputs, *rest, **named)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass, or as many as fit into memory with `health.on_oom: halve_batch`."""
        self._batches_of_step.append(inputs)
        one_step = super().training_step
        if self._halving is None:
            loss = one_step(model, inputs, num_items_in_batch)
        else:
            loss = self._halving.step(self, one_step, model, inputs=inputs, num_items=num_items_in_batch)
        if not torch.isfinite(loss):
            self._broken_losses.append((f"loss is {loss.item()}", inputs))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm before clipping. A loss or norm that is not finite, in any process, ends the run in all of
        them, before any weight is touched."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        broken = self._broken_losses
        # With fp16 an overflow is how the loss scale is found: the scaler skips that step and lowers the scale.
        is_scaled = self.accelerator.scaler is not None
        if not broken and not is_scaled and norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            broken = [(f"gradient norm is {float(norm)}", batch) for batch in self._batches_of_step]
        if self.accelerator.reduce(torch.tensor(float(len(broken)), device=self.accelerator.device)):
            self._health.broken_step(broken, model, step=self.state.global_step + 1)
        self._batches_of_step, self._broken_losses = [], []
        return norm

    def _of_fixed_length(self, model: Any) -> Any:
        """`model`, or what fills up each batch for it."""
        if not self._has_fixed_length:
            return model
        if self.model.training:
            length = self.args.per_device_train_batch_size * self.args.max_length
        else:
            length = self._longest_held_out
        pad_token_id = self.processing_class.pad_token_id
        return with_fixed_length(model, length=length, longest=self.args.max_length, pad_token_id=pad_token_id)

    @cached_property
    def _longest_held_out(self) -> int:
        return longest_held_out(self.eval_dataset, batch=self.args.per_device_eval_batch_size)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it would walk the whole model at each step, for the figure of a full fine-tuning."""
        return 0

    def doing(self) -> Doing:
        """For the message when memory runs out."""
        return "training" if self.model.training else "evaluating"

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
            outputs = self._of_fixed_length(model)(**inputs, use_cache=False, fused_lm_head=True)
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Only of finite weights, so that a run can go on from its newest checkpoint."""
        if self._health.may_save(model, step=self.state.global_step):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Adapter and tokenizer. The library's own adds a pickle of all arguments, which nothing reads and which can
        hold a token, and the whole embedding where tokens were added, of which their rows are enough."""
        if not self.args.should_save:  # all processes come here, one writes
            return
        directory = Path(output_dir or self.args.output_dir)
        self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(
            str(directory), state_dict=state_dict, save_embedding_layers=False
        )
        self.processing_class.save_pretrained(str(directory))
        settle_files(directory, base_name=self._base_name)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None beside checkpoints: the one card of a run is written with its adapter."""

    def _send_telemetry(self) -> None:
        """None: what a user trains is theirs."""


def planned_steps(trainer: LoraTrainer) -> int:
    """Optimizer steps the trainer will do, by its own arithmetic."""
    loader = trainer.get_train_dataloader()
    return int(trainer.set_initial_training_values(trainer.args, loader)[-1])
