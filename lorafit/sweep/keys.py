"""The pieces of work of a sweep: their names in the study and on disk, and what is known from those that are done."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import numpy as np

from lorafit.recipe import LoadedRecipe
from lorafit.recipe.sections import RankSweepSection
from lorafit.sweep.search import Job, Known
from lorafit.sweep.study import Outcome
from lorafit.tasks.sequences import SequenceLosses


def key_of(job: Job, seed: int) -> str:
    """The name of a piece of work in the study."""
    return f"rank-{job.rank}-seed-{seed}-until-{job.until}"


def run_of(out: Path, rank: int, seed: int, *, name: str | None = None) -> Path:
    """The run directory of a rank and seed, or one with another name beside it."""
    return out / "trials" / (name or f"rank-{rank}-seed-{seed}")


def seeds_of(loaded: LoadedRecipe) -> tuple[int, ...]:
    """The seeds of the runs of each rank."""
    first = loaded.recipe.training.seed
    return tuple(range(first, first + loaded.recipe.rank_sweep.seeds))


def known(section: RankSweepSection, seeds: tuple[int, ...], outcomes: Mapping[str, Outcome]) -> Known:
    """The losses that all seeds have, added up sequence by sequence."""
    found: dict[tuple[int, str], dict[int, SequenceLosses]] = {}
    failed = set()
    for outcome in outcomes.values():
        if "rank" not in outcome.facts or outcome.facts["seed"] not in seeds:
            continue
        if "failed" in outcome.facts:
            failed.add(outcome.facts["rank"])
        for name, losses in outcome.losses.items():
            found.setdefault((outcome.facts["rank"], name), {})[outcome.facts["seed"]] = losses
    whole = {
        key: reduce(_added, (by_seed[seed] for seed in seeds))
        for key, by_seed in found.items()
        if len(by_seed) == len(seeds)
    }
    largest = section.ranks[-1]
    cut = {rank: whole[largest, f"cut-{rank}"] for rank in section.ranks[:-1] if (largest, f"cut-{rank}") in whole}
    direct = {(rank, int(name)): losses for (rank, name), losses in whole.items() if name.isdecimal()}
    return Known(direct, cut, frozenset(failed))


def _added(one: SequenceLosses, other: SequenceLosses) -> SequenceLosses:
    """Of two seeds: the mean over tokens is the mean over both."""
    return SequenceLosses(one.nll + other.nll, np.add(one.tokens, other.tokens), np.add(one.correct, other.correct))
