"""The command line: parse, load, call, print.

The only place that imports inside functions: `lorafit --help` and `lorafit validate` must answer without torch.
"""

import contextlib
import errno
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorafit import __version__, launch
from lorafit.errors import DiskError, LorafitError, RecipeError, StopRequested

if TYPE_CHECKING:
    from lorafit.recipe import LoadedRecipe
    from lorafit.training.train import TrainResult

app = typer.Typer(
    name="lorafit",
    help="One validated YAML recipe in, a LoRA or QLoRA adapter out.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The YAML recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key of the recipe; may be repeated."),
]
OutputDir = Annotated[
    Path | None, typer.Option("--output-dir", metavar="DIR", help="The run directory, instead of the recipe's.")
]
Smoke = Annotated[
    bool,
    typer.Option("--smoke", help="Only try whether the recipe runs: in miniature, in seconds, leaving nothing behind."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, too.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lorafit {__version__}")
        raise typer.Exit


@app.callback()
def lorafit(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One validated YAML recipe in, a LoRA or QLoRA adapter out."""


def _print_result(result: dict[str, Any], *, as_json: bool, text: str) -> None:
    """The result on stdout: JSON for scripts, `text` for people."""
    print(json.dumps(result, ensure_ascii=False, allow_nan=False) if as_json else text)


def _say(*, quiet: bool) -> Callable[[str], None]:
    """Takes one line for people at a time; on stderr, so that stdout holds the result alone."""
    return (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))


def _quiet_libraries(*, debug: bool) -> None:
    """Keep the libraries' own notices and bars off the terminal; `--debug` shows them.

    What they warn of and matters is checked by lorafit itself, which then says so in its own words.
    """
    if debug:
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in ("transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from datasets.utils.logging import disable_progress_bar as hide_datasets_bars
    from transformers.utils import logging as transformers_logging

    hide_datasets_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # importing it resets the level set above


def _report(error: LorafitError) -> int:
    """Print every problem as one line on stderr, by one process of those that train together; the exit code."""
    if launch.is_first_to_fail():
        process = f"process {launch.rank()}: " if launch.is_worker() else ""
        for problem in error.problems:
            print(f"error: {process}{problem}", file=sys.stderr)
    return error.exit_code


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
        _quiet_libraries(debug=debug)
        if is_smoke:
            from lorafit.report.tables import smoke_table
            from lorafit.training.smoke import smoke

            tried = smoke(loaded, say=_say(quiet=quiet), output_dir=output_dir)
            result, text = asdict(tried), smoke_table(tried)
        else:
            trained = _train(loaded, quiet=quiet)
            if launch.rank() != 0:
                return
            from lorafit.report.tables import train_table

            result, text = asdict(trained), train_table(trained)
    _print_result(result, as_json=as_json, text=text)


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
        say=_say(quiet=quiet or not is_main),
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


def _exit_code(arguments: list[str]) -> int:
    try:
        return app(arguments, prog_name="lorafit", standalone_mode=False) or 0
    except LorafitError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _report(error)
    except typer.TyperException as error:
        known = {command.callback.__name__ for command in app.registered_commands if command.callback}
        command = "lorafit " + " ".join(word for word in arguments[:1] if word in known)
        said = error.format_message().replace(" Value error,", "")
        return _report(RecipeError(f"{said} (see `{command.strip()} --help`)"))
    except (KeyboardInterrupt, typer.Abort):
        return _report(StopRequested("stopped on request; nothing was written"))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            raise
        return _report(
            DiskError(
                f"{error.strerror}; free some space or choose another output_dir", where=str(error.filename or "")
            )
        )


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a plain PEFT adapter directory.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: RUN/merged.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option("--dtype", help="Type of the weights; by default each keeps the base's."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help="As in 5GB; by default the base's files.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Hub id or directory, instead of the recorded base.")
    ] = None,
    onto: Annotated[
        Literal["original", "dequantized", "auto"] | None,
        typer.Option("--onto", help="After training in 4 or 8 bits: which weights to merge into (merge.base)."),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Read it back and compare it with base + adapter (merge.verify)."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base: a standalone model that plain transformers loads."""
    _quiet_libraries(debug=debug)
    from lorafit.merging.merge import merge as merge_adapter
    from lorafit.preflight import cache_directory
    from lorafit.report.merge import merge_table, progress_in_bytes

    result = merge_adapter(
        run,
        out=out,
        dtype=dtype,
        max_shard_size=max_shard_size,
        base=base,
        onto=onto,
        verify=verify,
        say=_say(quiet=quiet),
        progress=progress_in_bytes(is_shown=sys.stderr.isatty() and not quiet),
        cache_dir=cache_directory(),
    )
    _print_result(asdict(result), as_json=as_json, text=merge_table(result))


@app.command()
def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="RUN:WEIGHT...", help="Run or adapter directories, each with its weight.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the new adapter goes; never overwritten.")],
    method: Annotated[
        Literal[
            "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "magnitude_prune"
        ],
        typer.Option("--method", help="cat is the exact sum; svd the nearest to it of one rank."),
    ] = "cat",
    density: Annotated[
        float | None, typer.Option("--density", help="Share of entries that ties, dare and magnitude_prune keep.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of the new adapter, for the svd methods.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="For dare, which drops entries at random.")] = 0,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Hub id or directory, instead of the recorded base.")
    ] = None,
    loss: Annotated[bool, typer.Option(help="Compare the held-out losses of the runs; loads the base.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make one adapter of several of the same base."""
    _quiet_libraries(debug=debug)
    from lorafit.merging.combine import combine as combine_adapters
    from lorafit.merging.combine import weighted
    from lorafit.preflight import cache_directory
    from lorafit.report.merge import combine_table

    result = combine_adapters(
        [weighted(text) for text in adapters],
        out=out,
        method=method,
        density=density,
        rank=rank,
        seed=seed,
        base=base,
        with_losses=loss,
        say=_say(quiet=quiet),
        cache_dir=cache_directory(),
    )
    _print_result(asdict(result), as_json=as_json, text=combine_table(result))


@app.command()
def targets(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, Hub id, or shipped shape (llama3-8b).")],
    r: Annotated[int, typer.Option("--r", min=1, help="Rank to count adapter parameters at.")] = 16,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the modules of a model that lora.target_modules may name, with shapes, counts and adapter size."""
    from transformers.utils import logging as transformers_logging

    if not debug:
        transformers_logging.set_verbosity_error()
    from lorafit.planning.known_shapes import architecture
    from lorafit.planning.targets import target_table
    from lorafit.recipe.sections import ModelSection
    from lorafit.report.target_table import target_table_text

    table = target_table(architecture(ModelSection(model_name_or_path=model)), r=r)
    _print_result(table.as_dict(), as_json=as_json, text=target_table_text(table))


@app.command()
def validate(
    recipe: RecipePath,
    set_: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Name every problem of a recipe and its data files, or say what the run will do."""
    from lorafit.report.validation import validation_text
    from lorafit.validate import validate as validated

    result = validated(recipe, overrides=set_ or ())
    _print_result(result.as_dict(), as_json=as_json, text=validation_text(result))
    say = _say(quiet=quiet)
    for warning in result.data.warnings:
        say(f"warning: {warning}")
    for advice in result.advice:
        say(f"advice: {advice}")


@app.command()
def preview(
    recipe: RecipePath,
    set_: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows to show of each side.")] = 3,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page instead.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the first rows as the model will see them: tokens, which are trained, stop token, lengths."""
    from lorafit.recipe import load

    loaded = load(recipe, overrides=set_ or ())
    _quiet_libraries(debug=debug)
    from lorafit.data.preview import recipe_preview
    from lorafit.preflight import cache_directory
    from lorafit.report.preview import preview_page, preview_text

    result = recipe_preview(loaded.recipe, rows=rows, cache_dir=cache_directory())
    say = _say(quiet=quiet)
    for warning in result.audit.warnings:
        say(f"warning: {warning}")
    if html is not None:
        html.write_text(preview_page(result), encoding="utf-8")
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ  # https://no-color.org
    text = f"{html}: open it in a browser" if html is not None else preview_text(result, in_colour=in_colour)
    _print_result(result.as_dict(), as_json=as_json, text=text)


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it here.")] = None,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of a recipe: every key with its meaning, for editors."""
    from lorafit.recipe.schema import recipe_schema
    from lorafit.recipe.write import write_file

    text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False)
    if output is None:
        print(text)
    else:
        write_file(output, f"{text}\n", overwrite=True)


@app.command()
def init(
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Hub id or directory of the base model.")
    ] = "Qwen/Qwen3-0.6B",
    data: Annotated[
        str, typer.Option("--data", metavar="DATA", help="File, directory, glob or Hub id of the rows.")
    ] = "train.jsonl",
    preset: Annotated[Literal["lora", "qlora", "dora"], typer.Option("--preset", help="Kind of adapter.")] = "lora",
    goal: Annotated[
        Literal["style", "knowledge", "code"], typer.Option("--goal", help="What it is to learn.")
    ] = "knowledge",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the recipe goes; never overwritten.")
    ] = Path("recipe.yaml"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a commented recipe to start from."""
    from lorafit.data.familiar import familiar_mapping
    from lorafit.recipe.starter import starter_recipe, write_recipe

    mapping = familiar_mapping(data)
    text = starter_recipe(model=model, data=data, mapping=mapping, preset=preset, goal=goal, output=output)
    write_recipe(text, output)
    _print_result({"recipe": str(output)}, as_json=as_json, text=f"{output}: next, `lorafit validate {output}`")


def main() -> None:
    """Entry point of the `lorafit` command."""
    if launch.is_worker():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches them all; the launcher alone speaks of it
    try:
        sys.exit(_exit_code(sys.argv[1:]))
    except Exception:
        # One that fails only because another did is ended by the launcher meanwhile, and says nothing.
        if launch.is_worker():
            time.sleep(2)
            if not launch.is_first_to_fail():
                sys.exit(1)
        raise
