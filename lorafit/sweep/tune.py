"""The learning rate of a sweep: the recipe's, or the best of a few that Optuna proposes at the largest rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from lorafit.errors import HealthStop
from lorafit.recipe import LoadedRecipe
from lorafit.sweep.keys import run_of, seeds_of
from lorafit.sweep.search import END, THIRD, TWO_THIRDS
from lorafit.sweep.study import Study
from lorafit.sweep.sweep_result import LearningRate
from lorafit.sweep.trial import Bench, run_trial, trial_recipe

logger = logging.getLogger(__name__)

FACTOR = 4
"""Up and down from the recipe's own rate."""

KEY = "learning-rate"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Tuned:
    """The learning rate that all ranks are trained with."""

    learning_rate: float
    run: str | None = None
    """The directory under `trials/` of the run at the largest rank that had it; None where none was tried."""
    tried: tuple[LearningRate, ...] = ()


def tuned(loaded: LoadedRecipe, study: Study, bench: Bench, *, out: Path, wait: Callable[[], None]) -> Tuned:
    """The recipe's rate, or the best of those tried; one process of the sweep tries them, the others wait."""
    if not loaded.recipe.rank_sweep.tune_lr:
        return Tuned(loaded.recipe.training.learning_rate)
    while (outcome := study.outcomes().get(KEY)) is None:
        claim = study.claim(KEY)
        if claim is None:
            wait()
            continue
        with claim:
            try:
                claim.commit(_try_them(loaded, study, bench, out=out), {})
            except BaseException:
                claim.give_up()
                raise
    facts = outcome.facts
    tried = tuple(LearningRate(**one) for one in facts["tried"])
    return Tuned(facts["learning_rate"], facts["run"], tried)


def _try_them(loaded: LoadedRecipe, study: Study, bench: Bench, *, out: Path) -> dict[str, Any]:
    name, count = f"{study.study.study_name}-learning-rate", loaded.recipe.rank_sweep.lr_trials
    seed, rate = loaded.recipe.training.seed, loaded.recipe.training.learning_rate
    tried: dict[int, LearningRate] = {}
    for number in range(count):
        # A sampler of its own for each: what it proposes hangs on the trials before, not on whether it was killed.
        sampler = TPESampler(seed=seed + number, n_startup_trials=3)
        rates = optuna.create_study(
            storage=study.storage,
            study_name=name,
            sampler=sampler,
            pruner=MedianPruner(n_startup_trials=1),
            load_if_exists=True,
        )
        found = next((one for one in rates.get_trials(deepcopy=False) if one.number == number), None)
        if found is None and number == 0:
            rates.enqueue_trial({"learning_rate": rate})
        if found is None or found.state not in FINISHED:
            trial = Trial(rates, found._trial_id) if found and found.state == TrialState.RUNNING else rates.ask()
            _try_one(trial, loaded, bench, out=out, rate=rate)
        tried[number] = _as_tried(rates.get_trials()[number])
    whole = {number: one for number, one in tried.items() if one.share == 1 and one.loss is not None}
    if not whole:
        message = f"each of {count} learning rates around {rate:g} was stopped by health; lower training.learning_rate"
        raise HealthStop(message, where="rank_sweep.tune_lr")
    best = min(whole, key=lambda number: whole[number].loss or 0.0)
    return {
        "learning_rate": tried[best].learning_rate,
        "run": f"learning-rate-{best}",
        "tried": [asdict(one) for one in tried.values()],
    }


def _try_one(trial: Trial, loaded: LoadedRecipe, bench: Bench, *, out: Path, rate: float) -> None:
    """Train with the rate that is proposed; told to the study when it is done, or behind the others."""
    rate = trial.suggest_float("learning_rate", rate / FACTOR, rate * FACTOR, log=True)
    rank, seed = loaded.recipe.rank_sweep.ranks[-1], seeds_of(loaded)[0]
    directory = run_of(out, rank, seed, name=f"learning-rate-{trial.number}")
    recipe = trial_recipe(loaded, rank=rank, seed=seed, learning_rate=rate, output_dir=directory)
    logger.info(f"learning rate {rate:.3g}: training at rank {rank}")
    for third in (THIRD, TWO_THIRDS, END):
        outcome = run_trial(recipe, until=third, bench=bench)
        trial.set_user_attr("tokens", outcome.facts["tokens"])
        if "failed" in outcome.facts:
            trial.study.tell(trial, state=TrialState.FAIL)
            return
        loss = outcome.losses[third].loss
        logger.info(f"learning rate {rate:.3g}: held-out loss {loss:.4f} after {third}/3 of the steps")
        trial.set_user_attr("thirds", third)
        trial.report(loss, third)
        if third < END and trial.should_prune():
            trial.study.tell(trial, state=TrialState.PRUNED)
            return
    trial.study.tell(trial, loss)


def _as_tried(trial: FrozenTrial) -> LearningRate:
    return LearningRate(
        learning_rate=trial.params["learning_rate"],
        loss=trial.value if trial.state == TrialState.COMPLETE else trial.intermediate_values.get(trial.last_step or 0),
        share=round(trial.user_attrs.get("thirds", 0) / END, 2),
        tokens=trial.user_attrs.get("tokens", 0),
    )
