"""`health.on_oom: halve_batch`: a step that runs out of memory is done again in smaller parts, as are all later ones.

The library's own way (`auto_find_batch_size`) starts training over with a smaller global batch. Here neither the global
batch nor the order of the rows changes: the loss is a sum over tokens divided by the tokens of the whole step, so that
the gradients of the parts of a micro-batch add up to the gradient of the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lorafit.storage.run_dir import RunDir
from lorafit.training.out_of_memory import Doing, is_out_of_memory, memory_figures
from lorafit.training.rows_of_batch import RowsOf

logger = logging.getLogger(__name__)

Inputs = dict[str, Any]
OneStep = Callable[[nn.Module, Inputs, Any], torch.Tensor]


class Divisible(Protocol):
    """What is asked of a trainer whose micro-batches are divided: transformers' own, but for the first three."""

    rows_of: RowsOf
    padding_free: bool
    """Whether a batch is one flattened row of documents."""
    window: dict[str, Any]
    """What it has summed up for its next line of metrics; put back when a step is done again."""
    accelerator: Accelerator
    args: TrainingArguments
    state: TrainerState
    current_gradient_accumulation_steps: int
    data_collator: Callable[[list[dict[str, Any]]], Inputs]

    def is_world_process_zero(self) -> bool:
        """Whether this process speaks for all."""


class _DoesNotFit(Exception):
    """Raised in all processes at once, where one of them has run out of memory in its forward pass."""


@dataclass(frozen=True)
class _Start:
    """What a step finds and changes, besides the gradients, which are none."""

    random_states: tuple[torch.Tensor, torch.Tensor | None]
    window: dict[str, Any]

    @classmethod
    def of(cls, trainer: Divisible) -> _Start:
        on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls((torch.get_rng_state(), on_gpu), trainer.window)

    def restore(self, trainer: Divisible, model: nn.Module) -> None:
        """As if the step had not begun: no gradient, no figure of it logged, the same dropout and noise to come."""
        model.zero_grad()
        torch.set_rng_state(self.random_states[0])
        if self.random_states[1] is not None:
            torch.cuda.set_rng_state(self.random_states[1])
        trainer.window = self.window


class HalveBatch(TrainerCallback, ExportableState):
    """In how many parts each micro-batch is done; checkpoints keep it."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self.parts = 1
        self._batches: list[Inputs] = []
        self._losses: list[torch.Tensor] = []

    def state(self) -> dict[str, Any]:
        """For a checkpoint; the trainer sets the attributes of a run that goes on."""
        return {"attributes": {"parts": self.parts}}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A new optimizer step, its micro-batches still to come."""
        self._batches, self._losses = [], []

    def step(
        self, trainer: Divisible, one_step: OneStep, model: nn.Module, *, inputs: Inputs, num_items: Any
    ) -> torch.Tensor:
        """The loss of one micro-batch after its backward pass, which `one_step` does, in as many parts as fit.

        When it does not fit, the optimizer step is done again from its first micro-batch. Raises torch's
        OutOfMemoryError in all processes when a single row, or document, does not fit.
        """
        if not self._batches:
            self._start = _Start.of(trainer)
        self._batches.append(inputs)
        # Not through DDP: its all-reduce inside the backward pass would wait for ever for a process that left it.
        own = model.module if isinstance(model, DistributedDataParallel) else model
        loss = self._done(trainer, one_step, own, [inputs], num_items)
        while loss is None:
            self._start.restore(trainer, own)
            loss = self._done(trainer, one_step, own, self._batches, num_items)
            if loss is not None and self._losses:  # those of the earlier micro-batches are logged already
                loss = loss - torch.stack(self._losses).sum()
        self._losses.append(loss)
        if trainer.accelerator.sync_gradients and trainer.accelerator.num_processes > 1:
            for parameter in own.parameters():
                if parameter.requires_grad:
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = trainer.accelerator.reduce(gradient, reduction="mean")
        return loss

    def watched(self, trainer: Divisible, model: nn.Module) -> Any:
        """`model`, called so that all processes leave a forward pass together: the library gathers figures after it."""
        if trainer.accelerator.num_processes == 1:
            return model

        def forward(**inputs: Any) -> Any:
            outputs = model(**inputs)
            if _in_any_process(trainer, False):
                raise _DoesNotFit
            return outputs

        return forward

    def _done(
        self,
        trainer: Divisible,
        one_step: OneStep,
        model: nn.Module,
        batches: Sequence[Inputs],
        num_items: Any,
    ) -> torch.Tensor | None:
        """The sum of the losses; None when it does not fit and smaller parts are to be tried."""
        total = torch.zeros((), device=trainer.args.device)
        for inputs in batches:
            shares = [inputs] if self.parts == 1 else _shares(trainer, inputs, parts=self.parts)
            for share in shares:
                with _accumulated_more_often(trainer, len(shares)):
                    loss, failure = _attempt(trainer, one_step, model, share, num_items)
                if loss is None:
                    self._halve(trainer, inputs, failure)
                    return None
                total = total + loss
        return total

    def _halve(self, trainer: Divisible, inputs: Inputs, failure: str) -> None:
        if self.parts >= _fewest_rows(trainer, inputs):
            raise torch.OutOfMemoryError(f"{failure}, by one {'document' if trainer.padding_free else 'row'} alone")
        self.parts *= 2
        step = trainer.state.global_step + 1
        message = f"step {step}: out of memory, {failure}; done again, and from here on, {self.described(trainer)}"
        if trainer.is_world_process_zero():
            logger.info(f"memory: {message}")
            self._run.add_event("memory", message, step=step, figures={"parts": self.parts})

    def described(self, trainer: Divisible) -> str:
        """How micro-batches are done now, in the words of the recipe."""
        size, steps = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
        if trainer.padding_free:
            return f"with each packed micro-batch in {self.parts} parts of whole documents: the same batch and result"
        sizes = f"per_device_train_batch_size {size} -> {max(size // self.parts, 1)}"
        return f"with {sizes}, gradient_accumulation_steps {steps} -> {steps * self.parts}: the same batch and result"


class SplitOnOom(Trainer):
    """Leaves each micro-batch to `halving`, where that was asked for."""

    model: nn.Module
    rows_of: RowsOf
    padding_free: bool
    """These two are of the trainer of a task."""
    window: dict[str, Any]
    """Of `Committed`."""

    def __init__(self, *, halving: HalveBatch | None, **arguments: Any) -> None:
        self._halving = halving
        super().__init__(**arguments)

    def compute_loss(self, model: nn.Module, inputs: Inputs, *rest: Any, **named: Any) -> Any:
        """The loss of a batch, watched for a lack of memory in other processes."""
        called = model if self._halving is None else self._halving.watched(self, model)
        return super().compute_loss(called, inputs, *rest, **named)

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass, or as many as fit into memory."""
        one_step = super().training_step
        if self._halving is None:
            return one_step(model, inputs, num_items_in_batch)
        return self._halving.step(self, one_step, model, inputs=inputs, num_items=num_items_in_batch)

    def described_split(self) -> str | None:
        """How micro-batches are divided now; None where they are not."""
        return self._halving.described(self) if self._halving is not None and self._halving.parts > 1 else None

    def doing(self) -> Doing:
        """For the message when memory runs out."""
        return "training" if self.model.training else "evaluating"


def _attempt(
    trainer: Divisible, one_step: OneStep, model: nn.Module, inputs: Inputs, num_items: Any
) -> tuple[torch.Tensor | None, str]:
    """The loss after a backward pass; or None, and what did not fit. All processes say the same."""
    failure = ""
    try:
        loss = one_step(model, inputs, num_items)
    except _DoesNotFit:
        return None, "in another process"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = memory_figures(error)
    if failure:  # out here the traceback, and with it the activations, can go
        clear_device_cache(garbage_collection=True)
    if _in_any_process(trainer, bool(failure)):
        return None, failure or "in another process"
    return loss, ""


def _in_any_process(trainer: Divisible, is_so: bool) -> bool:
    if trainer.accelerator.num_processes == 1:
        return is_so
    flag = torch.tensor(float(is_so), device=trainer.args.device)
    return bool(trainer.accelerator.reduce(flag, reduction="sum") > 0)


def _fewest_rows(trainer: Divisible, inputs: Inputs) -> int:
    """Rows (documents, when packed) of this micro-batch in the process that has the fewest: all split into as many."""
    count = torch.tensor(-float(len(trainer.rows_of(inputs))), device=trainer.args.device)
    return (
        -int(trainer.accelerator.reduce(count, reduction="max"))
        if trainer.accelerator.num_processes > 1
        else -int(count)
    )


def _shares(trainer: Divisible, inputs: Inputs, *, parts: int) -> list[Inputs]:
    """The micro-batch in parts of about as many tokens (rows, when padded), in its order, collated anew: each part as
    the run with that micro-batch would have it."""
    rows = trainer.rows_of(inputs)
    weights = [len(next(iter(row.values()))) if trainer.padding_free else 1 for row in rows]
    groups: list[list[dict[str, Any]]] = [[] for _ in range(min(parts, _fewest_rows(trainer, inputs)))]
    total, before, last = sum(weights), 0, 0
    for number, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        by_weight = before * len(groups) // total
        # No group is left out, and enough rows for the groups to come.
        last = max(min(by_weight, last + 1), len(groups) - (len(rows) - number))
        groups[last].append(row)
        before += weight
    return [trainer.data_collator(group) for group in groups]


@contextmanager
def _accumulated_more_often(trainer: Divisible, parts: int) -> Iterator[None]:
    """What is a mean over micro-batches (a penalty, a router's loss) counts each part as one."""
    steps = trainer.current_gradient_accumulation_steps
    trainer.current_gradient_accumulation_steps = steps * parts
    try:
        yield
    finally:
        trainer.current_gradient_accumulation_steps = steps
