"""What a sweep shows on a terminal."""

from __future__ import annotations

from typing import Any

from lorafit.tasks import DEFAULT_TASK, Task

HEAD = ("rank", "loss", "worse by", "[95 %]", "eps", "decided", "parameters", "adapter", "memory", "time", "tokens")


def sweep_table(result: Any, *, task: Task = DEFAULT_TASK) -> str:
    """The ranks as a table, and what follows from it. `result` is a `SweepResult`."""
    rows = [HEAD, *(_row(row) for row in result.trials)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = []
    marks = [" ", *("*" if row.rank == result.chosen_rank else " " for row in result.trials)]
    for row, mark in zip(rows, marks, strict=True):
        cells = [
            f"{cell:<{width}}" if name == "decided" else f"{cell:>{width}}"
            for name, cell, width in zip(HEAD, row, widths, strict=True)
        ]
        lines.append(f"{mark} {'  '.join(cells)}".rstrip())
    return "\n".join([*lines, "", *_facts(result, task)])


def _row(row: Any) -> tuple[str, ...]:
    at = {0.33: " at 1/3", 0.67: " at 2/3"}.get(row.share, "")
    difference = row.difference
    return (
        f"{row.rank}",
        "" if row.loss is None else f"{row.loss:.4f}{at}",
        "" if difference is None else f"{difference.mean:+.4f}",
        "" if difference is None else f"[{difference.low:+.4f}, {difference.high:+.4f}]",
        "" if row.eps is None else f"{row.eps:.4f}",
        _decided(row),
        f"{row.parameters:,}",
        f"{row.adapter_bytes / 1e6:.2f} MB",
        "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f} GiB",
        "" if row.seconds is None else f"{row.seconds:.0f} s",
        f"{row.tokens:,}",
    )


def _decided(row: Any) -> str:
    if row.decided_by == "budget":
        return "not tried: budget"
    verdict = "enough" if row.is_sufficient else "too small"
    return f"{verdict}: {row.decided_by}"


def _facts(result: Any, task: Task) -> list[str]:
    if result.is_monotone:
        said = f"rank {result.chosen_rank} is the smallest that is as good as rank {result.reference_rank}"
    else:
        said = (
            f"a smaller rank beats rank {result.trials[-1].rank} (overfitting): rank {result.chosen_rank} is the "
            f"smallest that is as good as the best, rank {result.reference_rank}"
        )
    share = result.tokens_trained / max(1, result.tokens_exhaustive)
    within = f"{result.eps:.4f} {task.unit} a {task.counted}"
    rows = [
        (
            "answer",
            f"{said}, within {within} ({result.eval_sequences:,} held-out sequences)",
        ),
        (
            "trained",
            f"{result.tokens_trained:,} tokens, {share:.2f} of the {result.tokens_exhaustive:,} of all "
            f"{len(result.trials)} ranks in full",
        ),
    ]
    if result.learning_rates:
        tried = len(result.learning_rates)
        rows.append(
            ("learning rate", f"{result.learning_rate:.3g}, best of {tried}; {result.tokens_tuning:,} tokens on top")
        )
    rows += [("recipe", result.recipe), ("adapter", result.adapter or "on the machine that trained it")]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]
