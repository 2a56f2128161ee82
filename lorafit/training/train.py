"""One run, top to bottom: audit the data, load, attach, train, check, save."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback

from lorafit.data.templates import saved_chat_template
from lorafit.launching.signals import StopRequest
from lorafit.planning.for_training import measured_beside
from lorafit.recipe import LoadedRecipe
from lorafit.report.model_card import model_card
from lorafit.storage.files import write_file
from lorafit.storage.run_dir import RunDir
from lorafit.training.announce import Say
from lorafit.training.callbacks import MetricsFile
from lorafit.training.causal_lm import CausalLm
from lorafit.training.checks import Before, remember, verify_result
from lorafit.training.disk import full_disk_is_said
from lorafit.training.facts import checkpoint_room, model_facts, run_facts
from lorafit.training.gather import whole_adapter
from lorafit.training.ground import Ground, find_ground
from lorafit.training.inputs import RunInputs
from lorafit.training.out_of_memory import forget_peak, out_of_memory_is_said, peak_memory_bytes
from lorafit.training.progress import Progress
from lorafit.training.resume import FINISHED, Begin, finished_manifest, refuse_changes, settle
from lorafit.training.save import generation_settings, initial_adapter, write_adapter
from lorafit.training.selftest import SelfTest, self_test_once
from lorafit.training.setup import Setup, base_name, nothing_left_of, set_up
from lorafit.training.trainer.committed import CheckpointPolicy
from lorafit.training.trainer.stoppable import ending_is_recorded


@dataclass(frozen=True)
class TrainResult:
    """What one run came to; the JSON of `lorafit train`."""

    run: str
    adapter: str
    steps: int
    tokens: int
    tokens_per_second: float
    eval_loss_before: float | None
    eval_loss_after: float | None
    peak_memory_bytes: int
    seconds: float
    outcome: str
    epochs: float | None = None
    """How often the rows were seen; None in runs of older versions."""
    adapter_step: int | None = None
    """The step whose adapter is kept: the last, or the best one on the held-out rows."""


@dataclass(frozen=True)
class Trained:
    """The result, with the model still in memory."""

    result: TrainResult
    model: PeftModel


def train(
    loaded: LoadedRecipe,
    *,
    say: Say,
    cache_dir: Path | None,
    inputs: RunInputs | None = None,
    begin: Begin = "new",
    stop: StopRequest | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train one adapter as the recipe says, and leave a run directory; see `run_training`.

    A run that is to go on and has finished already gives its result again.
    """
    if begin != "new" and (done := finished_result(loaded)) is not None:
        say(f"resume: the run is finished ({done.outcome} after {done.steps} steps); nothing was changed")
        return done
    trained = run_training(
        loaded, say=say, progress=progress, cache_dir=cache_dir, inputs=inputs, begin=begin, stop=stop
    )
    return trained.result


def finished_result(loaded: LoadedRecipe) -> TrainResult | None:
    """What a run that has come to its end came to; None of any other. Raises RecipeError, see `finished_manifest`."""
    run = RunDir(loaded.output_dir())
    manifest = finished_manifest(loaded, run)
    if manifest is None:
        return None
    figures = {field.name: manifest[field.name] for field in fields(TrainResult) if field.name in manifest}
    return TrainResult(**(figures | {"run": str(run.path), "adapter": str(run.adapter)}))


def run_training(
    loaded: LoadedRecipe,
    *,
    say: Say,
    cache_dir: Path | None,
    inputs: RunInputs | None = None,
    base: PreTrainedModel | None = None,
    watchers: Sequence[TrainerCallback] = (),
    begin: Begin = "new",
    stop: StopRequest | None = None,
    only_self_test: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train one adapter as the recipe says, and leave a run directory.

    `say` takes one line for people at a time. Who trains several times on one base hands over what it has read
    (`inputs`) and loaded (`base`, which `Trained.model.unload()` gives back); `watchers` see every step, and `progress`
    shows them; `stop` hears requests to end it; `only_self_test` raises SelfTested instead of the first step. Raises
    every LorafitError but RecipeError; nothing is created in the run directory before all that can be checked without
    training has passed.
    """
    started = time.monotonic()
    run, stop = RunDir(loaded.output_dir()), stop or StopRequest()
    ground = find_ground(
        loaded, run, say=say, cache_dir=cache_dir, inputs=inputs, is_loaded=base is not None, begin=begin
    )
    written, loaded = loaded, ground.loaded
    with nothing_left_of(run):
        setup = set_up(loaded, run, ground, say=say, base=base, watchers=watchers, stop=stop, progress=progress)
        tested = self_test_once(
            setup.model,
            loaded,
            inputs=ground.inputs,
            bf16=ground.bf16,
            checkpointing=ground.checkpointing,
            engaged=setup.engaged,
            cache_dir=cache_dir,
            say=say,
            only=only_self_test,
        )
    before = remember(setup.model)
    kept = ground.kept | model_facts(setup.trainer, before, init_method=loaded.recipe.lora.init_lora_weights)
    if ground.begun.checkpoint:
        refuse_changes(loaded, run, ground.begun.checkpoint, now=kept)
    facts = run_facts(
        loaded.recipe,
        ground.inputs,
        run,
        machine=ground.machine,
        bf16=ground.bf16,
        table=setup.table,
        steps=setup.steps,
        begun=ground.begun,
    )
    room = checkpoint_room(
        loaded.recipe,
        run,
        ground.begun,
        started=started,
        kept=kept,
        facts=facts,
        bytes_of_one=ground.space.checkpoint,
        ways=(*setup.engaged.lines, f"gradient checkpointing {'on' if ground.checkpointing else 'off'}"),
    )
    record = partial(_finish, run, setup.trainer, facts)
    with (
        stop.held(),
        ending_is_recorded(setup.trainer, run, stop=stop, steps=setup.steps, record=record),
        initial_adapter(setup.model, init_method=loaded.recipe.lora.init_lora_weights) as initial,
    ):
        _open(written, run, ground, room=room, tested=tested, say=say)
        record(outcome="running")
        forget_peak()
        stopped_early = _fit(loaded, run, ground, setup, room=room)
        losses = _verify_and_save(
            loaded, run, ground, setup, before=before, initial=initial, facts=facts, stopped_early=stopped_early
        )
    result = _result(run, setup, losses=losses, started=room.started, stopped_early=stopped_early)
    if ground.plan is not None:
        say(measured_beside(ground.plan, result.peak_memory_bytes))
    _finish(run, setup.trainer, facts | _figures(result, setup), outcome=result.outcome)
    return Trained(result, setup.model)


def _open(
    loaded: LoadedRecipe, run: RunDir, ground: Ground, *, room: CheckpointPolicy, tested: SelfTest | None, say: Say
) -> None:
    """Make the run directory, or make it again what it was at the checkpoint that the run goes on from."""
    if not PartialState().is_main_process:
        return
    run.path.mkdir(parents=True, exist_ok=True)
    settle(run, ground.begun, now=room.facts, say=say)
    placed = replace(loaded, recipe=loaded.recipe.model_copy(update={"output_dir": None}))
    write_file(run.recipe, placed.yaml(relative_to=run.path))
    if tested is not None:
        run.add_event("selftest", tested.line(), step=0, figures=tested.figures())


def _fit(loaded: LoadedRecipe, run: RunDir, ground: Ground, setup: Setup, *, room: CheckpointPolicy) -> bool:
    """Take every step that is left; whether the run stopped early. Raises StopRequested and what training raises."""
    trainer = setup.trainer
    with (
        full_disk_is_said(run.path, writing="a checkpoint", needed=ground.space.checkpoint),
        out_of_memory_is_said(loaded, doing=trainer.doing, checkpointing=ground.checkpointing),
    ):
        trainer.train_by(room, after=ground.begun.checkpoint)
    trainer.leave_if_stopping(steps=setup.steps, where=str(run.path))
    return trainer.state.global_step < setup.steps and loaded.recipe.early_stopping is not None


def _verify_and_save(
    loaded: LoadedRecipe,
    run: RunDir,
    ground: Ground,
    setup: Setup,
    *,
    before: Before,
    initial: Path | None,
    facts: dict[str, Any],
    stopped_early: bool,
) -> tuple[float | None, float | None]:
    """Check what came out, measure it, write it; the held-out losses before and after."""
    trainer, tokenizer = setup.trainer, ground.inputs.tokenizer
    gathered = whole_adapter(trainer)
    verify_result(
        setup.model,
        before=before,
        gathered=gathered,
        steps_done=trainer.state.global_step,
        steps_planned=setup.steps,
        stopped_early=stopped_early,
        updates=setup.updates.count,
    )
    with out_of_memory_is_said(loaded, doing=trainer.doing, checkpointing=ground.checkpointing):
        losses = _held_out_losses(trainer, setup.metrics)
    if trainer.is_world_process_zero():
        tokenizer.chat_template = saved_chat_template(loaded.recipe.data, tokenizer)
        reached = _reached(trainer, setup.metrics)
        stop_token = loaded.recipe.data.stop_token
        generation = generation_settings(ground.inputs.base_files, tokenizer, stop_token=stop_token)
        with full_disk_is_said(run.path, writing="the adapter", needed=ground.space.adapter):
            write_adapter(
                setup.model,
                tokenizer,
                target=run.adapter,
                base_name=base_name(loaded.recipe),
                state_dict=gathered,
                initial=initial,
                card=model_card(loaded.recipe, facts=facts | reached, history=setup.metrics.history),
                generation=generation,
            )
    return losses


def _reached(trainer: CausalLm, metrics: MetricsFile) -> dict[str, Any]:
    """How far the run came."""
    state = trainer.state
    is_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return {
        "steps": state.global_step,
        "tokens": metrics.tokens,
        "epochs": round(state.epoch or 0.0, 4),
        "adapter_step": state.best_global_step if is_best else state.global_step,
    }


def _result(
    run: RunDir, setup: Setup, *, losses: tuple[float | None, float | None], started: float, stopped_early: bool
) -> TrainResult:
    return TrainResult(
        run=str(run.path),
        adapter=str(run.adapter),
        **_reached(setup.trainer, setup.metrics),
        tokens_per_second=setup.metrics.tokens_per_second(),
        eval_loss_before=losses[0],
        eval_loss_after=losses[1],
        peak_memory_bytes=peak_memory_bytes(),
        seconds=round(time.monotonic() - started, 2),
        outcome="stopped early" if stopped_early else "finished",
    )


def _figures(result: TrainResult, setup: Setup) -> dict[str, Any]:
    """What the manifest says of the end of a run."""
    figures = {key: value for key, value in asdict(result).items() if key not in ("run", "adapter")}
    trainer, halving = setup.trainer, setup.halving
    figures |= {"checkpoints_saved": trainer.saved, "seconds_saving": round(trainer.seconds_saving, 3)}
    if halving is not None and halving.parts > 1:
        figures["on_oom"] = halving.described(trainer)
    return figures


def _held_out_losses(trainer: CausalLm, metrics: MetricsFile) -> tuple[float | None, float | None]:
    """Held-out loss in nats per trained token, before the first step and of the adapter that is saved."""
    if trainer.eval_dataset is None:
        return None, None
    before = next(entry["eval_loss"] for entry in metrics.history if "eval_loss" in entry)
    return before, trainer.evaluate()["eval_loss"]


def _finish(run: RunDir, trainer: CausalLm, facts: dict[str, Any], *, outcome: str) -> None:
    if not trainer.is_world_process_zero():
        return
    adapter = {"adapter": run.adapter_hashes()} if outcome in FINISHED else {}
    run.write_manifest(facts | {"outcome": outcome, "resumes": run.events_of("resumed")} | adapter)
