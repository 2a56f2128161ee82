"""What people see of a run while it trains: a bar on a terminal, lines everywhere else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafit.pulse import Pulse, duration
from lorafit.training.callbacks import MetricsFile

logger = logging.getLogger(__name__)

Progress = Callable[[MetricsFile], TrainerCallback]
"""What shows the newest figures of a run."""


class SignsOfLife(TrainerCallback):
    """A line where nothing was said for half a minute, also within a long step or evaluation."""

    def __init__(self, metrics: MetricsFile) -> None:
        self._metrics = metrics
        self._pulse = Pulse()
        self._began: tuple[int, float] | None = None
        """Steps done before the first of this session, and when that began."""
        self._batches = 0

    def tell(self, line: str) -> None:
        """Say it. Who trains several runs puts the name of this one before it."""
        logger.info(line)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The time that is left is told from here on."""
        self._began = self._began or (state.global_step, time.monotonic())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Between two logged steps."""
        if not control.should_log and self._pulse.is_silent():
            self.tell(": ".join([_at(state), *self._left(state)]))

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Between the batches that one step accumulates."""
        self.on_step_end(args, state, control)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Between the batches of an evaluation."""
        self._batches += 1
        if self._pulse.is_silent():
            self.tell(f"{_at(state)}: held-out rows, batch {self._batches:,} of {len(eval_dataloader):,}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The next evaluation counts its batches anew."""
        self._batches = 0

    def _left(self, state: TrainerState) -> list[str]:
        before, since = self._began or (state.global_step, 0.0)
        done = state.global_step - before
        if not done or state.global_step >= state.max_steps:
            return []
        return [f"{duration((time.monotonic() - since) / done * (state.max_steps - state.global_step))} left"]


class ProgressLines(SignsOfLife):
    """Besides, a line at each logged step, no oftener than every five seconds, and at each evaluation."""

    _is_training = True

    def on_log(  # type: ignore[override]  # given by name
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """The newest figures."""
        if "eval_loss" in logs and self._is_training:
            self.tell(f"{_at(state)}: held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs and self._pulse.has_news():
            figures = [f"loss {logs['loss']:.4f}", f"{self._metrics.history[-1]['tokens_per_second']:,.0f} tokens/s"]
            figures += self._left(state)
            self.tell(f"{_at(state)}: {', '.join(figures)}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What is measured of the adapter that is saved stands in the result."""
        self._is_training = False


def _at(state: TrainerState) -> str:
    return f"step {state.global_step:,}/{state.max_steps:,}"


class ProgressBar(TrainerCallback):
    """Steps, loss, tokens/s and time left, on a terminal."""

    def __init__(self, metrics: MetricsFile) -> None:
        self._metrics = metrics
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True, leave=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move it on."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show the newest figures."""
        if self._bar is None or not self._metrics.history:
            return
        newest = self._metrics.history[-1]
        shown = {"loss": "loss", "eval_loss": "held-out", "tokens_per_second": "tok/s"}
        self._bar.set_postfix({label: f"{newest[key]:.4g}" for key, label in shown.items() if key in newest})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close it."""
        if self._bar is not None:
            self._bar.close()
