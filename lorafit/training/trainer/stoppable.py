"""A stop between two steps, with a checkpoint, when any of its processes is asked to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafit.launching.signals import StopRequest


class EvaluationBrokenOff(Exception):
    """A stop was agreed on in the middle of an evaluation."""


class Stoppable(Trainer):
    """Stops on request with a checkpoint, from which the run goes on as if nothing had been; over `Committed`."""

    save_now: Callable[[], None]
    """Of `Committed`."""

    def __init__(self, *, stop: StopRequest, **arguments: Any) -> None:
        self._stop = stop
        self.is_stopping = False
        super().__init__(**arguments)
        self.add_callback(_StopBetweenSteps(self))  # after all others, whose wishes it may overrule

    def agree_to_stop(self) -> bool:
        """Whether any process was asked to stop; the same answer in all of them, which must ask together."""
        if not self.is_stopping:
            asked = float(self._stop.heard is not None)
            if self.accelerator.num_processes > 1:
                asked = self.accelerator.reduce(torch.tensor(asked, device=self.accelerator.device)).item()
            self.is_stopping = asked > 0
        return self.is_stopping

    def evaluate(self, *rest: Any, **named: Any) -> dict[str, float]:
        """The library's evaluation, which draws none of training's random numbers: what is trained is the same without
        it, and with half of it."""
        try:
            with torch.random.fork_rng(devices=[]):
                return super().evaluate(*rest, **named)
        except EvaluationBrokenOff:
            if not self.is_in_train:  # the last one of a run, which that checkpoint leads to again
                self.save_now()
            raise

    def leave_if_stopping(self, *, steps: int, where: str) -> None:
        """Raises StopRequested where a stop was agreed on; the step's checkpoint has been saved."""
        if self.is_stopping:
            raise self._stop.stopped(step=self.state.global_step, steps=steps, where=where)

    def _maybe_log_save_evaluate(self, *rest: Any, **named: Any) -> None:
        """As the library does; of an evaluation that is broken off the checkpoint remains."""
        try:
            super()._maybe_log_save_evaluate(*rest, **named)
        except EvaluationBrokenOff:
            self.control.should_training_stop = True
            self.save_now()


class _StopBetweenSteps(TrainerCallback):
    """Asks at the end of each step, and after each batch of an evaluation, whether to stop."""

    def __init__(self, trainer: Stoppable) -> None:
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save this step and go; an evaluation that is due is left to the run that goes on."""
        if self._trainer.agree_to_stop():
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Nothing more is wanted of an epoch that was left."""
        if self._trainer.is_stopping:
            control.should_evaluate = control.should_save = control.should_log = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Break an evaluation off."""
        if self._trainer.agree_to_stop():
            raise EvaluationBrokenOff
