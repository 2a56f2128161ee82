"""The search for the smallest rank, over losses made up in the test: no model is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest

from lorafit.evaluation.intervals import Interval, paired_difference
from lorafit.recipe.sections import RankSweepSection
from lorafit.sweep import search
from lorafit.sweep.search import (
    END,
    THIRD,
    TWO_THIRDS,
    Comparison,
    Decision,
    Job,
    Known,
    Wanted,
    budget_in_thirds,
    decide,
)
from lorafit.tasks.sequences import SequenceLosses


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses here are made to be told apart."""
    monkeypatch.setattr(search, "paired_difference", partial(paired_difference, resamples=300))


RANKS = (1, 2, 4, 8, 16, 32)
TOKENS = np.full(200, 10)
Curve = Mapping[int, float]


def losses(loss: float, *, noise: float = 0.002, seed: int = 0) -> SequenceLosses:
    """200 sequences of ten tokens with this loss; sequences differ far more than two adapters on one of them."""
    sequences = np.random.default_rng(0).normal(0, 0.5, 200)
    own = np.random.default_rng(seed + 1).normal(0, noise, 200)
    of_each = loss + sequences - sequences.mean() + own - own.mean()
    return SequenceLosses(of_each * TOKENS, TOKENS, TOKENS)


class World:
    """What training would come to; counts what is asked for."""

    def __init__(
        self, end: Curve, *, cut: Curve | None = None, third: Curve | None = None, failing: tuple[int, ...] = ()
    ) -> None:
        self.end, self.cut, self.third, self.failing = end, cut or {}, third or end, failing
        self.reached: dict[int, int] = {}

    def known(self) -> Known:
        direct = {}
        for rank, until in self.reached.items():
            if rank in self.failing:
                continue
            for third in range(1, until + 1):
                curve = self.end if third == END else self.third
                direct[rank, third] = losses(curve[rank] + (0.5 if third < END else 0), seed=rank)
        cut = {rank: losses(loss, seed=100 + rank) for rank, loss in self.cut.items()} if self.reached else {}
        return Known(direct, cut, frozenset(rank for rank in self.failing if rank in self.reached))

    def run(self, **section: Any) -> Decision:
        settings = RankSweepSection(**({"ranks": RANKS} | section))
        for _ in range(40):
            found = decide(settings, self.known())
            if isinstance(found, Decision):
                return found
            self.train(found.needed)
        raise AssertionError("the search does not end")

    def train(self, jobs: tuple[Job, ...]) -> None:
        assert jobs
        for job in jobs:
            assert self.reached.get(job.rank, 0) < job.until, "trained twice"
            self.reached[job.rank] = job.until

    @property
    def thirds(self) -> int:
        return sum(self.reached.values())


def flat_from(rank: int, *, step: float = 0.1) -> dict[int, float]:
    """Losses that fall up to a rank, and no further."""
    return {r: 2.0 + step * max(0, RANKS.index(rank) - RANKS.index(r)) for r in RANKS}


def test_a_cut_adapter_certifies_and_the_ranks_below_are_rejected_at_a_third() -> None:
    world = World(flat_from(8), cut={1: 3.0, 2: 2.5, 4: 2.2, 8: 2.001, 16: 2.0})
    found = world.run()
    assert (found.rank, found.reference, found.is_monotone) == (8, 32, True)
    by = {rank: (verdict.decided_by, verdict.is_sufficient) for rank, verdict in found.verdicts.items()}
    assert by == {
        1: ("monotone", False),
        2: ("rejected at a third", False),
        4: ("rejected at a third", False),
        8: ("truncated", True),
        16: ("truncated", True),
        32: ("direct", True),
    }
    assert world.reached == {32: END, 2: THIRD, 4: THIRD}


@pytest.mark.parametrize("answer", RANKS)
def test_whatever_the_answer_is_it_is_found(answer: int) -> None:
    world = World(flat_from(answer))
    assert world.run(budget=1.0).rank == answer == World(flat_from(answer)).run(exhaustive=True).rank


@pytest.mark.parametrize("answer", RANKS)
def test_cut_adapters_save_tokens(answer: int) -> None:
    cut = {rank: loss + 0.001 for rank, loss in flat_from(answer).items() if rank < 32}
    world = World(flat_from(answer), cut=cut)
    assert world.run().rank == answer
    assert world.thirds <= 0.4 * 3 * len(RANKS)


def test_a_rank_that_fails_at_the_end_gives_way_to_the_next_larger() -> None:
    """Every rank looks as good at a third; 1 and 2 are not at the end."""
    world = World(flat_from(4), third=dict.fromkeys(RANKS, 2.0))
    found = world.run(budget=1.0)
    assert found.rank == 4
    assert [(found.verdicts[rank].decided_by, found.verdicts[rank].is_sufficient) for rank in (1, 2, 4, 8)] == [
        ("direct", False),
        ("direct", False),
        ("direct", True),
        ("monotone", True),
    ]


def test_a_rank_is_rejected_at_two_thirds_without_its_last() -> None:
    curves = {THIRD: dict.fromkeys(RANKS, 2.0), END: flat_from(2)}
    world = World(curves[END], third=curves[THIRD])
    known = world.known

    def worse_at_two_thirds() -> Known:
        seen = known()
        late = {key: losses(2.6, seed=7) for key in seen.direct if key == (1, TWO_THIRDS)}
        return Known({**seen.direct, **late}, seen.truncated)

    world.known = worse_at_two_thirds  # type: ignore[method-assign]
    found = world.run(budget=1.0)
    assert (found.rank, found.verdicts[1].decided_by, world.reached[1]) == (2, "rejected at two thirds", TWO_THIRDS)


def test_where_a_smaller_rank_beats_the_largest_all_are_evaluated_and_held_against_the_best() -> None:
    end = {1: 2.3, 2: 2.1, 4: 2.0, 8: 2.002, 16: 2.2, 32: 2.4}
    found = World(end, cut={16: 2.35}).run(budget=1.0)
    assert (found.rank, found.reference, found.is_monotone) == (4, 4, False)
    assert [verdict.decided_by for verdict in found.verdicts.values()].count("direct") == 6
    assert found.verdicts[8].is_sufficient and not found.verdicts[2].is_sufficient
    assert World(end).run(exhaustive=True).rank == 4


def test_a_difference_smaller_than_eps_does_not_break_monotony() -> None:
    """Cut adapters differ by next to nothing, and from nothing by many standard errors."""
    found = World(flat_from(16), cut={16: 1.999, 8: 2.1}).run()
    assert found.is_monotone and found.rank == 16


@pytest.mark.parametrize(("eps", "answer"), [("auto", 8), (0.05, 8), (0.15, 4), (0.45, 1), (0.001, 8)])
def test_eps_says_what_counts_as_as_good(eps: float | str, answer: int) -> None:
    found = World(flat_from(8)).run(eps=eps, budget=1.0)
    assert found.rank == answer
    comparison = found.verdicts[answer].comparison
    assert comparison is not None and comparison.eps == (0.005 if eps == "auto" else eps)


def test_eps_grows_where_the_rows_cannot_tell_ranks_apart() -> None:
    """Otherwise no rank could be certified by few rows, were it as good as the largest or better."""
    found = World(flat_from(1)).known
    section = RankSweepSection(ranks=(1, 2))
    known = found()
    noisy = {(2, third): losses(2.0, noise=0.1, seed=2) for third in (1, 2, 3)}
    noisy |= {(1, third): losses(1.99, noise=0.1, seed=1) for third in (1, 2, 3)}
    decided = decide(section, Known(noisy, known.truncated))
    assert isinstance(decided, Decision) and decided.rank == 1
    comparison = decided.verdicts[1].comparison
    assert comparison is not None and comparison.eps == 2 * comparison.standard_error > 0.01


def test_a_rank_whose_training_breaks_is_too_small_and_no_more() -> None:
    found = World(flat_from(4), failing=(1, 2)).run(budget=1.0)
    assert found.rank == 4
    assert "failed" in (found.verdicts[1].decided_by, found.verdicts[2].decided_by)


def test_the_budget_is_kept_and_said() -> None:
    world = World(flat_from(4), third=dict.fromkeys(RANKS, 2.0))
    found = world.run(budget=0.3)
    assert world.thirds <= 0.3 * 3 * len(RANKS)
    assert found.rank == 32
    assert found.verdicts[16].decided_by == "budget" and found.verdicts[16].is_sufficient is None


@pytest.mark.parametrize(
    ("ranks", "budget", "thirds"),
    [((1, 2), None, 6), ((1, 2, 3), None, 6), (RANKS, None, 10), (RANKS, 1.0, 18), (RANKS, 0.5, 9)],
)
def test_the_usual_budget_is_six_tenths_or_two_full_runs(
    ranks: tuple[int, ...], budget: float | None, thirds: int
) -> None:
    assert budget_in_thirds(RankSweepSection(ranks=ranks, budget=budget)) == thirds


def test_exhaustive_trains_every_rank_and_asks_for_all_at_once() -> None:
    world = World(flat_from(8))
    section = RankSweepSection(ranks=RANKS, exhaustive=True)
    world.train(decide(section, world.known()).needed)  # type: ignore[union-attr]
    wanted = decide(section, world.known())
    assert isinstance(wanted, Wanted) and {job.rank for job in wanted.needed} == set(RANKS[:-1])


def test_idle_processes_are_told_what_may_be_needed_next() -> None:
    world = World(flat_from(8))
    section = RankSweepSection(ranks=RANKS)
    world.train(decide(section, world.known()).needed)  # type: ignore[union-attr]
    wanted = decide(section, world.known())
    assert isinstance(wanted, Wanted)
    (middle,) = wanted.needed
    assert {job.rank for job in wanted.likely} == {1, 8} and middle == Job(4, THIRD)


def _worlds() -> list[Callable[[], World]]:
    def world(answer: int, lag: float, gain: float) -> World:
        end = flat_from(answer, step=0.03)
        third = {rank: loss + lag * (RANKS[-1] - rank) / RANKS[-1] for rank, loss in end.items()}
        return World(end, third=third, cut={rank: loss + gain for rank, loss in end.items() if rank < 32})

    choices = product(RANKS, (0.0, 0.02, 0.2), (0.001, 0.02, 0.5))
    return [partial(world, *choice) for choice in choices]


def test_in_every_world_the_answer_is_the_exhaustive_one_or_the_budget_says_so() -> None:
    worlds = _worlds()
    assert len(worlds) == 54
    shares = []
    for make in worlds:
        world, truth = make(), make().run(exhaustive=True)
        found = world.run()
        shares.append(world.thirds / (3 * len(RANKS)))
        # A small rank that lags at a third is rejected there; what is named instead is as good, only larger.
        assert found.rank >= truth.rank
        assert world.end[found.rank] - world.end[truth.rank] <= 0.005 + 1e-9
    assert max(shares) <= 0.6 and np.median(shares) <= 0.4


def test_more_losses_than_asked_for_change_no_answer() -> None:
    """Another process may have trained what was only likely."""
    for make in _worlds()[::5]:
        world, other = make(), make()
        answer = world.run()
        other.reached = {rank: THIRD for rank in RANKS}
        again = decide(RankSweepSection(ranks=RANKS), other.known())
        while isinstance(again, Wanted):
            for job in again.needed:
                other.reached[job.rank] = max(job.until, other.reached.get(job.rank, 0))
            again = decide(RankSweepSection(ranks=RANKS), other.known())
        assert again.rank == answer.rank
        decided = {rank: verdict.decided_by for rank, verdict in again.verdicts.items()}
        assert decided == {rank: verdict.decided_by for rank, verdict in answer.verdicts.items()}


@pytest.mark.parametrize(
    ("low", "mean", "high", "found"),
    [
        (0.001, 0.003, 0.004, (True, False)),
        (0.001, 0.003, 0.006, (False, False)),  # may be as bad as eps
        (0.004, 0.008, 0.012, (False, False)),  # may do yet
        (0.006, 0.008, 0.012, (False, True)),
    ],
)
def test_a_rank_is_judged_by_its_interval_and_not_by_its_mean(
    low: float, mean: float, high: float, found: tuple[bool, bool]
) -> None:
    comparison = Comparison(Interval(mean, low, high), standard_error=0.001, eps=0.005)
    assert (comparison.is_sufficient, comparison.is_insufficient) == found
