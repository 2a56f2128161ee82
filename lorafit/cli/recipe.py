"""What is asked of a recipe, a model or data before any training: targets, validate, preview, schema, init."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from lorafit.cli.app import AsJson, Debug, Overrides, Quiet, RecipePath, app, print_result, quiet_libraries
from lorafit.errors import RecipeError
from lorafit.imports import quick_imports

logger = logging.getLogger(__name__)


@app.command()
def targets(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, Hub id, or shipped shape (llama3-8b).")],
    r: Annotated[int, typer.Option("--r", min=1, help="Rank to count adapter parameters at.")] = 16,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the modules of a model that lora.target_modules may name, with shapes, counts and adapter size."""
    with quick_imports():
        from transformers.utils import logging as transformers_logging

        if not debug:
            transformers_logging.set_verbosity_error()
        from lorafit.planning.known_shapes import architecture
        from lorafit.planning.targets import target_table
        from lorafit.recipe.sections import ModelSection
        from lorafit.report.target_table import target_table_text

    table = target_table(architecture(ModelSection(model_name_or_path=model)), r=r)
    print_result(table.as_dict(), as_json=as_json, text=target_table_text(table))


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
    from lorafit.validation import validate as validated

    result = validated(recipe, overrides=set_ or (), show_progress=not quiet)
    print_result(result.as_dict(), as_json=as_json, text=validation_text(result))
    for warning in result.data.warnings:
        logger.warning(warning)
    for advice in result.advice:
        logger.info(f"advice: {advice}")


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
    quiet_libraries(debug=debug)
    from lorafit.data.cache import cache_directory
    from lorafit.data.preview import recipe_preview
    from lorafit.recipe.recipe_yaml import write_asked_for
    from lorafit.report.preview import preview_page, preview_text

    try:
        result = recipe_preview(loaded.recipe, rows=rows, cache_dir=cache_directory(), show_progress=not quiet)
    except RecipeError as error:
        raise loaded.placed(error) from None
    for warning in result.audit.warnings:
        logger.warning(warning)
    if html is not None:
        write_asked_for(html, preview_page(result), option="--html", overwrite=True)
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ  # https://no-color.org
    text = f"{html}: open it in a browser" if html is not None else preview_text(result, in_colour=in_colour)
    print_result(result.as_dict(), as_json=as_json, text=text, is_styled=html is None)


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it here.")] = None,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of a recipe: every key with its meaning, for editors."""
    from lorafit.recipe.recipe_yaml import write_asked_for
    from lorafit.recipe.schema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False)
    if output is None:
        print(text)
    else:
        write_asked_for(output, f"{text}\n", option="--output", overwrite=True)


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
    from lorafit.base_at_hand import positions_at_hand
    from lorafit.data.answer_pattern import LOOKED_AT, answer_pattern, answers_of
    from lorafit.data.directory import splits_of
    from lorafit.data.guess_columns import familiar_mapping, first_rows
    from lorafit.recipe.starter import starter_recipe, write_recipe

    data, held_out = splits_of(data) or (data, None)
    mapping = familiar_mapping(data)
    answers = answers_of(first_rows(data, LOOKED_AT), mapping.get("columns", {}).get("completion"))
    text = starter_recipe(
        model=model,
        data=data,
        mapping=mapping,
        held_out=held_out,
        answer=answer_pattern(answers),
        positions=positions_at_hand(model),
        preset=preset,
        goal=goal,
        output=output,
    )
    write_recipe(text, output)
    print_result({"recipe": str(output)}, as_json=as_json, text=f"{output}: next, `lorafit validate {output}`")


@app.command()
def launch_file(
    recipe: RecipePath,
    system: Annotated[
        Literal["slurm", "kubernetes", "skypilot"], typer.Option("--for", help="What the machines are managed by.")
    ],
    machines: Annotated[
        int | None, typer.Option("--machines", min=1, help="How many, where launch.machines does not say.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Print the file that trains a recipe on several machines: a batch script, a job, a task."""
    from lorafit.launching.launch_file import launch_file as text_of
    from lorafit.recipe import load

    loaded = load(recipe, overrides=set_ or ())
    written = loaded.recipe.launch.machines
    if machines is not None and written not in ("auto", machines):
        raise RecipeError(loaded.problem("launch.machines", f"{written}, but --machines is {machines}; leave one out"))
    print(text_of(loaded.recipe, str(recipe), system=system, machines=machines), end="")
