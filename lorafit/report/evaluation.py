"""What an evaluation shows on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorafit.report.escape_control import inert
from lorafit.tasks import Task

NAMES = {
    "bits_per_byte": "bits per byte",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "json_valid": "valid JSON",
    "macro_f1": "macro F1",
}


def figure_name(name: str, task: Task) -> str:
    """What a figure is called, for people."""
    return f"{name} ({task.unit})" if name == "loss" else NAMES.get(name, name)


def eval_table(result: Any, *, samples: int = 0) -> str:
    """The verdict, a table of every figure, what was lost on general text; `samples` answers side by side. `result` is
    an `EvalResult`."""
    lines = [inert(result.verdict), ""]
    lines += _comparison_lines("held-out rows", result.held_out, result.task)
    if result.answers is not None:
        lines += ["", *_comparison_lines("generated answers", result.answers, result.task)]
    if result.general is not None:
        lines += ["", *_comparison_lines("general text", result.general, result.task)]
    for name, task in result.tasks.items():
        lines += ["", *_comparison_lines(f"task {name}", task, result.task)]
    for model, details in result.details.items():
        if "confusion" in details:
            lines += ["", *_confusion_lines(model, details["confusion"])]
    for sample in result.samples[:samples]:
        lines += ["", *_sample_lines(sample)]
    speed = ", ".join(f"{what} {rate:,.2f}" for what, rate in result.speed.items())
    lines += ["", f"sequences per second: {speed}; peak memory {result.peak_memory_bytes / 2**30:.2f} GiB"]
    lines += [f"{result.seconds:.1f} s; intervals hold in 99 of 100 evaluations (paired bootstrap)"]
    return "\n".join(lines)


def _comparison_lines(title: str, comparison: Any, task: Task) -> Iterator[str]:
    models = [model for model in ("base", "adapter", "merged") if model in comparison.figures]
    yield f"{title}: {inert(comparison.source)}, {comparison.sequences:,} sequences"
    rows = [("", *models, "adapter less base" if "base" in models else "")]
    if "merged" in models and "base" in models:
        rows[0] = (*rows[0], "merged less base")
    for name in comparison.figures[models[0]]:
        figures = [_figure(comparison.figures[model][name]) for model in models]
        told = [_told(found[name]) for found in (comparison.difference, comparison.merged_difference) if name in found]
        rows.append((inert(figure_name(name, task)), *figures, *told))
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    for row in rows:
        cells = [
            cell.ljust(width) if column in (0, len(models) + 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.4f}"


def _told(found: Any) -> str:
    if found.mean is None:
        return "not finite"
    if found.low is None or found.high is None:
        return f"{found.mean:+.4f} [one sequence]"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}] {found.verdict}"


def _confusion_lines(model: str, confusion: Any) -> Iterator[str]:
    labels = [inert(label) for label in confusion["labels"]]
    width = max(8, *(len(label) for label in labels))
    yield f"confusion of {model}: rows are the labels, columns what was answered"
    yield "  " + " ".join(cell.rjust(width) for cell in ("", *labels, "other", "F1"))
    f1 = [confusion["f1"][label] for label in confusion["labels"]]
    for label, counts, score in zip(labels, confusion["counts"], f1, strict=True):
        yield "  " + " ".join(cell.rjust(width) for cell in (label, *map(str, counts), f"{score:.3f}"))


def _sample_lines(sample: Any) -> Iterator[str]:
    yield f"--- {inert(sample['where'])}"
    for name in ("prompt", "reference", "base", "adapter", "merged"):
        if name in sample:
            first, *rest = inert(sample[name]).split("\n")
            yield f"{name:>9} | {first}"
            yield from (f"{'':>9} | {line}" for line in rest)
