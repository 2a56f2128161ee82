"""Which rank is the smallest that is as good as the largest: decided from losses alone, or what to train first.

`decide` goes through the search from the start each time, over what is known so far. Whoever asks, whenever, gets the
same answer from the same losses: a sweep that was killed goes on, and several processes share one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lorafit.evaluation.intervals import Interval, paired_difference, standard_error
from lorafit.recipe.sections import RankSweepSection
from lorafit.tasks.sequences import SequenceLosses

THIRD, TWO_THIRDS, END = 1, 2, 3
"""Where a run is judged, in thirds of its steps."""

LEAST_EPS = 0.005
"""Nats per token: half a per cent of perplexity."""

USUAL_BUDGET = 0.6
"""Of training every rank in full."""

Decided = Literal[
    "direct", "truncated", "rejected at a third", "rejected at two thirds", "monotone", "budget", "failed"
]


@dataclass(frozen=True)
class Job:
    """Train this rank until so many thirds of its steps."""

    rank: int
    until: int


@dataclass(frozen=True)
class Wanted:
    """What is missing for the search to go on."""

    needed: tuple[Job, ...]
    likely: tuple[Job, ...] = ()
    """What may be needed next; for who would wait otherwise."""


@dataclass(frozen=True)
class Known:
    """Held-out losses so far."""

    direct: Mapping[tuple[int, int], SequenceLosses]
    """Of (rank, thirds of the steps), trained at that rank."""
    truncated: Mapping[int, SequenceLosses]
    """Of the largest rank's adapter, cut to each smaller rank."""
    failed: frozenset[int] = frozenset()
    """Ranks whose training was stopped by `health`."""


@dataclass(frozen=True)
class Comparison:
    """A rank held against the reference on the same sequences."""

    difference: Interval
    """Nats per token by which the rank is worse."""
    standard_error: float
    eps: float

    @property
    def is_sufficient(self) -> bool:
        """Surely not worse by eps."""
        return self.difference.high < self.eps

    @property
    def is_insufficient(self) -> bool:
        """Surely worse by more than eps."""
        return self.difference.low > self.eps

    @property
    def is_better(self) -> bool:
        """By more than 2 standard errors and by more than counts as a difference at all."""
        return -self.difference.mean > max(2 * self.standard_error, self.eps)


@dataclass(frozen=True)
class Verdict:
    """What was found of one rank."""

    decided_by: Decided
    is_sufficient: bool | None
    """None where it was not tried, for want of budget."""
    thirds: int | None = None
    """When its losses were taken; None where it has none."""
    losses: SequenceLosses | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Decision:
    """The answer."""

    rank: int
    reference: int
    """The rank that the others were held against: the largest, or the best where the largest overfits."""
    is_monotone: bool
    """False where a smaller rank beats the largest."""
    verdicts: Mapping[int, Verdict]


def compare(reference: SequenceLosses, losses: SequenceLosses, *, eps: float | Literal["auto"]) -> Comparison:
    """`losses` held against those of the reference; eps as the recipe says."""
    error = standard_error(reference, losses)
    chosen = max(LEAST_EPS, 2 * error) if eps == "auto" else eps
    return Comparison(paired_difference(reference, losses), error, chosen)


def budget_in_thirds(section: RankSweepSection) -> int:
    """Thirds of a full run that may be trained: the recipe's share of all, or 0.6 of it and two full runs at least."""
    count = len(section.ranks)
    share = section.budget if section.budget is not None else max(USUAL_BUDGET, 2 / count)
    return math.floor(3 * count * (1 if section.exhaustive else share) + 1e-9)


def decide(section: RankSweepSection, known: Known) -> Decision | Wanted:
    """The answer, or the runs that it waits for."""
    try:
        return _Search(section, known, thirds_left=budget_in_thirds(section)).answer()
    except _Missing as missing:
        return missing.wanted


class _Missing(Exception):
    def __init__(self, wanted: Wanted) -> None:
        super().__init__()
        self.wanted = wanted


@dataclass
class _Search:
    """One walk through the search. Raises `_Missing` at the first losses that are not there."""

    section: RankSweepSection
    known: Known
    thirds_left: int
    paid: dict[int, int] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    is_monotone: bool = True

    @property
    def ranks(self) -> Sequence[int]:
        return self.section.ranks

    @property
    def largest(self) -> int:
        return self.section.ranks[-1]

    def answer(self) -> Decision:
        self._reach([Job(self.largest, END)])
        whole = self.known.direct[self.largest, END]
        self.verdicts[self.largest] = Verdict("direct", True, END, whole, compare(whole, whole, eps=self.section.eps))
        if self.section.exhaustive:
            return self._all()
        certified = self._by_truncation()
        if self.is_monotone:
            accepted = self._bisect(certified)
            chosen = self._finish(accepted, certified)
            if self.is_monotone:
                return self._with_the_rest(chosen)
        return self._all()

    def _by_truncation(self) -> int:
        """Index of the smallest rank that the largest's adapter, cut to it, certifies."""
        certified = len(self.ranks) - 1
        for index in reversed(range(certified)):
            losses = self.known.truncated.get(self.ranks[index])
            if losses is None:
                continue
            comparison = self._against_largest(losses, END)
            self.is_monotone &= not comparison.is_better
            if comparison.is_sufficient:
                self.verdicts[self.ranks[index]] = Verdict("truncated", True, END, losses, comparison)
                certified = index
        return certified

    def _bisect(self, certified: int) -> int:
        """Index of the smallest rank below `certified` that a third of the steps does not reject; else `certified`."""
        rejected, accepted = -1, certified
        while accepted - rejected > 1:
            middle = (rejected + accepted) // 2
            halves = [(rejected + middle) // 2, (middle + accepted) // 2]
            likely = [Job(self.ranks[index], THIRD) for index in halves if index not in (rejected, middle)]
            if not self._reach([Job(self.ranks[middle], THIRD)], likely):
                break
            if self._is_rejected(self.ranks[middle], THIRD):
                rejected = middle
            else:
                accepted = middle
        return accepted

    def _finish(self, accepted: int, certified: int) -> int:
        """Index of the first rank from `accepted` on that holds to the end of its steps; else `certified`."""
        for index in range(accepted, certified):
            verdict = self._to_its_end(self.ranks[index])
            if verdict is None:
                return certified
            if verdict.is_sufficient:
                return index
        return certified

    def _to_its_end(self, rank: int) -> Verdict | None:
        """What is found of a rank that is trained for as long as it may still do; None where the budget does not pay
        for it."""
        for thirds in (THIRD, TWO_THIRDS):
            if not self._reach([Job(rank, thirds)]):
                return None
            if self._is_rejected(rank, thirds):
                return self.verdicts[rank]
        if not self._reach([Job(rank, END)]):
            return None
        if rank in self.known.failed:
            self.verdicts[rank] = Verdict("failed", False)
            return self.verdicts[rank]
        losses = self.known.direct[rank, END]
        comparison = self._against_largest(losses, END)
        self.is_monotone &= not comparison.is_better
        self.verdicts[rank] = Verdict("direct", comparison.is_sufficient, END, losses, comparison)
        return self.verdicts[rank]

    def _all(self) -> Decision:
        """Every rank that the budget pays for, in full and from the smallest on, held against the best of them."""
        self._reach_all(self.ranks)
        trained = {rank: self.known.direct[rank, END] for rank in self.paid if (rank, END) in self.known.direct}
        losses = trained if self.section.exhaustive else {**self.known.truncated, **trained}
        best = min(losses, key=lambda rank: losses[rank].loss)
        comparisons = {rank: self._compare(losses[self.largest], of) for rank, of in losses.items()}
        self.is_monotone = self.is_monotone and not any(one.is_better for one in comparisons.values())
        reference = self.largest if self.is_monotone else best
        for rank in self.ranks:
            if rank not in losses:
                decided: Decided = "failed" if rank in self.known.failed else "budget"
                self.verdicts[rank] = Verdict(decided, False if decided == "failed" else None)
                continue
            comparison = self._compare(losses[reference], losses[rank])
            decided = "direct" if rank in trained else "truncated"
            is_sufficient = comparison.is_sufficient or rank == reference
            self.verdicts[rank] = Verdict(decided, is_sufficient, END, losses[rank], comparison)
        chosen = next(rank for rank in self.ranks if self.verdicts[rank].is_sufficient)
        return Decision(chosen, reference, self.is_monotone, self.verdicts)

    def _reach_all(self, ranks: Sequence[int]) -> None:
        jobs = []
        for rank in ranks:
            if self._pay(rank, END) and not self._is_known(Job(rank, END)):
                jobs.append(Job(rank, END))
        if jobs:
            raise _Missing(Wanted(tuple(jobs)))

    def _with_the_rest(self, chosen: int) -> Decision:
        """The ranks in between, which follow from their neighbours."""
        for index, rank in enumerate(self.ranks):
            verdict = self.verdicts.get(rank)
            if verdict is None or verdict.is_sufficient is None:
                self.verdicts[rank] = self._implied(index, chosen, verdict or Verdict("monotone", None))
        return Decision(self.ranks[chosen], self.largest, self.is_monotone, self.verdicts)

    def _implied(self, index: int, chosen: int, seen: Verdict) -> Verdict:
        larger = [self.verdicts[rank] for rank in self.ranks[index + 1 :] if rank in self.verdicts]
        if index > chosen:
            return replace(seen, decided_by="monotone", is_sufficient=True)
        if any(verdict.is_sufficient is False for verdict in larger):
            return replace(seen, decided_by="monotone", is_sufficient=False)
        return replace(seen, decided_by="budget", is_sufficient=None)

    def _is_rejected(self, rank: int, thirds: int) -> bool:
        """Notes what was seen; a rank that may still do is neither sufficient nor not."""
        losses = self.known.direct.get((rank, thirds))
        if rank in self.known.failed or losses is None:
            self.verdicts[rank] = Verdict("failed", False)
            return True
        comparison = self._against_largest(losses, thirds)
        decided: Decided = "rejected at a third" if thirds == THIRD else "rejected at two thirds"
        is_sufficient = False if comparison.is_insufficient else None
        self.verdicts[rank] = Verdict(decided, is_sufficient, thirds, losses, comparison)
        return comparison.is_insufficient

    def _against_largest(self, losses: SequenceLosses, thirds: int) -> Comparison:
        return self._compare(self.known.direct[self.largest, thirds], losses)

    def _compare(self, reference: SequenceLosses, losses: SequenceLosses) -> Comparison:
        return compare(reference, losses, eps=self.section.eps)

    def _reach(self, jobs: Sequence[Job], likely: Sequence[Job] = ()) -> bool:
        """Whether the budget pays for these runs; raises `_Missing` where it does and their losses are not there."""
        if not all(self._pay(job.rank, job.until) for job in jobs):
            return False
        missing = tuple(job for job in jobs if not self._is_known(job))
        if missing:
            raise _Missing(Wanted(missing, tuple(job for job in likely if not self._is_known(job))))
        return True

    def _pay(self, rank: int, until: int) -> bool:
        cost = max(0, until - self.paid.get(rank, 0))
        if cost > self.thirds_left:
            return False
        self.thirds_left -= cost
        self.paid[rank] = max(until, self.paid.get(rank, 0))
        return True

    def _is_known(self, job: Job) -> bool:
        return job.rank in self.known.failed or (job.rank, job.until) in self.known.direct
