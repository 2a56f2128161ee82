"""What a run reads before its model: no peft and no trl, so that the process that only starts others is quick."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lorafit.builders.adapter_fit import adapter_misfits
from lorafit.builders.base_model import check_base_model
from lorafit.builders.model_files import BaseModelFiles, stop_problems
from lorafit.builders.positions import positions, positions_exceeded
from lorafit.builders.tokenizer import load_tokenizer
from lorafit.data.prepare import PreparedData, prepare
from lorafit.data.saved_template import refuse_other_prompts
from lorafit.errors import AdapterError, ModelError, RecipeError
from lorafit.imports import imported_meanwhile
from lorafit.launching import launch
from lorafit.preflight import Machine, refuse_what_this_machine_lacks
from lorafit.recipe import LoadedRecipe
from lorafit.recipe.rules.run import too_long_for
from lorafit.storage.run_dir import RunDir
from lorafit.tasks import TASKS
from lorafit.training.start_point import Begin, StartPoint, start_point


def refuse_before_reading(loaded: LoadedRecipe, machine: Machine, *, begin: Begin) -> StartPoint:
    """Where the run begins. Raises RunDirError for a directory that is used, MachineError for what is lacking here."""
    start = start_point(RunDir(loaded.output_dir()), begin)
    refuse_what_this_machine_lacks(loaded, machine)
    return start


class Inputs(NamedTuple):
    """What a run reads before its model."""

    base_files: BaseModelFiles
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData


def read_inputs(
    loaded: LoadedRecipe,
    *,
    cache_dir: Path | None,
    as_of: str | None = None,
    meanwhile: str | None = None,
    show_progress: bool = False,
) -> Inputs:
    """The base model's files, its tokenizer and the audited rows.

    Raises RecipeError, ModelError, DataError, and VerificationError where the saved template prompts otherwise.

    `as_of` is the date of the rows of a run that goes on. `meanwhile` names a module that is imported while the rows
    are read: tokenizing leaves Python to others.
    """
    recipe = loaded.recipe
    try:
        base_files = check_base_model(recipe.model, quantization=recipe.quantization, task=TASKS[recipe.task])
        refuse_misfit(loaded, base_files)
        tokenizer = load_tokenizer(recipe.model, stop_token=recipe.data.stop_token)
        with nullcontext() if meanwhile is None else imported_meanwhile(meanwhile):
            data = prepare(
                recipe.data,
                task=recipe.task,
                tokenizer=tokenizer,
                max_length=recipe.training.max_length,
                seed=recipe.training.seed,
                stop_token_ids=base_files.stop_token_ids,
                vocab_size=base_files.vocab_size,
                cache_dir=cache_dir,
                as_of=as_of,
                show_progress=show_progress and launch.rank() == 0,
            )
    except (RecipeError, ModelError) as error:
        raise loaded.placed(error) from None
    if launch.rank() == 0:
        refuse_other_prompts(data, recipe.data, tokenizer)
    return Inputs(base_files, tokenizer, data)


def refuse_misfit(loaded: LoadedRecipe, base: BaseModelFiles) -> None:
    """What the recipe asks for and this base does not have. Raises AdapterError (names, ranks), RecipeError (positions)
    or ModelError (no token to stop on)."""
    recipe = loaded.recipe
    if problems := list(stop_problems(base.directory, stops=base.stop_token_ids, rows=None, data=recipe.data)):
        raise ModelError(problems)
    known = positions({**base.config, **recipe.model.extra})
    too_long = [loaded.problem(one.key, one.message) for one in positions_exceeded(recipe.training, known)]
    misfits = [] if base.modules is None else list(adapter_misfits(recipe, base.modules, loaded.problem))
    if too_long or misfits:
        raise (RecipeError if too_long else AdapterError)([*too_long, *misfits])


def refuse_what_outlasts(loaded: LoadedRecipe, steps: int) -> None:
    """A warm-up, an evaluation interval or an AdaLoRA schedule that does not fit into the run. Raises RecipeError."""
    problems = [loaded.problem(broken.key, broken.message) for broken in too_long_for(loaded.recipe, steps)]
    if problems:
        raise RecipeError(problems)
