"""What a run stands on before its model is loaded: rows, choices, and where it begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.builders.experts import advise_on_experts
from lorafit.builders.positions import advise_on_positions, positions
from lorafit.errors import RecipeError
from lorafit.planning.answer import Plan
from lorafit.planning.for_training import PlanOfRun, planned_checkpointing
from lorafit.preflight import (
    Machine,
    bf16_choice,
    checkpointing_choice,
    dtype_choice,
    product_choice,
    refuse_what_this_machine_lacks,
    this_machine,
)
from lorafit.recipe import LoadedRecipe
from lorafit.recipe.advice import advise
from lorafit.recipe.arithmetic import total_steps
from lorafit.recipe.rules.run import too_long_for
from lorafit.storage.run_dir import RunDir
from lorafit.training.announce import Say, say_data
from lorafit.training.disk import Space, refuse_too_little_space, space_needed
from lorafit.training.facts import kept_facts
from lorafit.training.inputs import RunInputs, read_inputs, refuse_before_reading
from lorafit.training.processes import join_processes
from lorafit.training.resume import Begin, Departure, divided_anew, refuse_changes
from lorafit.training.sent_checkpoints import by_first
from lorafit.training.token_rows import check_token_rows, tokens_line


@dataclass(frozen=True)
class Ground:
    """What is settled before the model is loaded."""

    loaded: LoadedRecipe
    """The recipe, with the sequences of a step divided among the processes that there are."""

    machine: Machine
    begun: Departure
    inputs: RunInputs
    plan: Plan | None
    bf16: bool
    checkpointing: bool
    kept: dict[str, Any]
    """What must be the same when the run goes on, as far as it is known."""

    space: Space


def find_ground(
    loaded: LoadedRecipe,
    run: RunDir,
    *,
    say: Say,
    cache_dir: Path | None,
    inputs: RunInputs | None,
    is_loaded: bool,
    begin: Begin,
) -> Ground:
    """Read the rows, choose what the recipe leaves open, and refuse what can be seen by now."""
    written, machine = loaded.recipe, this_machine()
    state = join_processes(loaded, device=machine.device, gpus=machine.gpus)
    begun = by_first(lambda: refuse_before_reading(loaded, machine, begin=begin))
    refuse_what_this_machine_lacks(loaded, machine)
    loaded = divided_anew(loaded, begun.checkpoint, processes=state.num_processes)
    recipe = loaded.recipe
    planning = None if is_loaded else PlanOfRun(loaded, machine, state=state)
    with state.main_process_first():  # the others find the rows in the cache
        inputs = inputs or read_inputs(loaded, cache_dir=cache_dir, as_of=begun.as_of)
    if not recipe.training.packing:  # else the trainer, which fills the rows, knows the steps
        refuse_what_outlasts(loaded, total_steps(recipe, len(inputs.data.train), processes=state.num_processes).value)
    say_data(inputs.data, say)
    if inputs.base_files.added is not None:
        say(tokens_line(inputs.base_files.added))
    for warning in check_token_rows(loaded, inputs):
        say(f"warning: {warning}")
    known = positions({**inputs.base_files.config, **recipe.model.extra})
    of_the_base = (*advise_on_positions(recipe, known), *advise_on_experts(recipe, inputs.base_files.config))
    for advice in (*advise(recipe, train_rows=len(inputs.data.train)), *of_the_base):
        say(f"advice: {advice}")
    plan = planning.answer(say) if planning else None
    bf16 = bf16_choice(recipe.training, machine)
    checkpointing = checkpointing_choice(recipe.training, machine, planned=planned_checkpointing(plan))
    if dtype := dtype_choice(recipe, machine):
        say(f"base weights in {dtype.value}: {dtype.reason}")
    if products := product_choice(recipe, machine):
        say(f"4-bit products in {products.value}: {products.reason}")
    say(f"bfloat16 autocast {'on' if bf16.value else 'off'}: {bf16.reason}")
    say(f"gradient checkpointing {'on' if checkpointing.value else 'off'}: {checkpointing.reason}")
    kept = kept_facts(written, inputs, machine=machine, bf16=bf16.value, divided=recipe.training)
    if begun.checkpoint:
        refuse_changes(loaded, run, begun.checkpoint, now=kept)
    space = space_needed(loaded, inputs.base_files, bf16=bf16.value)
    if state.is_main_process:
        refuse_too_little_space(space, run)
    return Ground(loaded, machine, begun, inputs, plan, bf16.value, checkpointing.value, kept, space)


def refuse_what_outlasts(loaded: LoadedRecipe, steps: int) -> None:
    """A warm-up, an evaluation interval or an AdaLoRA schedule that does not fit into the run. Raises RecipeError."""
    problems = [loaded.problem(broken.key, broken.message) for broken in too_long_for(loaded.recipe, steps)]
    if problems:
        raise RecipeError(problems)
