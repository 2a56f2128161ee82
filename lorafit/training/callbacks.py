"""What watches a run: the metrics file, the progress bar, the checkpoint interval, AdaLoRA's ranks."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_METRIC_NAMES = {"learning_rate": "lr", "num_tokens": "tokens", "mean_token_accuracy": "token_accuracy"}
_KEPT = ("loss", "grad_norm", "epoch", "eval_loss", "eval_tokens", "entropy")


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one JSON object for every logged step, written at once so that a killed run keeps it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = time.monotonic()
        self._seen = (self._started, 0)
        self._training_seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.tokens = 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Append one line."""
        entry: dict[str, Any] = {"step": state.global_step}
        self.tokens = int(logs.get("num_tokens", self.tokens))  # the summary at the end counts the last steps, too
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
            with self._path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry) + "\n")

    def tokens_per_second(self) -> float:
        """Throughput of the logged steps, evaluations left out."""
        return round(self._seen[1] / max(self._training_seconds, 1e-9), 1)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Time counts from the first step."""
        self._started = time.monotonic()
        self._seen = (self._started, 0)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluation is not training time: the next throughput counts from here."""
        self._seen = (time.monotonic(), self._seen[1])


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


class CheckpointInterval(TrainerCallback):
    """Ask for a checkpoint every share of the run, number of steps, or time."""

    def __init__(self, every: int | str) -> None:
        self._every = every
        self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask when it is due; never after the last step, which leaves the adapter itself."""
        if state.global_step >= state.max_steps:
            return
        if isinstance(self._every, str) and not self._every.endswith("%"):
            due = time.monotonic() - self._last >= seconds_of(self._every)
        else:
            due = state.global_step % steps_between(self._every, state.max_steps) == 0
        if due:
            control.should_save = True
            self._last = time.monotonic()


def seconds_of(interval: str) -> float:
    """Seconds in `30s`, `10min`, `2h`."""
    count, unit = re.fullmatch(r"(\d+)(s|min|h)", interval).groups()  # type: ignore[union-attr]
    return int(count) * {"s": 1, "min": 60, "h": 3600}[unit]


def steps_between(every: int | str, total_steps: int) -> int:
    """Steps between two checkpoints: the number itself, or a share of the run, at least 1."""
    if isinstance(every, int):
        return every
    return max(1, round(total_steps * float(every.rstrip("%")) / 100))


class RankAllocation(TrainerCallback):
    """AdaLoRA: share out the ranks anew after each optimizer step, while the gradients are still there."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **_: Any
    ) -> None:
        """peft's own rule, at the step just done."""
        inner = model.module if hasattr(model, "module") else model
        inner.base_model.update_and_allocate(state.global_step + 1)
