"""A trainer that stops between two steps, with a checkpoint, when any of its processes is asked to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from lorafit.errors import DiskError, HealthStop, LorafitError, StopRequested
from lorafit.launching import launch
from lorafit.launching.signals import ENDED_WITH_ANOTHER, StopRequest, has_lost_another
from lorafit.storage.run_dir import RunDir
from lorafit.training.committing_trainer import CommittingTrainer
from lorafit.training.disk import full_disk_is_said


class EvaluationBrokenOff(Exception):
    """A stop was agreed on in the middle of an evaluation."""


class StoppableTrainer(CommittingTrainer):
    """Stops on request, and goes on from that checkpoint as if nothing had been.

    An evaluation that was due at the step of the checkpoint and is not recorded in it is done first: a stop breaks it
    off, and one at the end of an epoch comes after the step's checkpoint.
    """

    def __init__(self, *, stop: StopRequest, **sft_arguments: Any) -> None:
        self._stop = stop
        self.is_stopping = False
        super().__init__(**sft_arguments)
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
                self.save_stopped()
            raise

    def leave_if_stopping(self, *, steps: int, where: str) -> None:
        """Raises StopRequested where a stop was agreed on; the step's checkpoint has been saved."""
        if self.is_stopping:
            raise self._stop.stopped(step=self.state.global_step, steps=steps, where=where)

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """With what is said while the stage is still there, and the disk as full as it was."""
        needed = self.room.bytes_of_one
        with super()._staged() as stage, full_disk_is_said(stage.parent, writing="a checkpoint", needed=needed):
            yield stage

    def save_stopped(self) -> None:
        """A checkpoint of the step just done, outside of a step's end."""
        self._save_checkpoint(self.model, None)
        self.control: TrainerControl = self.callback_handler.on_save(self.args, self.state, self.control)

    def _maybe_log_save_evaluate(self, *rest: Any, **named: Any) -> None:
        """As the library does; of an evaluation that is broken off the checkpoint remains."""
        try:
            super()._maybe_log_save_evaluate(*rest, **named)
        except EvaluationBrokenOff:
            self.control.should_training_stop = True
            self.save_stopped()

    def evaluate_if_due(self) -> None:
        """Do the evaluation of the step that a resumed run begins with, unless that step's checkpoint records it."""
        if self.state.global_step == 0 or self.eval_dataset is None:
            return
        history = (entry for entry in self.state.log_history if entry["step"] == self.state.global_step)
        if any("eval_loss" in entry for entry in history):
            return
        wanted = DefaultFlowCallback().on_step_end(self.args, self.state, TrainerControl())
        if self.state.epoch == int(self.state.epoch) or wanted.should_training_stop:
            wanted = DefaultFlowCallback().on_epoch_end(self.args, self.state, wanted)
        if wanted.should_evaluate:
            # Else what is saved below would hold the random state of now, and the run take that up.
            self._load_rng_state(None if self._taken_up is None else str(self._taken_up))
            is_best = self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            if is_best and self.args.save_strategy == "best":
                self.save_stopped()


class _StopBetweenSteps(TrainerCallback):
    """Asks at the end of each step, and after each batch of an evaluation, whether to stop."""

    def __init__(self, trainer: StoppableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Catch up with what the resumed run's checkpoint came before."""
        self._trainer.evaluate_if_due()

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
    trainer: StoppableTrainer, run: RunDir, *, stop: StopRequest, steps: int, record: _Record
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
