"""Results as text for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafit.pulse import duration
from lorafit.tasks import DEFAULT_TASK, Figure, Task
from lorafit.training.seen import epochs_seen


def train_table(result: Any, *, task: Task = DEFAULT_TASK) -> str:
    """What a run came to, one fact a line. `result` is a `TrainResult`."""
    adapter = Path(result.adapter)
    weights = sum(file.stat().st_size for file in adapter.glob("*.safetensors"))
    rows = [
        ("outcome", result.outcome),
        *_held_out(result.eval_loss_before, result.eval_loss_after, task.figure),
        ("steps", f"{result.steps:>11,}{_seen(result)}"),
        ("tokens", f"{result.tokens:>11,}   {result.tokens_per_second:,.0f} per second of training"),
        ("time", f"{duration(result.seconds):>11}"),
        ("peak memory", f"{result.peak_memory_bytes / 2**30:>7.2f} GiB"),
        ("adapter", f"{adapter} ({weights / 1e6:.1f} MB)"),
        ("next", f"lorafit report {result.run}   # all of it on one page; how to load it: {adapter / 'README.md'}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _seen(result: Any) -> str:
    """How often the rows were seen, and which step's adapter is kept where it is not the last one's."""
    share = "" if result.epochs is None else f"   {epochs_seen(result.epochs)}"
    is_last = result.adapter_step in (None, result.steps)
    return share if is_last else f"{share}; the adapter is that of step {result.adapter_step:,}, the best"


def _held_out(before: float | None, after: float | None, figure: Figure) -> list[tuple[str, str]]:
    """The loss and its figure before and after, one below the other."""
    if before is None or after is None:
        return [("held-out loss", "not known: data.eval and data.eval_fraction are empty")]
    pairs = (
        ("held-out loss", before, after, ".4f"),
        (figure.name, figure.of_loss(before), figure.of_loss(after), ",.2f"),
    )
    return [
        (name, f"{first:>11{form}} before {last:>11{form}} after {last / first - 1:>+8.1%}")
        for name, first, last, form in pairs
    ]


def smoke_table(result: Any) -> str:
    """What a smoke run came to. `result` is a `SmokeResult`."""
    kept = f", left in {result.run}" if result.run else ""
    difference = result.max_abs_logit_difference
    return (
        f"runs: {result.architecture}, {result.steps} steps in {result.seconds:.1f} s{kept}; "
        f"the reloaded adapter gives the trained logits (largest difference {difference:.2g})"
    )
