"""The answer on disk: sweep.json, best.yaml, spectrum.json, and the adapter where it was only cut so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorafit.recipe import LoadedRecipe
from lorafit.storage.files import write_file
from lorafit.sweep.cut_to_rank import SPECTRUM, write_cut_run
from lorafit.sweep.keys import key_of, known, run_of, seeds_of
from lorafit.sweep.search import END, Decision, Job, Verdict
from lorafit.sweep.study import Outcome, Study
from lorafit.sweep.sweep_result import ModuleSpectrum, RankRow, Spectra, SweepResult
from lorafit.sweep.trial import Bench, trial_recipe
from lorafit.sweep.truncate import ranks_that_keep
from lorafit.sweep.tune import Tuned
from lorafit.tasks import TASKS

RESULT, BEST, SPECTRA = "sweep.json", "best.yaml", "spectrum.json"


def write_sweep(
    loaded: LoadedRecipe,
    decision: Decision,
    study: Study,
    bench: Bench,
    *,
    out: Path,
    tuned: Tuned,
    wait: Callable[[], None],
) -> SweepResult:
    """The result, after it is on disk; by one process at a time."""
    while (claim := study.claim("the answer")) is None:
        wait()
    with claim:
        try:
            adapter = _adapter(loaded, decision, bench, out=out, tuned=tuned)
            result = _result(loaded, decision, study.outcomes(), out=out, tuned=tuned, adapter=adapter)
            write_file(out / BEST, _best_yaml(loaded, result, out=out))
            _write_spectra(loaded, decision, out=out, tuned=tuned)
            facts = {key: value for key, value in asdict(result).items() if key != "out"}
            for name in ("recipe", "adapter"):  # the directory can be moved
                facts[name] = facts[name] and str(Path(facts[name]).relative_to(out))
            write_file(out / RESULT, json.dumps(facts, indent=2) + "\n")
        finally:
            claim.give_up()
    return result


def _largest(loaded: LoadedRecipe, *, out: Path, tuned: Tuned) -> LoadedRecipe:
    rank, seed = loaded.recipe.rank_sweep.ranks[-1], seeds_of(loaded)[0]
    return trial_recipe(
        loaded,
        rank=rank,
        seed=seed,
        learning_rate=tuned.learning_rate,
        output_dir=run_of(out, rank, seed, name=tuned.run),
    )


def _adapter(loaded: LoadedRecipe, decision: Decision, bench: Bench, *, out: Path, tuned: Tuned) -> Path | None:
    """The run directory with the chosen rank's adapter, if it is on this machine."""
    seed, verdict = seeds_of(loaded)[0], decision.verdicts[decision.rank]
    largest = _largest(loaded, out=out, tuned=tuned)
    if verdict.decided_by != "truncated":
        is_largest = decision.rank == loaded.recipe.rank_sweep.ranks[-1]
        run = largest.output_dir() if is_largest else run_of(out, decision.rank, seed)
        return run if (run / "adapter").is_dir() else None
    target = run_of(out, decision.rank, seed, name=f"rank-{decision.rank}-cut-from-{largest.recipe.lora.r}")
    if not target.is_dir() and (largest.output_dir() / "adapter").is_dir() and verdict.losses is not None:
        write_cut_run(loaded, largest, bench, rank=decision.rank, loss=verdict.losses.loss, target=target)
    return target if target.is_dir() else None


def _result(
    loaded: LoadedRecipe,
    decision: Decision,
    outcomes: Mapping[str, Outcome],
    *,
    out: Path,
    tuned: Tuned,
    adapter: Path | None,
) -> SweepResult:
    section, seeds = loaded.recipe.rank_sweep, seeds_of(loaded)
    latest = {(rank, seed): _latest(rank, seed, outcomes) for rank in section.ranks for seed in seeds}
    rows = tuple(_row(rank, loaded, decision, outcomes, latest) for rank in section.ranks)
    chosen = decision.verdicts[decision.rank]
    whole = {seed: latest[section.ranks[-1], seed]["tokens"] for seed in seeds}
    in_full = [facts["tokens"] if facts.get("until") == END else whole[seed] for (_, seed), facts in latest.items()]
    return SweepResult(
        out=str(out),
        chosen_rank=decision.rank,
        eps=chosen.comparison.eps if chosen.comparison else 0.0,
        reference_rank=decision.reference,
        is_monotone=decision.is_monotone,
        alpha=section.alpha,
        learning_rate=tuned.learning_rate,
        seeds=seeds,
        eval_sequences=0 if chosen.losses is None else len(chosen.losses.tokens),
        trials=rows,
        tokens_trained=sum(row.tokens for row in rows),
        tokens_exhaustive=sum(in_full),
        tokens_tuning=sum(
            one.tokens for number, one in enumerate(tuned.tried) if tuned.run != f"learning-rate-{number}"
        ),
        learning_rates=tuned.tried,
        recipe=str(out / BEST),
        adapter=None if adapter is None else str(adapter),
        seconds=round(sum(facts.get("seconds", 0.0) for facts in latest.values()), 2),
    )


def _latest(rank: int, seed: int, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The facts of the furthest that this run was trained; empty where it was not."""
    for until in (3, 2, 1):
        if outcome := outcomes.get(key_of(Job(rank, until), seed)):
            return {**outcome.facts, "until": until}
    return {}


def _row(
    rank: int,
    loaded: LoadedRecipe,
    decision: Decision,
    outcomes: Mapping[str, Outcome],
    latest: Mapping[tuple[int, int], dict[str, Any]],
) -> RankRow:
    section, seeds = loaded.recipe.rank_sweep, seeds_of(loaded)
    verdict: Verdict = decision.verdicts[rank]
    runs = [latest[rank, seed] for seed in seeds if latest[rank, seed]]
    sizes = latest[section.ranks[-1], seeds[0]]["sizes"][str(rank)]
    cut = known(section, seeds, outcomes).truncated.get(rank)
    difference = verdict.comparison.difference if verdict.comparison else None
    loss = verdict.losses.loss if verdict.losses else None
    reference = None if loss is None or difference is None else loss - difference.mean
    return RankRow(
        rank=rank,
        decided_by=verdict.decided_by,
        is_sufficient=verdict.is_sufficient,
        share=None if verdict.thirds is None else round(verdict.thirds / END, 2),
        loss=loss,
        low=None if reference is None or difference is None else reference + difference.low,
        high=None if reference is None or difference is None else reference + difference.high,
        difference=difference,
        eps=verdict.comparison.eps if verdict.comparison else None,
        losses_by_seed=() if verdict.decided_by == "truncated" else _by_seed(rank, seeds, verdict, outcomes),
        truncated_loss=None if cut is None else cut.loss,
        parameters=sizes[0],
        adapter_bytes=sizes[1],
        tokens=sum(facts["tokens"] for facts in runs),
        seconds=round(sum(facts["seconds"] for facts in runs), 2) if runs else None,
        peak_memory_bytes=max((facts.get("peak_memory_bytes", 0) for facts in runs), default=None),
    )


def _by_seed(rank: int, seeds: tuple[int, ...], verdict: Verdict, outcomes: Mapping[str, Outcome]) -> tuple[float, ...]:
    found = []
    for seed in seeds:
        for until in (3, 2, 1):
            outcome = outcomes.get(key_of(Job(rank, until), seed))
            if outcome is not None and str(verdict.thirds) in outcome.losses:
                found.append(outcome.losses[str(verdict.thirds)].loss)
                break
    return tuple(found)


def _best_yaml(loaded: LoadedRecipe, result: SweepResult, *, out: Path) -> str:
    """The recipe with the chosen rank; its paths relative to the sweep's directory, where it lies."""
    best = trial_recipe(
        loaded,
        rank=result.chosen_rank,
        seed=loaded.recipe.training.seed,
        learning_rate=result.learning_rate,
        output_dir=None,
    )
    row, task = next(row for row in result.trials if row.rank == result.chosen_rank), TASKS[loaded.recipe.task]
    within = f"{result.eps:.4f} {task.unit} a {task.counted}"
    head = [
        f"# Rank {result.chosen_rank}: the smallest of {', '.join(str(row.rank) for row in result.trials)} that is as",
        f"# good as rank {result.reference_rank} within {within} ({row.decided_by}).",
        *(
            [
                f"# The adapter in {Path(result.adapter or '').name} was cut from rank {result.trials[-1].rank}. "
                "A run of this recipe learns its own,",
                "# which may be worse: the sweep did not train this rank to its end.",
            ]
            if row.decided_by == "truncated"
            else []
        ),
        f"# Run  lorafit train {result.recipe} --output-dir {out}-rank-{result.chosen_rank}",
    ]
    return "\n".join(head) + "\n" + best.yaml(relative_to=out)


def _write_spectra(loaded: LoadedRecipe, decision: Decision, *, out: Path, tuned: Tuned) -> None:
    largest = _largest(loaded, out=out, tuned=tuned)
    file = largest.output_dir() / SPECTRUM
    if not file.is_file():
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    ranks, kept = ranks_that_keep(
        {name: torch.tensor(of, dtype=torch.float64) for name, of in values.items()}, rank=decision.rank
    )
    spectra = Spectra(
        rank=largest.recipe.lora.r,
        chosen_rank=decision.rank,
        share_kept=kept,
        modules=tuple(ModuleSpectrum(name, tuple(of), ranks[name]) for name, of in values.items()),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != decision.rank},
    )
    write_file(out / SPECTRA, json.dumps(asdict(spectra), indent=2) + "\n")
