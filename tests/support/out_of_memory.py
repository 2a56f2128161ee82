"""Memory that runs out where a test wants it to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from trl import SFTTrainer

from lorafit.tasks.causal_lm_trainer import rows_of

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.25 GiB of which 1.2 GiB is free."
)
PACKED = {"packing": True, "max_length": 96}
RIGHT_STEP = SFTTrainer.training_step
Fails = Callable[[SFTTrainer, int], bool]


class Memory:
    """Runs out where it is told to, after the forward pass or after the backward pass; knows the rows that fitted."""

    def __init__(self, fails: Fails, *, after_backward: bool) -> None:
        self.fails, self.after_backward = fails, after_backward
        self.passes: list[list[tuple[int, ...]]] = []
        self.ran_out = 0

    def step(self, trainer: SFTTrainer, model: nn.Module, inputs: Any, num_items: Any = None) -> torch.Tensor:
        rows = [tuple(row["input_ids"]) for row in rows_of(inputs)]
        if trainer.args.run_name == "selftest":
            return RIGHT_STEP(trainer, model, inputs, num_items)
        if self.fails(trainer, len(rows)):
            self.ran_out += 1
            if self.after_backward:
                RIGHT_STEP(trainer, model, inputs, num_items)
            else:
                trainer.compute_loss(model, trainer._prepare_inputs(inputs), num_items_in_batch=num_items)
            raise torch.OutOfMemoryError(CUDA)
        self.passes.append(rows)
        return RIGHT_STEP(trainer, model, inputs, num_items)
