"""What watches a run: the metrics file, the checkpoint interval, AdaLoRA's ranks."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lorafit.storage.files import append_line, write_file

_TOKENS = ("num_tokens", "num_input_tokens_seen")
"""Tokens of the run so far, as TRL's trainers and as transformers' own call them."""
_METRIC_NAMES = {"learning_rate": "lr", "mean_token_accuracy": "token_accuracy", **dict.fromkeys(_TOKENS, "tokens")}
_KEPT = ("loss", "grad_norm", "epoch", "eval_loss", "eval_tokens", "entropy")


class MetricsFile(TrainerCallback, ExportableState):
    """metrics.jsonl: one JSON object for every logged step, written at once so that a killed run keeps it.

    What it holds goes into every checkpoint. A run that goes on writes the file anew from there: without the lines of
    steps that will be done again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ago = (0.0, 0.0, 0)
        self._started = time.monotonic()
        self._seen = (self._started, 0)
        self._training_seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.tokens = 0

    def state(self) -> dict[str, Any]:
        """What the library puts into a checkpoint; the trainer sets the attributes of a run that goes on."""
        now = time.monotonic()
        ago = (now - self._started, now - self._seen[0], self._seen[1])
        attributes = {"history": list(self.history), "tokens": self.tokens}
        return {"attributes": attributes | {"_training_seconds": self._training_seconds, "_ago": ago}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Time counts from the first step, or goes on where it was."""
        now = time.monotonic()
        since_start, since_seen, tokens = self._ago
        self._started, self._seen = now - since_start, (now - since_seen, tokens)
        if state.is_world_process_zero:
            write_file(self._path, "".join(f"{json.dumps(entry)}\n" for entry in self.history))

    def on_log(  # type: ignore[override]  # given by name
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Append one line."""
        entry: dict[str, Any] = {"step": state.global_step}
        # The summary at the end counts the last steps, too.
        self.tokens = next((int(logs[name]) for name in _TOKENS if name in logs), self.tokens)
        entry |= {_METRIC_NAMES.get(key, key): value for key, value in logs.items() if key in (*_KEPT, *_METRIC_NAMES)}
        if "loss" in logs:
            now = time.monotonic()
            seconds, tokens = now - self._seen[0], self.tokens - self._seen[1]
            entry |= {"tokens": self.tokens, "tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}
            self._seen = (now, self.tokens)
            self._training_seconds += seconds
        elif not any(key.startswith("eval_loss") for key in logs):
            return
        entry["seconds"] = round(time.monotonic() - self._started, 3)
        self.history.append(entry)
        if state.is_world_process_zero:
            append_line(self._path, json.dumps(entry))

    def tokens_per_second(self) -> float:
        """Throughput of the logged steps, evaluations left out."""
        return round(self._seen[1] / max(self._training_seconds, 1e-9), 1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluation is not training time: the next throughput counts from here."""
        self._seen = (time.monotonic(), self._seen[1])


class Updates(TrainerCallback, ExportableState):
    """Counts the steps that could move a weight: at a rate above 0, and not skipped by the loss scale of fp16."""

    def __init__(self) -> None:
        self.count = 0

    def state(self) -> dict[str, Any]:
        """What the library puts into a checkpoint; the trainer sets the attributes of a run that goes on."""
        return {"attributes": {"count": self.count}}

    def on_optimizer_step(  # type: ignore[override]  # given by name
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: AcceleratedOptimizer,
        **_: Any,
    ) -> None:
        """One more; the schedule sets the next rate only after this."""
        if not optimizer.step_was_skipped and any(group["lr"] > 0 for group in optimizer.param_groups):
            self.count += 1


class CheckpointInterval(TrainerCallback):
    """Ask for a checkpoint every share of the run (and at least every ten minutes), number of steps, or time.

    Belongs at the end of the callbacks: it puts off what others ask for, too.
    """

    def __init__(self, every: int | str) -> None:
        self._every = every
        self._last = time.monotonic()
        self._is_put_off = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Time counts from the first step."""
        self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask when it is due; never after the last step, which leaves the adapter itself."""
        if state.global_step >= state.max_steps:
            control.should_save = False
            return
        control.should_save |= self._is_due(state)
        # The held-out loss of an epoch is taken after its last step: a run that went on from between would miss it.
        self._is_put_off = control.should_save and args.eval_strategy == "epoch" and float(state.epoch).is_integer()
        control.should_save &= not self._is_put_off

    def _is_due(self, state: TrainerState) -> bool:
        is_timed = isinstance(self._every, str) and not self._every.endswith("%")
        if not is_timed and state.global_step % steps_between(self._every, state.max_steps) == 0:
            return True
        if isinstance(self._every, int):
            return False
        longest = seconds_of(self._every) if is_timed else LONGEST_BETWEEN
        # The clocks of several processes differ: the first one's counts.
        is_late = torch.tensor(float(time.monotonic() - self._last >= longest), device=PartialState().device)
        return bool(broadcast(is_late).item())

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Now, after the evaluation."""
        control.should_save |= self._is_put_off
        self._is_put_off = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The next is due that long after this one, whoever asked for it."""
        self._last = time.monotonic()


LONGEST_BETWEEN = 600.0
"""Seconds of work that a killed run loses at most, where the recipe asks for a share of the run."""


def seconds_of(interval: str) -> float:
    """Seconds in `30s`, `10min`, `2h`."""
    count, unit = re.fullmatch(r"(\d+)(s|min|h)", interval).groups()  # type: ignore[union-attr]
    return int(count) * {"s": 1, "min": 60, "h": 3600}[unit]


def steps_between(every: int | str, total_steps: int) -> int:
    """Steps between two checkpoints: the number itself, or a share of the run, at least 1."""
    if isinstance(every, int):
        return every
    return max(1, round(total_steps * float(every.rstrip("%")) / 100))


class EarlyStopping(EarlyStoppingCallback):
    """The library's, which a run that goes on from the checkpoint it stopped at hears of, too."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Not one step more when patience had already run out."""
        super().on_train_begin(args, state, control)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class RankAllocation(TrainerCallback):
    """AdaLoRA: share out the ranks anew after each optimizer step, while the gradients are still there."""

    def on_optimizer_step(  # type: ignore[override]  # given by name
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **_: Any
    ) -> None:
        """peft's own rule, at the step just done."""
        inner = model.module if hasattr(model, "module") else model
        inner.base_model.update_and_allocate(state.global_step + 1)
