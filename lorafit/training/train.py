"""One run, top to bottom: audit the data, load, attach, train, check, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback

from lorafit.launching.signals import StopRequest
from lorafit.recipe import LoadedRecipe
from lorafit.training.ending import ending_is_recorded, shortage_is_said
from lorafit.training.inputs import Inputs
from lorafit.training.invariants import remember, verified_adapter
from lorafit.training.load_model import model_with_adapter
from lorafit.training.manifest import Manifest, TrainResult, finished_result
from lorafit.training.prepared import nothing_left_of, prepare_run
from lorafit.training.save import initial_adapter, save_adapter
from lorafit.training.selftest import self_test_once
from lorafit.training.start_point import Begin
from lorafit.training.task_trainer import task_trainer

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """The result, with the model still in memory."""

    result: TrainResult
    model: PeftModel


def train(
    loaded: LoadedRecipe,
    *,
    cache_dir: Path | None,
    inputs: Inputs | None = None,
    begin: Begin = "new",
    stop: StopRequest | None = None,
    progress: Callable[..., TrainerCallback] | None = None,
) -> TrainResult:
    """Train one adapter as the recipe says, and leave a run directory; see `run_training`.

    A run that is to go on and has finished already gives its result again.
    """
    if begin != "new" and (done := finished_result(loaded)) is not None:
        logger.info(f"resume: the run is finished ({done.outcome} after {done.steps} steps); nothing was changed")
        return done
    trained = run_training(loaded, progress=progress, cache_dir=cache_dir, inputs=inputs, begin=begin, stop=stop)
    return trained.result


def run_training(
    loaded: LoadedRecipe,
    *,
    cache_dir: Path | None,
    inputs: Inputs | None = None,
    base: PreTrainedModel | None = None,
    watchers: Sequence[TrainerCallback] = (),
    begin: Begin = "new",
    stop: StopRequest | None = None,
    only_self_test: bool = False,
    progress: Callable[..., TrainerCallback] | None = None,
) -> Trained:
    """Train one adapter as the recipe says, and leave a run directory.

    Who trains several times on one base hands over what it has read (`inputs`) and loaded (`base`, which
    `Trained.model.unload()` gives back); `watchers` see every step, and `progress` shows them; `stop` hears
    requests to end it; `only_self_test` raises SelfTested instead of the first step. Raises every LorafitError but
    RecipeError; nothing is created in the run directory before all that can be checked without training has passed.
    """
    started, stop, written = time.monotonic(), stop or StopRequest(), loaded
    # Data: where the run begins, its rows, and all that can be refused before the model.
    prepared = prepare_run(loaded, begin=begin, inputs=inputs, is_loaded=base is not None, cache_dir=cache_dir)
    loaded, start, run, space = prepared.loaded, prepared.start, prepared.run, prepared.space
    base_files, tokenizer, data = prepared.inputs
    with nothing_left_of(run):
        # Model: the arguments first, since they settle how one that is spread over processes is loaded.
        arguments = prepared.arguments()
        model = model_with_adapter(loaded, base_files, tokenizer=tokenizer, rows=data.train, base=base)
        # Trainer: the task's, with our hooks and the levers that this model takes.
        trainer = task_trainer(
            model,
            arguments,
            loaded=loaded,
            tokenizer=tokenizer,
            data=data,
            watchers=watchers,
            progress=progress,
            stop=stop,
        )
        # Checks: it computes what is meant, and the model is the one that the run was begun with.
        tested = self_test_once(trainer, loaded, rows=data.train, cache_dir=cache_dir, only=only_self_test)
    invariants = remember(model)
    must_match = prepared.refuse_other_model(trainer, invariants)
    manifest = Manifest(loaded, trainer, base_files=base_files, data=data, start=start)
    policy = manifest.checkpoint_policy(must_match, started=started, bytes_of_one=space.checkpoint)
    with (
        stop.held(),
        ending_is_recorded(trainer, run, stop=stop, record=manifest.record),
        initial_adapter(model, init_method=loaded.recipe.lora.init_lora_weights) as initial,
    ):
        manifest.open(written, now=policy.facts, tested=tested)
        # Train.
        with shortage_is_said(trainer, loaded, run, checkpoint_bytes=space.checkpoint):
            trainer.train_by(policy, after=start.checkpoint)
            trainer.leave_if_stopping(steps=trainer.steps, where=str(run.path))
            # Verify: every trained tensor moved and is finite, nothing else did; and how good it is.
            adapter = verified_adapter(model, trainer, before=invariants)
            losses = trainer.held_out_losses()
        # Write.
        save_adapter(
            model,
            loaded.recipe,
            tokenizer=tokenizer,
            base_files=base_files,
            target=run.adapter,
            state_dict=adapter,
            initial=initial,
            card=manifest.card(),
            needed=space.adapter,
        )
    result = manifest.finish(losses, started=policy.started)
    prepared.say_measured(result.peak_memory_bytes)
    return Trained(result, model)
