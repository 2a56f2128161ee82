"""The trainer of a run that is only planned: its optimizer and its loss, without what watches and saves a run."""

from __future__ import annotations

import torch
from torch import nn

from lorafit.training.trainer.peft_steps import PeftSteps


class Planned(PeftSteps):
    """What a step of the run's own trainer computes, around a model that is nowhere yet."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Left on meta."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Anew, whatever was there."""
        self.optimizer = None
        return super().create_optimizer(model)
