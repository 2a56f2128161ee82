"""`lorafit train`, and the process that starts those that train together."""

import contextlib
import json
import shlex
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli.app import AsJson, Debug, Overrides, Quiet, RecipePath, app, print_result, quiet_libraries
from lorafit.cli.stderr import keep_quiet
from lorafit.errors import RecipeError
from lorafit.imports import quick_imports
from lorafit.launching import launch

if TYPE_CHECKING:
    from lorafit.launching.machines import Link
    from lorafit.launching.placement import Place
    from lorafit.launching.signals import StopRequest
    from lorafit.recipe import LoadedRecipe
    from lorafit.training.inputs import Inputs
    from lorafit.training.progress import Progress
    from lorafit.training.start_point import Begin
    from lorafit.training.train import TrainResult

OutputDir = Annotated[
    Path | None, typer.Option("--output-dir", metavar="DIR", help="The run directory, instead of the recipe's.")
]
Smoke = Annotated[
    bool,
    typer.Option("--smoke", help="Only try whether the recipe runs: in miniature, in seconds, leaving nothing behind."),
]

SelfTest = Annotated[
    bool,
    typer.Option(
        "--selftest",
        help="Only compare, on a few of its rows, what must come to the same: packed and single documents, one batch "
        "divided in two ways, the model with its adapter off and its base. A run does so by itself when model, "
        "attention, packing or versions are new.",
    ),
]

Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on after the newest checkpoint of the run directory that is whole, to the adapter that an undisturbed "
        "run gives; from the first step where there is none yet. A finished run is left as it is.",
    ),
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart",
        help="With --resume: where there are checkpoints and all of them are damaged, start over at the first step.",
    ),
]
MachineRank = Annotated[
    int | None,
    typer.Option("--machine-rank", metavar="I", help="With launch.machines: which of them this is, from 0."),
]
MainAddress = Annotated[
    str | None,
    typer.Option(
        "--main-address", metavar="HOST[:PORT]", help="With launch.machines: an address of machine 0; the port is free."
    ),
]


@app.command()
def train(
    context: typer.Context,
    recipe: RecipePath,
    set_: Overrides = None,
    output_dir: OutputDir = None,
    machine_rank: MachineRank = None,
    main_address: MainAddress = None,
    is_smoke: Smoke = False,
    selftest: SelfTest = False,
    resume: Resume = False,
    restart: Restart = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Audit the data, train an adapter, leave a run directory."""
    from lorafit.launching.signals import StopRequest

    stop = StopRequest(resume_command=_resume_command(), is_announced=not quiet and launch.rank() == 0)
    stop.listen()
    keep_quiet(launch.rank() != 0)  # of processes that train together the first one speaks
    from lorafit.recipe import load

    if restart and not resume:
        raise RecipeError("--restart goes with --resume; a new run needs an output_dir that is not used yet")
    if resume and (is_smoke or selftest):
        tried = "--smoke" if is_smoke else "--selftest"
        raise RecipeError(f"{tried} leaves nothing behind that --resume could go on from; write one of them")
    if is_smoke and selftest:
        raise RecipeError("--smoke tries a model in miniature, --selftest the recipe's own; write one of them")
    begin: Begin = "restart" if restart else "resume" if resume else "new"
    chosen_directory = [f"output_dir={json.dumps(str(output_dir))}"] if output_dir else []
    loaded = load(recipe, overrides=[*(set_ or ()), *chosen_directory])
    with contextlib.redirect_stdout(sys.stderr):  # stdout holds the result alone; some libraries print there
        if is_smoke:
            quiet_libraries(debug=debug)
            from lorafit.report.tables import smoke_table
            from lorafit.training.smoke import smoke

            miniature = smoke(loaded, output_dir=output_dir)
            result, text = asdict(miniature), smoke_table(miniature)
        elif selftest:
            quiet_libraries(debug=debug)
            from lorafit.data.cache import cache_directory
            from lorafit.report.selftest import selftest_table
            from lorafit.training.selftest_only import self_test_only

            tested = self_test_only(loaded, cache_dir=cache_directory())
            result, text = tested.result(), selftest_table(tested)
        else:
            from lorafit.storage.run_dir import RunDir
            from lorafit.storage.run_lock import held

            place = launch.place_of_this_machine(
                loaded.recipe.launch, context.obj or {}, rank=machine_rank, main_address=main_address
            )
            is_ours = launch.is_first_machine(loaded.recipe.launch) and place.rank == 0
            rank = launch.rank() if launch.is_worker() else None
            with held(RunDir(loaded.output_dir()), rank=rank) if is_ours else nullcontext():
                with quick_imports():
                    quiet_libraries(debug=debug)
                    from lorafit.preflight import this_machine
                    from lorafit.training.several_machines import met_by_recipe
                machine = this_machine()
                with met_by_recipe(loaded, place, begin=begin, device=machine.device, gpus=machine.gpus) as link:
                    trained = _train(loaded, stop, begin=begin, quiet=quiet, place=place, link=link)
            if trained is None or launch.rank() != 0:
                return
            from lorafit.report.tables import train_table
            from lorafit.tasks import TASKS

            result, text = asdict(trained), train_table(trained, task=TASKS[loaded.recipe.task])
    print_result(result, as_json=as_json, text=text)


def _resume_command() -> str:
    """What the user types to go on with a run that was stopped."""
    words = (word for word in sys.argv[1:] if word not in ("--resume", "--restart"))
    return shlex.join(["lorafit", *words, "--resume"])


def _train(
    loaded: "LoadedRecipe", stop: "StopRequest", *, begin: "Begin", quiet: bool, place: "Place", link: "Link | None"
) -> "TrainResult | None":
    """Train in this process, or first become the launcher of those that train; None where another machine has it."""
    with quick_imports():
        from lorafit.data.cache import cache_directory

    inputs = None
    if not launch.is_worker():
        inputs, is_over = _before_training(loaded, begin=begin, quiet=quiet, place=place, link=link)
        if is_over:
            return None
    with quick_imports():
        from lorafit.training.processes import leave_processes
        from lorafit.training.train import train as train_adapter

    is_main = launch.rank() == 0
    result = train_adapter(
        loaded,
        stop=stop,
        begin=begin,
        progress=_progress(quiet=quiet or not is_main),
        cache_dir=cache_directory(),
        inputs=inputs,
    )
    leave_processes()
    return result


def _before_training(
    loaded: "LoadedRecipe", *, begin: "Begin", quiet: bool, place: "Place", link: "Link | None"
) -> "tuple[Inputs | None, bool]":
    """What this process has read for its run, which does not return where others train it; whether all is said."""
    with quick_imports():
        from lorafit.data.cache import cache_directory
        from lorafit.preflight import refuse_what_this_machine_lacks, this_machine
        from lorafit.training.inputs import read_inputs, refuse_before_reading
        from lorafit.training.several_machines import ready_to_start, tell_others, told_by_first

    machine = this_machine()
    if link is None or link.is_first:
        start = None if _is_finished(loaded, begin=begin) else refuse_before_reading(loaded, machine, begin=begin)
        if link is not None:
            tell_others(link, loaded, start)
        if start is None:
            return None, False
        as_of = start.as_of
    else:
        refuse_what_this_machine_lacks(loaded, machine)
        is_finished, as_of = told_by_first(link, loaded)
        if is_finished:
            return None, True
    starts_others = launch.needs_processes(loaded.recipe.launch, gpus=machine.gpus, place=place)
    meanwhile = None if starts_others else "lorafit.training.train"
    inputs = read_inputs(loaded, cache_dir=cache_directory(), as_of=as_of, meanwhile=meanwhile, show_progress=not quiet)
    if starts_others:
        from lorafit.launching.signals import hold_back

        handed = None
        if link is not None:
            place = replace(place, port=ready_to_start(link, inputs))
            launch.use_interface(link.interface())
            handed = link.handed_over()
        is_ours = launch.is_first_machine(loaded.recipe.launch) and place.rank == 0
        command = launch.launch_command(
            loaded.recipe.launch,
            sys.argv[1:],
            gpus=machine.gpus,
            run=loaded.output_dir() if is_ours else None,
            place=place,
            link=handed,
        )
        hold_back()
        launch.replace_this_process(command)
    return inputs, False


def _progress(*, quiet: bool) -> "Progress | None":
    """A bar on a terminal, lines in a log file, a pipe or a notebook."""
    from lorafit.training.progress import ProgressBar, ProgressLines

    return None if quiet else ProgressBar if sys.stderr.isatty() else ProgressLines


def _is_finished(loaded: "LoadedRecipe", *, begin: "Begin") -> bool:
    """Whether a run that is to go on has come to its end: no processes are needed to say so."""
    from lorafit.storage.run_dir import RunDir
    from lorafit.training.start_point import finished_manifest

    return begin != "new" and finished_manifest(loaded, RunDir(loaded.output_dir())) is not None


@app.command(
    hidden=True, add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def processes(
    context: typer.Context,
    run_dir: Annotated[Path | None, typer.Option("--run-dir")] = None,
    link: Annotated[str | None, typer.Option("--link")] = None,
) -> None:
    """`accelerate launch`, ending with the exit code of the process that failed; what `train` turns itself into."""
    from lorafit.launching.signals import PassOn

    requests = PassOn()
    requests.listen()
    keep_quiet()  # those that train speak
    from lorafit.launching.handed_over import handed_over
    from lorafit.storage.run_dir import RunDir
    from lorafit.storage.run_lock import held

    with nullcontext() if run_dir is None else held(RunDir(run_dir)), handed_over(link) as others:
        from lorafit.training.processes import run_processes

        code = run_processes(context.args, requests=requests, link=others)
        if others is not None:
            others.close(code)
        raise typer.Exit(code)
