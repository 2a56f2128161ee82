"""`lorafit plan`."""

from typing import Annotated

import typer

from lorafit.cli.app import AsJson, Debug, Overrides, Quiet, RecipePath, app, print_result


@app.command()
def plan(
    recipe: RecipePath,
    set_: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="GPU", help="A name (rtx4090, a100-80) or a size (24GiB); by default this machine's."
        ),
    ] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="GPUs that train together.")] = None,
    model_shape: Annotated[
        str | None, typer.Option("--model-shape", metavar="SHAPE", help="A shipped shape (llama3-8b), for the model.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say whether a recipe fits, how fast it is and what to change, before anything is downloaded or loaded."""
    from lorafit.planning.gpus import gpu_named, gpu_of_this_machine
    from lorafit.planning.plan import Question, ask
    from lorafit.recipe import load
    from lorafit.report.plan import plan_text

    loaded = load(recipe, overrides=set_ or ())
    asked = count or loaded.recipe.launch.num_processes
    if gpu is not None:
        one, number = gpu_named(gpu), 1 if asked == "auto" else asked
    else:
        from lorafit.preflight import this_machine

        machine = this_machine()
        one, number = gpu_of_this_machine(machine), machine.gpus if asked == "auto" else asked
    result = ask(Question(loaded, one, number, model_shape))
    print_result(result.as_dict(), as_json=as_json, text=plan_text(result))
