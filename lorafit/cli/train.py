"""`lorafit train`, and the process that starts those that train together."""

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit import launch
from lorafit.cli.app import AsJson, Debug, Overrides, Quiet, RecipePath, app, print_result, quiet_libraries, speaker

if TYPE_CHECKING:
    from lorafit.recipe import LoadedRecipe
    from lorafit.training.train import TrainResult

OutputDir = Annotated[
    Path | None, typer.Option("--output-dir", metavar="DIR", help="The run directory, instead of the recipe's.")
]
Smoke = Annotated[
    bool,
    typer.Option("--smoke", help="Only try whether the recipe runs: in miniature, in seconds, leaving nothing behind."),
]


@app.command()
def train(
    recipe: RecipePath,
    set_: Overrides = None,
    output_dir: OutputDir = None,
    is_smoke: Smoke = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Audit the data, train an adapter, leave a run directory."""
    from lorafit.recipe import load

    chosen_directory = [f"output_dir={json.dumps(str(output_dir))}"] if output_dir else []
    loaded = load(recipe, overrides=[*(set_ or ()), *chosen_directory])
    with contextlib.redirect_stdout(sys.stderr):  # stdout holds the result alone; some libraries print there
        quiet_libraries(debug=debug)
        if is_smoke:
            from lorafit.report.tables import smoke_table
            from lorafit.training.smoke import smoke

            tried = smoke(loaded, say=speaker(quiet=quiet), output_dir=output_dir)
            result, text = asdict(tried), smoke_table(tried)
        else:
            trained = _train(loaded, quiet=quiet)
            if launch.rank() != 0:
                return
            from lorafit.report.tables import train_table

            result, text = asdict(trained), train_table(trained)
    print_result(result, as_json=as_json, text=text)


def _train(loaded: "LoadedRecipe", *, quiet: bool) -> "TrainResult":
    """Train in this process, or first become the launcher of those that train."""
    from lorafit.preflight import cache_directory, this_machine

    machine = this_machine()
    if launch.needs_processes(loaded.recipe.launch, gpus=machine.gpus):
        from lorafit.training.inputs import read_inputs, refuse_before_reading

        refuse_before_reading(loaded, machine)
        read_inputs(loaded, cache_dir=cache_directory())
        launch.replace_this_process(launch.launch_command(loaded.recipe.launch, sys.argv[1:], gpus=machine.gpus))
    from lorafit.processes import leave_processes
    from lorafit.training.train import train as train_adapter

    is_main = launch.rank() == 0
    result = train_adapter(
        loaded,
        say=speaker(quiet=quiet or not is_main),
        show_progress=sys.stderr.isatty() and not quiet and is_main,
        cache_dir=cache_directory(),
    )
    leave_processes()
    return result


@app.command(
    hidden=True, add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def processes(context: typer.Context) -> None:
    """`accelerate launch`, ending with the exit code of the process that failed; what `train` turns itself into."""
    from lorafit.processes import run_processes

    raise typer.Exit(run_processes(context.args))
