"""What a sweep came to: the fields of sweep.json and spectrum.json, which the plots are drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorafit.evaluation.intervals import Interval


@dataclass(frozen=True)
class RankRow:
    """One rank in the table of a sweep."""

    rank: int
    decided_by: str
    """`direct`: trained in full. `truncated`: the largest rank's adapter, cut to this one. `rejected at a third`,
    `rejected at two thirds`: trained so far. `monotone`: follows from its neighbours. `budget`: not tried for want of
    it. `failed`: training was stopped by `health`."""
    is_sufficient: bool | None
    """Whether it is as good as the reference; null where it was not tried."""
    share: float | None
    """Share of the steps after which the loss was taken: 0.33, 0.67 or 1. Losses of different shares do not compare."""
    loss: float | None
    """Held-out nats per token, mean over seeds."""
    low: float | None
    high: float | None
    """The loss of the reference at the same share, plus the interval of the difference: where the loss lies, as far as
    it is told from the reference's."""
    difference: Interval | None
    """Nats per token by which it is worse than the reference at the same share; paired, 95 %."""
    eps: float | None
    """By how much it may be worse and still count as as good."""
    losses_by_seed: tuple[float, ...]
    """Of the runs of each seed, in their order, at the same share; empty for what is not trained at this rank."""
    truncated_loss: float | None
    """Of the largest rank's adapter, cut to this rank."""
    parameters: int
    """Trained parameters."""
    adapter_bytes: int
    """Of its weights."""
    tokens: int
    """Trained at this rank, all seeds together."""
    seconds: float | None
    """Of its runs, all seeds together; null where there are none."""
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class LearningRate:
    """One learning rate that was tried at the largest rank."""

    learning_rate: float
    loss: float | None
    """Held-out nats per token; null where the run was stopped by `health`."""
    share: float
    """Share of the steps that it was trained."""
    tokens: int


@dataclass(frozen=True)
class SweepResult:
    """The JSON of `lorafit rank-sweep`, and sweep.json but for `out`."""

    out: str
    """The sweep's directory."""
    chosen_rank: int
    """The smallest rank that is as good as the reference."""
    eps: float
    """Of the chosen rank's comparison; of each in `trials`."""
    reference_rank: int
    """What the others were held against: the largest rank, or the best where a smaller one beats the largest."""
    is_monotone: bool
    """False where a smaller rank beats the largest (overfitting): then all that the budget pays for were evaluated."""
    alpha: str
    """The policy."""
    learning_rate: float
    seeds: tuple[int, ...]
    eval_sequences: int
    trials: tuple[RankRow, ...]
    """One for each rank, rising."""
    tokens_trained: int
    tokens_exhaustive: int
    """Of training every rank in full."""
    tokens_tuning: int
    """On top: of the search for the learning rate, but for the run that the sweep goes on with."""
    learning_rates: tuple[LearningRate, ...]
    recipe: str
    """best.yaml: the recipe with the chosen rank, ready for `lorafit train`."""
    adapter: str | None
    """A run directory with the adapter of the chosen rank; null where it was trained on another machine."""
    seconds: float
    """Of all trials together."""


@dataclass(frozen=True)
class ModuleSpectrum:
    """Of the update that the largest rank learned in one module."""

    module: str
    singular_values: tuple[float, ...]
    """Of ΔW = scale · B · A, falling."""
    suggested_rank: int
    """The smallest that keeps as large a share of this module's squared singular values as the chosen rank keeps of all
    modules'."""


@dataclass(frozen=True)
class Spectra:
    """spectrum.json."""

    rank: int
    """That was trained."""
    chosen_rank: int
    share_kept: float
    """Of the squared singular values of all modules, by the chosen rank."""
    modules: tuple[ModuleSpectrum, ...]
    rank_pattern: Mapping[str, int]
    """For `lora.rank_pattern` beside `lora.r: chosen_rank`: the modules whose suggested rank is another."""
