"""`lorafit rank-sweep`."""

import contextlib
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.app import AsJson, Debug, Overrides, Quiet, RecipePath, app, print_result, quiet_libraries
from lorafit.errors import StopRequested
from lorafit.imports import quick_imports
from lorafit.launching import launch
from lorafit.tasks import TASKS


@app.command()
def rank_sweep(
    recipe: RecipePath,
    set_: Overrides = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", metavar="DIR", help="The sweep's directory, instead of the recipe's.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", metavar="N", help="Runs of each rank.")] = None,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Train every rank in full.")] = False,
    tune_lr: Annotated[
        bool, typer.Option("--tune-lr", help="Look for the learning rate at the largest rank first.")
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            help="Optuna storage that several machines share: a database URL or a journal file.",
        ),
    ] = None,
    is_worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The smallest rank that is as good as the largest. The same command goes on with a sweep that was stopped."""
    from lorafit.launching.signals import StopRequest
    from lorafit.recipe import load

    def new_stop() -> StopRequest:
        stop = StopRequest(resume_command=shlex.join(["lorafit", *sys.argv[1:]]), is_announced=not quiet)
        stop.listen()
        return stop

    new_stop()
    chosen = {"output_dir": None if output_dir is None else json.dumps(str(output_dir)), "rank_sweep.seeds": seeds}
    chosen |= {"rank_sweep.exhaustive": exhaustive or None, "rank_sweep.tune_lr": tune_lr or None}
    overrides = [f"{key}={str(value).lower() if value is True else value}" for key, value in chosen.items() if value]
    loaded = load(recipe, overrides=[*(set_ or ()), *overrides])
    with contextlib.redirect_stdout(sys.stderr):  # stdout holds the result alone; some libraries print there
        with quick_imports():
            quiet_libraries(debug=debug)
            from lorafit.data.cache import cache_directory
            from lorafit.preflight import this_machine
            from lorafit.report.rank_sweep import sweep_table
            from lorafit.sweep.sweep import rank_sweep as sweep
            from lorafit.sweep.sweep import refuse_what_cannot_be_swept
            from lorafit.sweep.workers import run_side_by_side

        refuse_what_cannot_be_swept(loaded)
        gpus = this_machine().gpus
        count = launch.processes_asked_for(loaded.recipe.launch, gpus=gpus)
        if (count > 1 or gpus > 1) and not is_worker:  # with several GPUs in sight a trainer takes them all
            codes = run_side_by_side(sys.argv[1:], count=count, gpus=gpus)
            if StopRequested.exit_code in codes or all(codes):  # they have said why
                raise typer.Exit(max(codes) if max(codes) > 0 else 1)
            new_stop()
        result = sweep(loaded, storage=storage, cache_dir=cache_directory(), new_stop=new_stop)
    if not is_worker:
        print_result(asdict(result), as_json=as_json, text=sweep_table(result, task=TASKS[loaded.recipe.task]))
