"""How a run may end before its last step, and what is said and recorded of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Protocol

from lorafit.errors import DiskError, HealthStop, LorafitError, StopRequested
from lorafit.launching import launch
from lorafit.launching.signals import ENDED_WITH_ANOTHER, StopRequest, has_lost_another
from lorafit.operating_system import freed_memory_kept
from lorafit.recipe import LoadedRecipe
from lorafit.storage.run_dir import RunDir
from lorafit.training.disk import full_disk_is_said
from lorafit.training.out_of_memory import forget_peak, out_of_memory_is_said
from lorafit.training.trainer.run_trainer import RunTrainer
from lorafit.training.trainer.stoppable import EvaluationBrokenOff


@contextmanager
def shortage_is_said(
    trainer: RunTrainer, loaded: LoadedRecipe, run: RunDir, *, checkpoint_bytes: int
) -> Iterator[None]:
    """A lack of memory, or of space for a checkpoint, is said in one line; the peak of memory is that of this
    block, whose steps keep for the next what they free.

    Raises MachineError and DiskError.
    """
    forget_peak()
    with (
        full_disk_is_said(run.path, writing="a checkpoint", needed=checkpoint_bytes),
        out_of_memory_is_said(loaded, doing=trainer.doing, checkpointing=bool(trainer.args.gradient_checkpointing)),
        freed_memory_kept(),
    ):
        yield


class _Record(Protocol):
    def __call__(self, *, outcome: str) -> None: ...


@contextmanager
def ending_is_recorded(trainer: RunTrainer, run: RunDir, *, stop: StopRequest, record: _Record) -> Iterator[None]:
    """A run that ends without an adapter says why, with `record`: stopped, broken, or left alone."""
    steps = trainer.steps
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
