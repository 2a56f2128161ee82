"""The trainer of a run, whatever is trained: all that we add to a trainer of the library, which comes after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from lorafit.speed.levers import Engaged
from lorafit.training.callbacks import EarlyStopping, MetricsFile, Updates
from lorafit.training.rows_of_batch import RowsOf
from lorafit.training.trainer.committed import Committed
from lorafit.training.trainer.finite_steps import FiniteSteps
from lorafit.training.trainer.peft_steps import PeftSteps
from lorafit.training.trainer.split_on_oom import SplitOnOom
from lorafit.training.trainer.stoppable import Stoppable


class RunTrainer(Stoppable, FiniteSteps, Committed, SplitOnOom, PeftSteps):
    """`class OfATask(RunTrainer, SFTTrainer)` trains one adapter."""

    model: PeftModel
    processing_class: PreTrainedTokenizerBase

    called: Callable[[Any], Any]
    """What the model is called through; a lever may put something around it."""

    rows_of: RowsOf
    engaged: Engaged
    metrics: MetricsFile
    updates: Updates
    steps: int
    """Of the whole run."""

    def __init__(self, *, engaged: Engaged, **arguments: Any) -> None:
        """`arguments` are those of the classes above, and of the library's trainer."""
        self.engaged = engaged
        self.called = lambda model: model
        super().__init__(**arguments)
        engaged.put_on(self)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        """The loss of a batch, of the model as it is to be called."""
        return super().compute_loss(self.called(model), inputs, *rest, **named)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it would walk the whole model at each step, for the figure of a full fine-tuning."""
        return 0

    def held_out_losses(self) -> tuple[float | None, float | None]:
        """Before the first step, and of the adapter that is saved; None where no rows are held out."""
        if self.eval_dataset is None:
            return None, None
        before = next(entry["eval_loss"] for entry in self.metrics.history if "eval_loss" in entry)
        return before, self.evaluate()["eval_loss"]

    def is_stopped_early(self) -> bool:
        """Whether a run that has ended did so because the held-out loss no longer fell."""
        may_stop = any(isinstance(callback, EarlyStopping) for callback in self.callback_handler.callbacks)
        return may_stop and self.state.global_step < self.steps
