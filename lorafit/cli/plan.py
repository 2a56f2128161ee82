"""`lorafit plan`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.app import AsJson, Debug, Overrides, Quiet, RecipePath, app, print_result

logger = logging.getLogger(__name__)


@app.command()
def plan(
    recipe: RecipePath,
    set_: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="GPU",
            help="A name (rtx4090, a100-80), a size (24GiB), or cpu; else what is here.",
        ),
    ] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="GPUs that train together.")] = None,
    model_shape: Annotated[
        str | None, typer.Option("--model-shape", metavar="SHAPE", help="A shipped shape (llama3-8b), for the model.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="End with exit code 4 when it does not fit.")] = False,
    largest: Annotated[
        bool, typer.Option("--largest", help="Find the largest batch, the longest rows and the highest rank that fit.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run one step and one evaluation for real, on this machine.")
    ] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Write a recipe that fits.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where --fix writes; by default RECIPE-fits.yaml."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say whether a recipe fits, how fast it is and what to change, before anything is downloaded or loaded."""
    from lorafit.planning.ask_planner import Question, ask, refuse_to_overwrite, write_fixed
    from lorafit.planning.ask_planner import measure as measured_too
    from lorafit.planning.gpus import asked_for
    from lorafit.recipe import load
    from lorafit.report.plan import plan_text

    loaded = load(recipe, overrides=set_ or ())
    one, number = asked_for(loaded.recipe.launch, gpu=gpu, count=count)
    out = output or recipe.with_name(f"{recipe.stem}-fits.yaml")
    if fix:
        refuse_to_overwrite(out)
    question = Question(loaded, one, number, model_shape, with_largest=largest, with_fix=fix)
    result = ask(question)
    if measure:
        result = measured_too(question, result)
    print_result(result.as_dict(), as_json=as_json, text=plan_text(result))
    if fix:
        logger.info(write_fixed(question, result, out))
    if check and not result.fits:
        raise typer.Exit(4)
