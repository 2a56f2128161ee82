"""A run before its model is loaded: where it begins, its rows, what is chosen for it, what is refused by then."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from lorafit.builders.experts import advise_on_experts
from lorafit.builders.positions import advise_on_positions, positions
from lorafit.errors import LorafitError
from lorafit.planning.for_training import PlanOfRun, measured_beside, planned_checkpointing
from lorafit.planning.plan_result import Plan
from lorafit.preflight import (
    Machine,
    bf16_choice,
    checkpointing_choice,
    dtype_choice,
    product_choice,
    refuse_what_this_machine_lacks,
    this_machine,
)
from lorafit.recipe import LoadedRecipe, Recipe
from lorafit.recipe.advice import advise
from lorafit.recipe.arithmetic import total_steps
from lorafit.storage.run_dir import RunDir
from lorafit.training.arguments import training_arguments
from lorafit.training.disk import Space, refuse_too_little_space, space_needed
from lorafit.training.fingerprint import fingerprint, model_fingerprint
from lorafit.training.inputs import Inputs, read_inputs, refuse_before_reading, refuse_what_outlasts
from lorafit.training.invariants import Before
from lorafit.training.must_match import divided_anew, refuse_changes
from lorafit.training.processes import by_first, join_processes
from lorafit.training.start_point import Begin, StartPoint
from lorafit.training.startup_lines import say_data
from lorafit.training.token_rows import check_token_rows, tokens_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What is settled before the model is loaded, for `run_training` to take apart."""

    loaded: LoadedRecipe
    """The recipe, with the sequences of a step divided among the processes that there are."""

    run: RunDir
    start: StartPoint
    inputs: Inputs
    machine: Machine
    plan: Plan | None
    bf16: bool
    checkpointing: bool
    must_match: dict[str, Any]
    """What must be the same when the run goes on, as far as it is known."""

    space: Space

    def arguments(self) -> TrainingArguments:
        """The library's own, with what was chosen."""
        return training_arguments(
            self.loaded.recipe,
            output_dir=self.run.checkpoints,
            run_name=self.run.path.name,
            bf16=self.bf16,
            gradient_checkpointing=self.checkpointing,
            use_cpu=self.machine.device == "cpu",
            has_eval_rows=self.inputs.data.eval is not None,
            evaluates_first=self.start.checkpoint is None,
        )

    def refuse_other_model(self, trainer: Trainer, before: Before) -> dict[str, Any]:
        """All that must be the same when the run goes on, the model included. Raises RecipeError and RunDirError where
        it is not as it was at the checkpoint that this session goes on from."""
        init_method = self.loaded.recipe.lora.init_lora_weights
        whole = self.must_match | model_fingerprint(trainer, before, init_method=init_method)
        refuse_changes(self.loaded, self.start.checkpoint, now=whole)
        return whole

    def say_measured(self, peak_memory_bytes: int) -> None:
        """The peak beside that of the plan, where there is one."""
        if self.plan is not None:
            logger.info(measured_beside(self.plan, peak_memory_bytes))


def prepare_run(
    loaded: LoadedRecipe,
    *,
    begin: Begin,
    inputs: Inputs | None,
    is_loaded: bool,
    cache_dir: Path | None,
) -> Prepared:
    """Read the rows, choose what the recipe leaves open, and refuse what can be seen by now.

    `inputs` where they have been read already; `is_loaded` where the base model is in memory, and nothing to plan.
    """
    run, written, machine = RunDir(loaded.output_dir()), loaded.recipe, this_machine()
    state = join_processes(loaded, device=machine.device, gpus=machine.gpus)
    start = by_first(lambda: refuse_before_reading(loaded, machine, begin=begin))
    refuse_what_this_machine_lacks(loaded, machine)
    loaded = divided_anew(loaded, start.checkpoint, processes=state.num_processes)
    recipe = loaded.recipe
    planning = None if is_loaded else PlanOfRun(loaded, machine, state=state)
    with state.main_process_first():  # the others find the rows in the cache
        inputs = inputs or read_inputs(loaded, cache_dir=cache_dir, as_of=start.as_of)
    if not recipe.training.is_packed:  # else the trainer, which fills the rows, knows the steps
        refuse_what_outlasts(loaded, total_steps(recipe, len(inputs.data.train), processes=state.num_processes).value)
    _say_what_was_read(loaded, inputs)
    plan = planning.answer() if planning else None
    bf16, checkpointing = _chosen(recipe, machine, plan=plan)
    now = fingerprint(
        written,
        base=inputs.base_files.fingerprint(),
        data=inputs.data.parts,
        device=machine.device,
        bf16=bf16,
        divided=recipe.training,
    )
    refuse_changes(loaded, start.checkpoint, now=now)
    space = space_needed(loaded, inputs.base_files, bf16=bf16)
    if state.is_main_process:
        refuse_too_little_space(space, run)
    return Prepared(loaded, run, start, inputs, machine, plan, bf16, checkpointing, now, space)


def _chosen(recipe: Recipe, machine: Machine, *, plan: Plan | None) -> tuple[bool, bool]:
    """Whether bfloat16 autocast and gradient checkpointing are on; each choice is said with its reason."""
    bf16 = bf16_choice(recipe.training, machine)
    checkpointing = checkpointing_choice(recipe.training, machine, planned=planned_checkpointing(plan))
    if dtype := dtype_choice(recipe, machine):
        logger.info(f"base weights in {dtype.value}: {dtype.reason}")
    if products := product_choice(recipe, machine):
        logger.info(f"4-bit products in {products.value}: {products.reason}")
    logger.info(f"bfloat16 autocast {'on' if bf16.value else 'off'}: {bf16.reason}")
    logger.info(f"gradient checkpointing {'on' if checkpointing.value else 'off'}: {checkpointing.reason}")
    return bf16.value, checkpointing.value


def _say_what_was_read(loaded: LoadedRecipe, inputs: Inputs) -> None:
    """The rows, the tokens that are trained, and what is likely unwanted. Raises what `check_token_rows` raises."""
    say_data(inputs.data)
    if inputs.base_files.added is not None:
        logger.info(tokens_line(inputs.base_files.added))
    for warning in check_token_rows(loaded, inputs):
        logger.warning(warning)
    recipe, config = loaded.recipe, inputs.base_files.config
    known = positions({**config, **recipe.model.extra})
    of_the_base = (*advise_on_positions(recipe, known), *advise_on_experts(recipe, config))
    for advice in (*advise(recipe, train_rows=len(inputs.data.train)), *of_the_base):
        logger.info(f"advice: {advice}")


@contextmanager
def nothing_left_of(run: RunDir) -> Iterator[None]:
    """A run that is refused here leaves no directory; the trainer makes that of its checkpoints when it is built."""
    made = run.path if not run.path.exists() else run.checkpoints
    try:
        yield
    except LorafitError:
        with suppress(OSError):  # not there, or not empty
            run.checkpoints.rmdir()
            made.rmdir()
        raise
