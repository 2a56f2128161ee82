"""Steps whose loss and gradient are numbers: the first that is not ends the run before any weight is touched."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from transformers import Trainer


class Health(Protocol):
    """Who judges what is not finite."""

    def broken_step(self, found: list[tuple[str, dict[str, Any]]], model: nn.Module, *, step: int) -> None:
        """Called in all processes, with the words and the batch of each loss or gradient norm of this one."""

    def may_save(self, model: nn.Module, *, step: int) -> bool:
        """Whether all weights that are trained are finite."""


class FiniteSteps(Trainer):
    """Tells `health` of each loss and gradient norm that is not finite, and saves no such weights."""

    def __init__(self, *, health: Health, **arguments: Any) -> None:
        self._health = health
        self._batches_of_step: list[dict[str, Any]] = []
        self._broken_losses: list[tuple[str, dict[str, Any]]] = []
        super().__init__(**arguments)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass."""
        self._batches_of_step.append(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Only of finite weights, so that a run can go on from its newest checkpoint."""
        if self._health.may_save(model, step=self.state.global_step):
            super()._save_checkpoint(model, trial)
