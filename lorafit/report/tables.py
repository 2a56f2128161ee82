"""Results as text for a terminal."""

from __future__ import annotations

from typing import Any


def train_table(result: Any) -> str:
    """What a run came to, one fact a line. `result` is a `TrainResult`."""
    rows = [
        ("outcome", result.outcome),
        ("steps", f"{result.steps:,}"),
        ("tokens", f"{result.tokens:,}"),
        ("seconds", f"{result.seconds:.1f}"),
        ("peak memory", f"{result.peak_memory_bytes / 2**30:.2f} GiB"),
        ("adapter", result.adapter),
    ]
    if result.eval_loss_before is not None:
        change = result.eval_loss_after / result.eval_loss_before - 1
        losses = f"{result.eval_loss_before:.4f} before, {result.eval_loss_after:.4f} after ({change:+.1%})"
        rows.insert(1, ("held-out loss", losses))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def smoke_table(result: Any) -> str:
    """What a smoke run came to. `result` is a `SmokeResult`."""
    kept = f", left in {result.run}" if result.run else ""
    difference = result.max_abs_logit_difference
    return (
        f"runs: {result.architecture}, {result.steps} steps in {result.seconds:.1f} s{kept}; "
        f"the reloaded adapter gives the trained logits (largest difference {difference:.2g})"
    )
