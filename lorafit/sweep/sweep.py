"""`lorafit rank-sweep`: prepare once, train what the search asks for, commit each trial, write down the answer."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lorafit.errors import DataError, HealthStop, Problem, RecipeError, StopRequested
from lorafit.launching.signals import StopRequest
from lorafit.preflight import refuse_what_this_machine_lacks, this_machine
from lorafit.recipe import LoadedRecipe
from lorafit.recipe.rules.rank_sweep import SWEEP_RULES
from lorafit.storage.files import write_file
from lorafit.storage.run_dir import RunDir
from lorafit.storage.stage import make_directory, remove_abandoned
from lorafit.sweep.cut_to_rank import cut_to_smaller_ranks
from lorafit.sweep.keys import key_of, known, run_of, seeds_of
from lorafit.sweep.search import END, THIRD, TWO_THIRDS, Decision, Job, Wanted, decide
from lorafit.sweep.study import Outcome, Study
from lorafit.sweep.sweep_files import write_sweep
from lorafit.sweep.sweep_result import SweepResult
from lorafit.sweep.trial import Bench, run_trial, trial_recipe
from lorafit.sweep.tune import Tuned, tuned
from lorafit.tasks.sequences import SequenceLosses
from lorafit.training.checkpoints import remove_committed
from lorafit.training.inputs import read_inputs
from lorafit.training.must_match import changes, kept_keys

logger = logging.getLogger(__name__)

LEAST_SEQUENCES = 16
"""Held-out sequences below which no interval means anything."""

POLL = 1.0
"""Seconds until a process with nothing to do looks again."""

JOURNAL, FACTS = "study.journal", "study.json"


def rank_sweep(
    loaded: LoadedRecipe,
    *,
    storage: str | None,
    cache_dir: Path | None,
    new_stop: Callable[[], StopRequest] = StopRequest,
) -> SweepResult:
    """The smallest rank that is as good as the largest; a sweep that was begun goes on, beside others of its storage.

    Raises every LorafitError of training, and MachineError where the storage cannot be reached.
    """
    refuse_what_cannot_be_swept(loaded)
    refuse_what_this_machine_lacks(loaded, this_machine())
    out = loaded.output_dir()
    if not any((out / name).is_file() for name in (FACTS, JOURNAL)):
        RunDir(out).refuse_used()
    inputs = read_inputs(loaded, cache_dir=cache_dir)
    _refuse_few_sequences(loaded, 0 if inputs.data.eval is None else len(inputs.data.eval))
    facts = {
        "base": inputs.base_files.fingerprint(),
        "data": inputs.data.fingerprint,
        "recipe": _what_shapes_a_trial(loaded),
    }
    _refuse_another_sweep(loaded, out, facts)
    study = Study(storage or str(out / JOURNAL), study_name(facts))
    make_directory(out)
    write_file(out / FACTS, json.dumps(facts, indent=2) + "\n")
    bench = Bench(loaded, inputs, cache_dir=cache_dir, new_stop=new_stop)
    try:
        rate = tuned(loaded, study, bench, out=out, wait=_wait)
        decision = _search(loaded, study, bench, out=out, tuned=rate)
        return write_sweep(loaded, decision, study, bench, out=out, tuned=rate, wait=_wait)
    except KeyboardInterrupt as interrupt:
        raise StopRequested("stopped between two trials; the same command goes on", where=str(out)) from interrupt


def refuse_what_cannot_be_swept(loaded: LoadedRecipe) -> None:
    """The rules of a sweep. Raises RecipeError."""
    broken = [one for rule in SWEEP_RULES for one in rule(loaded.recipe)]
    if broken:
        raise RecipeError([loaded.problem(one.key, one.message) for one in broken])


def _refuse_few_sequences(loaded: LoadedRecipe, count: int) -> None:
    if count < LEAST_SEQUENCES:
        message = f"{count} held-out sequences give no interval to judge by; a sweep needs {LEAST_SEQUENCES} or more"
        raise DataError(loaded.problem("data.eval" if loaded.recipe.data.eval else "data.eval_fraction", message))


def _what_shapes_a_trial(loaded: LoadedRecipe) -> dict[str, Any]:
    """The recipe without what only names things, and what only reads the trials: eps, seeds, budget, exhaustive."""
    kept: dict[str, Any] = kept_keys(loaded.recipe.model_dump(mode="json"))
    section = loaded.recipe.rank_sweep
    kept["rank_sweep"] = {"ranks": list(section.ranks), "alpha": section.alpha, "tune_lr": section.tune_lr}
    if section.tune_lr:
        kept["rank_sweep"]["lr_trials"] = section.lr_trials
    return kept


def study_name(facts: Mapping[str, Any]) -> str:
    """The same for all who sweep the same base, rows and recipe, wherever their directories lie."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"lorafit-rank-sweep-{digest[:16]}"


def _refuse_another_sweep(loaded: LoadedRecipe, out: Path, facts: Mapping[str, Any]) -> None:
    """A sweep goes on with the recipe it was begun with. Raises RecipeError naming what changed."""
    if not (out / FACTS).is_file():
        return
    then, now = json.loads((out / FACTS).read_text(encoding="utf-8")), json.loads(json.dumps(facts))
    changed = list(changes(then.pop("recipe"), now.pop("recipe")))
    changed += [(f"the {name}", "another") for name in ("base", "data") if then[name] != now[name]]
    if changed:
        told = "; ".join(f"{key}: {change}" for key, change in changed[:4])
        message = f"holds a sweep that was begun otherwise ({told}); choose another output_dir, or change it back"
        raise RecipeError(Problem(str(out), message))


def _search(loaded: LoadedRecipe, study: Study, bench: Bench, *, out: Path, tuned: Tuned) -> Decision:
    """Train what the search asks for until it has its answer."""
    section = loaded.recipe.rank_sweep
    seeds = seeds_of(loaded)
    while True:
        outcomes = study.outcomes()
        found = decide(section, known(section, seeds, outcomes))
        if isinstance(found, Decision):
            return found
        wanted = _pieces(found, seeds, outcomes)
        if not any(_work_on(piece, loaded, study, bench, out=out, tuned=tuned) for piece in wanted):
            _wait()


def _wait() -> None:
    time.sleep(POLL)


def _pieces(wanted: Wanted, seeds: Iterable[int], outcomes: Mapping[str, Outcome]) -> Iterable[tuple[Job, int]]:
    """Runs to do, the most needed first; the likely ones only while another process has those."""
    for job in (*wanted.needed, *wanted.likely):
        for seed in seeds:
            if key_of(job, seed) not in outcomes:
                yield job, seed


def _work_on(
    piece: tuple[Job, int], loaded: LoadedRecipe, study: Study, bench: Bench, *, out: Path, tuned: Tuned
) -> bool:
    """Whether this process could have the piece, and has done it."""
    job, seed = piece
    claim = study.claim(key_of(job, seed))
    if claim is None:
        return False
    section = loaded.recipe.rank_sweep
    part = {THIRD: " to a third", TWO_THIRDS: " to two thirds", END: ""}[job.until]
    logger.info(f"rank {job.rank}: training{part}" + (f", seed {seed}" if section.seeds > 1 else ""))
    with claim:
        try:
            is_tuned = job.rank == section.ranks[-1] and seed == loaded.recipe.training.seed
            directory = run_of(out, job.rank, seed, name=tuned.run if is_tuned else None)
            trial = trial_recipe(
                loaded, rank=job.rank, seed=seed, learning_rate=tuned.learning_rate, output_dir=directory
            )
            outcome = run_trial(trial, until=job.until, bench=bench)
            if "failed" in outcome.facts and job.rank == section.ranks[-1]:
                raise HealthStop(str(outcome.facts["failed"]))
            losses = {str(third): of for third, of in outcome.losses.items()}
            facts = {"rank": job.rank, "seed": seed, **outcome.facts}
            if job.rank == section.ranks[-1]:
                cut, more = cut_to_smaller_ranks(loaded, trial, bench)
                losses, facts = losses | cut, facts | more
        except BaseException:
            claim.give_up()
            raise
        if job.until == END:  # before it counts: a killed process is not asked again once it does
            run = RunDir(trial.output_dir())
            remove_abandoned(run.path)
            remove_committed(run.checkpoints)  # nothing goes on from them
        claim.commit(facts, losses)
    logger.info(f"rank {job.rank}: " + _said(outcome.losses, outcome.facts))
    return True


def _said(losses: Mapping[int, SequenceLosses], facts: Mapping[str, Any]) -> str:
    if "failed" in facts:
        return f"stopped ({facts['failed']})"
    return f"held-out loss {losses[max(losses)].loss:.4f} after {facts['steps']} of {facts['planned_steps']} steps"
