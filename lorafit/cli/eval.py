"""`lorafit eval`."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.app import AsJson, Debug, Overrides, Quiet, app, counting, print_result, quiet_libraries
from lorafit.errors import VerificationError
from lorafit.imports import quick_imports


@app.command(name="eval")
def evaluate(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run directory, or a plain PEFT adapter: directory or Hub id.")
    ],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="Rows to measure on, instead of the run's held-out.")
    ] = None,
    merged: Annotated[
        Path | None, typer.Option("--merged", metavar="DIR", help="The merged model; RUN/merged where there is one.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Hub id or directory, instead of the recorded base.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="TASK", help="Task of lm-evaluation-harness, by name or file; repeatable."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Show so many generated answers side by side.")
    ] = None,
    fail_if_worse: Annotated[
        bool, typer.Option("--fail-if-worse", help="Exit with 5 where the adapter is worse with confidence.")
    ] = False,
    set_: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare base, adapter and merged model on held-out rows, with confidence intervals."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout holds the result alone; some libraries print there
        with quick_imports():
            quiet_libraries(debug=debug)
            from lorafit.data.cache import cache_directory
            from lorafit.evaluation.evaluate import evaluate as evaluated
            from lorafit.report.evaluation import eval_table

        named = [task.strip() for given in tasks or () for task in given.split(",") if task.strip()]
        result = evaluated(
            run,
            data=data,
            merged=merged,
            base=base,
            tasks=named,
            samples=samples,
            fail_if_worse=fail_if_worse,
            overrides=set_ or (),
            counting=counting(quiet=quiet),
            cache_dir=cache_directory(),
        )
    print_result(result.as_dict(), as_json=as_json, text=eval_table(result, samples=samples or 0))
    if fail_if_worse and (worse := result.is_worse()):
        raise VerificationError(f"worse than the base with confidence: {', '.join(worse)}", where=run)
