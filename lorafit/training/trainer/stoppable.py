"""A stop between two steps, with a checkpoint, when any of its processes is asked to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafit.errors import DiskError, HealthStop, LorafitError, StopRequested
from lorafit.launching import launch
from lorafit.launching.signals import ENDED_WITH_ANOTHER, StopRequest, has_lost_another
from lorafit.storage.run_dir import RunDir


class EvaluationBrokenOff(Exception):
    """A stop was agreed on in the middle of an evaluation."""


class Stoppable(Trainer):
    """Stops on request with a checkpoint, from which the run goes on as if nothing had been; over `Committed`."""

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


class _Record(Protocol):
    def __call__(self, *, outcome: str) -> None: ...


@contextmanager
def ending_is_recorded(
    trainer: Stoppable, run: RunDir, *, stop: StopRequest, steps: int, record: _Record
) -> Iterator[None]:
    """A run of `steps` that ends without an adapter says why, with `record`: stopped, broken, or left alone."""
    try:
        try:
            yield
        except KeyboardInterrupt as interrupt:  # of a caller that hears requests in its own way
            done = f"stopped on request after step {trainer.state.global_step} of {steps}; no adapter was written"
            raise StopRequested(done, where=str(run.path)) from interrupt
        except EvaluationBrokenOff as broken:
            raise stop.stopped(step=trainer.state.global_step, steps=steps, where=str(run.path)) from broken
    except LorafitError as error:
        stop.ignore()
        message = error.problems[0].message
        if isinstance(error, StopRequested) and trainer.is_world_process_zero():
            run.add_event("stopped", message, step=trainer.state.global_step)
        with suppress(OSError) if isinstance(error, DiskError) else nullcontext():
            record(outcome=message if isinstance(error, StopRequested) else f"stopped: {error}")
        # These are agreed on by all processes. One that left now would have the others ended before that is written.
        if isinstance(error, StopRequested | HealthStop):
            trainer.accelerator.wait_for_everyone()
        raise
    except (SystemExit, RuntimeError) as error:
        if not launch.is_worker() or not has_lost_another(within_seconds=5):
            raise
        stop.ignore()
        record(outcome=f"ended after step {trainer.state.global_step} of {steps}: another process ended")
        raise SystemExit(ENDED_WITH_ANOTHER) from error
