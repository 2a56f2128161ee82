"""What an evaluation came to; the JSON of `lorafit eval`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorafit.evaluation.intervals import Interval
from lorafit.evaluation.scores import compare
from lorafit.tasks import DEFAULT_TASK, Task
from lorafit.tasks.score import Score

LEVEL = 0.99
"""Confidence of every interval. Not 0.95: an evaluation shows a dozen of them, and one in twenty would be wrong."""

SMALLEST = 1e-4
"""Differences below this are none, however sure: sums in another order, and weights rounded by a merge, make them."""

Verdict = Literal["better", "worse", "no difference"]


@dataclass(frozen=True)
class Difference:
    """A figure of one model less that of another, on the same sequences."""

    mean: float | None
    low: float | None
    """End of the interval; None where one sequence is all there is."""
    high: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """The same sequences seen by all models: figures, and differences with their intervals."""

    source: str
    sequences: int
    figures: Mapping[str, Mapping[str, float | None]]
    """Model (`base`, `adapter`, `merged`) to its figures."""
    difference: Mapping[str, Difference]
    """Adapter less base."""
    merged_difference: Mapping[str, Difference]
    """Merged model less base."""
    merged_to_adapter: Mapping[str, Difference]
    """Merged model less adapter."""


@dataclass(frozen=True)
class EvalResult:
    """Everything of one evaluation."""

    run: str
    base_model: str
    merged_model: str | None
    held_out: Comparison
    answers: Comparison | None
    """Of generated answers; None where none were asked for."""
    general: Comparison | None
    """What the adapter has lost; None without a base to compare with."""
    tasks: Mapping[str, Comparison]
    details: Mapping[str, Mapping[str, Any]]
    """Model to what is no single figure: the confusion of a classification, the number of empty answers."""
    samples: tuple[Mapping[str, Any], ...]
    verdict: str
    speed: Mapping[str, float]
    """Sequences per second: `scored` for losses, `answered` for generation."""
    peak_memory_bytes: int
    seconds: float
    task: Task = DEFAULT_TASK

    def is_worse(self) -> tuple[str, ...]:
        """What of the adapter, or of the merged model, is worse than the base with confidence; not on general text."""
        worse = []
        for comparison in (self.held_out, self.answers, *self.tasks.values()):
            if comparison is None:
                continue
            for model, differences in (
                ("adapter", comparison.difference),
                ("merged model", comparison.merged_difference),
            ):
                worse += [f"{model}: {name}" for name, found in differences.items() if found.verdict == "worse"]
        return tuple(worse)

    def as_dict(self) -> dict[str, Any]:
        """The result for scripts: figures of each model together, wherever they were measured."""
        parts = [part for part in (self.held_out, self.answers) if part is not None]
        models = {
            model: {name: value for part in parts for name, value in part.figures.get(model, {}).items()}
            | dict(self.details.get(model, {}))
            for model in ("base", "adapter", "merged")
            if model in self.held_out.figures
        }
        differences = {
            key: {name: asdict(found) for part in parts for name, found in getattr(part, key).items()}
            for key in ("difference", "merged_difference", "merged_to_adapter")
        }
        return {
            "run": self.run,
            "base_model": self.base_model,
            "merged_model": self.merged_model,
            "rows": self.held_out.source,
            "sequences": self.held_out.sequences,
            "answered": self.answers.sequences if self.answers else 0,
            "level": LEVEL,
            **{model: models.get(model) for model in ("base", "adapter", "merged")},
            **differences,
            "general": asdict(self.general) if self.general else None,
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
            "samples": list(self.samples),
            "verdict": self.verdict,
            "sequences_per_second": dict(self.speed),
            "peak_memory_bytes": self.peak_memory_bytes,
            "seconds": self.seconds,
        }


def comparison(source: str, scores: Mapping[str, Mapping[str, Score]]) -> Comparison:
    """Of the scores of each model, all on the same sequences."""
    first = next(iter(next(iter(scores.values())).values()))
    return Comparison(
        source=source,
        sequences=len(first.values),
        figures={
            model: {name: _finite(score.value) for name, score in of_model.items()}
            for model, of_model in scores.items()
        },
        difference=_differences(scores.get("base"), scores.get("adapter")),
        merged_difference=_differences(scores.get("base"), scores.get("merged")),
        merged_to_adapter=_differences(scores.get("adapter"), scores.get("merged")),
    )


def _differences(one: Mapping[str, Score] | None, other: Mapping[str, Score] | None) -> dict[str, Difference]:
    if one is None or other is None:
        return {}
    return {name: difference(compare(one[name], other[name], level=LEVEL), one[name]) for name in one}


def difference(interval: Interval, score: Score) -> Difference:
    """With its verdict: better or worse where the whole interval is on one side of nothing."""
    is_sure = interval.low > 0 or interval.high < 0
    verdict: Verdict = "no difference"
    if is_sure and abs(interval.mean) >= SMALLEST:
        verdict = "better" if (interval.mean > 0) == score.higher_is_better else "worse"
    return Difference(_finite(interval.mean), _finite(interval.low), _finite(interval.high), verdict)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def verdict(held_out: Comparison, *, unit: str = DEFAULT_TASK.unit) -> str:
    """One plain sentence on the adapter: `adapter better by 0.31 nats [0.28, 0.34], 400 sequences`."""
    count = f"{held_out.sequences:,} sequence{'s' * (held_out.sequences != 1)}"
    found = held_out.difference.get("loss")
    if found is None:
        return f"adapter not compared with its base (eval.compare_base: false), {count}"
    if found.mean is None:
        return f"adapter and base cannot be compared: the loss is not finite, {count}"
    if found.low is None or found.high is None:
        return f"adapter and base cannot be told apart by {count}: {found.mean:+.3f} {unit} there"
    if found.verdict == "no difference":
        interval = f"[{found.low:.3f}, {found.high:.3f}]"
        return f"no difference: adapter less base {found.mean:+.3f} {unit} {interval}, {count}"
    low, high = sorted((abs(found.low), abs(found.high)))
    return f"adapter {found.verdict} by {abs(found.mean):.3f} {unit} [{low:.3f}, {high:.3f}], {count}"
