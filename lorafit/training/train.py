"""One run, top to bottom: audit the data, load, attach, train, check, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lorafit import launch
from lorafit.builders.adapter import AdaptedModule, adapted_modules, attach_adapter, set_total_steps
from lorafit.builders.base_model import load_base_model
from lorafit.builders.lora_config import lora_config
from lorafit.builders.sft_config import sft_config
from lorafit.data.prepare import PreparedData
from lorafit.data.render import saved_chat_template
from lorafit.durable import write_file
from lorafit.errors import LorafitError, RecipeError
from lorafit.planning.for_training import PlanOfRun, measured_beside
from lorafit.preflight import bf16_choice, checkpointing_choice, this_machine
from lorafit.processes import join_processes, refuse_other_distribution
from lorafit.recipe import LoadedRecipe
from lorafit.recipe.advice import advise
from lorafit.recipe.rules.run import too_long_for
from lorafit.report.model_card import model_card
from lorafit.run_dir import RunDir
from lorafit.speed.levers import speed_up
from lorafit.stopping import StopRequest
from lorafit.training.callbacks import CheckpointInterval, EarlyStopping, MetricsFile, ProgressBar, RankAllocation
from lorafit.training.checks import refuse_wrong_trainable_set, remember, verify_result
from lorafit.training.disk import full_disk_is_said, refuse_too_little_space, space_needed
from lorafit.training.facts import checkpoint_room, kept_facts, model_facts, run_facts
from lorafit.training.gather import whole_adapter
from lorafit.training.halving import HalveBatch
from lorafit.training.health.watch import HealthWatch
from lorafit.training.inputs import RunInputs, read_inputs, refuse_before_reading
from lorafit.training.out_of_memory import out_of_memory_is_said, peak_memory_bytes
from lorafit.training.resume import FINISHED, Begin, finished_manifest, refuse_changes, settle
from lorafit.training.rows import RowFinder
from lorafit.training.save import initial_adapter, write_adapter
from lorafit.training.selftest import self_test_once
from lorafit.training.stopping import ending_is_recorded
from lorafit.training.trainer import LoraTrainer, planned_steps

Say = Callable[[str], None]


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


@dataclass(frozen=True)
class Trained:
    """The result, with the model still in memory."""

    result: TrainResult
    model: PeftModel


def train(
    loaded: LoadedRecipe,
    *,
    say: Say,
    show_progress: bool,
    cache_dir: Path | None,
    inputs: RunInputs | None = None,
    begin: Begin = "new",
    stop: StopRequest | None = None,
) -> TrainResult:
    """Train one adapter as the recipe says, and leave a run directory; see `run_training`.

    A run that is to go on and has finished already gives its result again.
    """
    if begin != "new" and (done := finished_result(loaded)) is not None:
        say(f"resume: the run is finished ({done.outcome} after {done.steps} steps); nothing was changed")
        return done
    trained = run_training(
        loaded, say=say, show_progress=show_progress, cache_dir=cache_dir, inputs=inputs, begin=begin, stop=stop
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
    show_progress: bool,
    cache_dir: Path | None,
    inputs: RunInputs | None = None,
    base: PreTrainedModel | None = None,
    watchers: Sequence[TrainerCallback] = (),
    begin: Begin = "new",
    stop: StopRequest | None = None,
    only_self_test: bool = False,
) -> Trained:
    """Train one adapter as the recipe says, and leave a run directory.

    `say` takes one line for people at a time. Who trains several times on one base hands over what it has read
    (`inputs`) and loaded (`base`, which `Trained.model.unload()` gives back); `watchers` see every step; `stop` hears
    requests to end it; `only_self_test` raises SelfTested instead of the first step. Raises every LorafitError but
    RecipeError; nothing is created in the run directory before all that can be checked without training has passed.
    """
    started = time.monotonic()
    recipe, run, stop = loaded.recipe, RunDir(loaded.output_dir()), stop or StopRequest()
    machine = this_machine()
    state = join_processes(loaded, device=machine.device, gpus=machine.gpus)
    begun = refuse_before_reading(loaded, machine, begin=begin)
    planning = PlanOfRun(loaded, machine, state=state) if base is None else None
    with state.main_process_first():  # the others find the rows in the cache
        inputs = inputs or read_inputs(loaded, cache_dir=cache_dir, begun=begun)
    tokenizer, data = inputs.tokenizer, inputs.data
    _say_data(data, say)
    for advice in advise(recipe, train_rows=len(data.train)):
        say(f"advice: {advice}")

    plan = planning.answer(say) if planning else None
    bf16 = bf16_choice(recipe.training, machine)
    checkpointing = checkpointing_choice(recipe.training, machine, plan=plan)
    say(f"bfloat16 autocast {'on' if bf16.value else 'off'}: {bf16.reason}")
    say(f"gradient checkpointing {'on' if checkpointing.value else 'off'}: {checkpointing.reason}")
    kept = kept_facts(recipe, inputs, machine=machine, bf16=bf16.value)
    if begun.checkpoint:
        refuse_changes(loaded, run, begun.checkpoint, now=kept)
    # Before the model: a model that will be spread over processes is loaded in parts, which the arguments settle.
    arguments = sft_config(
        recipe,
        output_dir=run.checkpoints,
        run_name=run.path.name,
        bf16=bf16.value,
        gradient_checkpointing=checkpointing.value,
        use_cpu=machine.device == "cpu",
        has_eval_rows=data.eval is not None,
        evaluates_first=begun.checkpoint is None,
    )
    space = space_needed(loaded, inputs.base_files.directory)
    if state.is_main_process:
        refuse_too_little_space(space, run)
    with out_of_memory_is_said(loaded, doing=lambda: "loading the base model"):
        model = _model_with_adapter(loaded, inputs, base=base, checkpointing=checkpointing.value)
    refuse_wrong_trainable_set(model, bias=recipe.lora.bias)
    table = adapted_modules(model)
    _say_adapter(table, model, say)

    metrics, interval = MetricsFile(run.metrics), CheckpointInterval(recipe.checkpoints.every)
    health = HealthWatch(recipe, run, say=say, rows_of_batch=RowFinder(data))
    halving = HalveBatch(run, say=say) if recipe.health.on_oom == "halve_batch" else None
    watching = [] if halving is None else [halving]
    base_name = None if Path(recipe.model.model_name_or_path).is_absolute() else recipe.model.model_name_or_path
    mixed_precision = "bf16" if bf16.value else "fp16" if recipe.training.fp16 else "no"
    levers = speed_up(
        model,
        recipe,
        is_whole=launch.sharding_asked_for() == "data parallel",
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, model.dtype),
    )
    trainer = LoraTrainer(
        stop=stop,
        loraplus_lr_ratio=recipe.optimizer.loraplus_lr_ratio,
        answer_head=levers.answer_head,
        fixed_length=levers.fixed_length,
        health=health,
        halving=halving,
        base_name=base_name,
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        callbacks=[*_callbacks(loaded, metrics, show_progress=show_progress), health, *watching, *watchers, interval],
    )
    trainer.remove_callback(PrinterCallback)
    with _nothing_left_of(run):
        refuse_other_distribution(loaded, trainer.accelerator, mixed_precision=mixed_precision)
        steps = planned_steps(trainer)
        _refuse_too_long(loaded, steps)
        set_total_steps(model, steps)
    _say_steps(loaded, trainer, steps, say)
    for line in levers.lines:
        say(line)
    with _nothing_left_of(run):
        tested = self_test_once(
            model,
            loaded,
            inputs=inputs,
            bf16=bf16.value,
            checkpointing=checkpointing.value,
            answer_head=levers.answer_head,
            cache_dir=cache_dir,
            say=say,
            only=only_self_test,
        )

    before = remember(model)
    kept |= model_facts(trainer, before, init_method=recipe.lora.init_lora_weights)
    if begun.checkpoint:
        refuse_changes(loaded, run, begun.checkpoint, now=kept)
    facts = run_facts(recipe, inputs, run, machine=machine, bf16=bf16.value, table=table, steps=steps, begun=begun)
    room = checkpoint_room(
        recipe,
        run,
        begun,
        started=started,
        kept=kept,
        facts=facts,
        bytes_of_one=space.checkpoint,
        ways=(*levers.lines, f"gradient checkpointing {'on' if checkpointing.value else 'off'}"),
    )
    with (
        stop.held(),
        ending_is_recorded(trainer, run, stop=stop, steps=steps, record=partial(_finish, run, trainer, facts)),
        initial_adapter(model, init_method=recipe.lora.init_lora_weights) as initial,
    ):
        if trainer.is_world_process_zero():
            run.path.mkdir(parents=True, exist_ok=True)
            settle(run, begun, now=room.facts, say=say)
            placed = replace(loaded, recipe=recipe.model_copy(update={"output_dir": None}))
            write_file(run.recipe, placed.yaml(relative_to=run.path))
            if tested is not None:
                run.add_event("selftest", tested.line(), step=0, figures=tested.figures())
        _finish(run, trainer, facts, outcome="running")
        with (
            full_disk_is_said(run.path, writing="a checkpoint", needed=space.checkpoint),
            out_of_memory_is_said(loaded, doing=trainer.doing),
        ):
            trainer.train_in(room, after=begun.checkpoint)
        trainer.leave_if_stopping(steps=steps, where=str(run.path))
        stopped_early = trainer.state.global_step < steps and recipe.early_stopping is not None
        gathered = whole_adapter(trainer)
        verify_result(
            model,
            before=before,
            gathered=gathered,
            steps_done=trainer.state.global_step,
            steps_planned=steps,
            stopped_early=stopped_early,
        )
        with out_of_memory_is_said(loaded, doing=trainer.doing):
            losses = _held_out_losses(trainer, metrics)
        if trainer.is_world_process_zero():
            tokenizer.chat_template = saved_chat_template(recipe.data, tokenizer)
            reached = {"steps": trainer.state.global_step, "tokens": metrics.tokens}
            with full_disk_is_said(run.path, writing="the adapter", needed=space.adapter):
                write_adapter(
                    model,
                    tokenizer,
                    target=run.adapter,
                    base_name=base_name,
                    state_dict=gathered,
                    initial=initial,
                    card=model_card(recipe, facts=facts | reached, history=metrics.history),
                )
    result = TrainResult(
        run=str(run.path),
        adapter=str(run.adapter),
        steps=trainer.state.global_step,
        tokens=metrics.tokens,
        tokens_per_second=metrics.tokens_per_second(),
        eval_loss_before=losses[0],
        eval_loss_after=losses[1],
        peak_memory_bytes=peak_memory_bytes(),
        seconds=round(time.monotonic() - room.started, 2),
        outcome="stopped early" if stopped_early else "finished",
    )
    if plan is not None:
        say(measured_beside(plan, result.peak_memory_bytes))
    figures = {key: value for key, value in asdict(result).items() if key not in ("run", "adapter")}
    figures |= {"checkpoints_saved": trainer.saved, "seconds_saving": round(trainer.seconds_saving, 3)}
    if halving is not None and halving.parts > 1:
        figures["on_oom"] = halving.described(trainer)
    _finish(run, trainer, facts | figures, outcome=result.outcome)
    return Trained(result, model)


@contextmanager
def _nothing_left_of(run: RunDir) -> Iterator[None]:
    """A run that is refused here leaves no directory; the trainer makes that of its checkpoints when it is built."""
    try:
        yield
    except LorafitError:
        run.remove_if_empty()
        raise


def _model_with_adapter(
    loaded: LoadedRecipe, inputs: RunInputs, *, base: PreTrainedModel | None, checkpointing: bool
) -> PeftModel:
    recipe, data, tokenizer = loaded.recipe, inputs.data, inputs.tokenizer
    state = PartialState()
    # A model that is spread over processes is put on the GPUs part by part, after loading.
    is_whole = launch.sharding_asked_for() == "data parallel"
    device_map = {"": state.device} if state.device.type == "cuda" and is_whole else None
    if base is None:
        base = load_base_model(recipe.model, recipe.quantization, dtype=recipe.model.dtype, device_map=device_map)
    config = lora_config(recipe.lora, adalora=recipe.adalora, model=base, where=loaded.problem)
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    size = recipe.training.per_device_train_batch_size

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, min(64, len(data.train)), size):
            rows = data.train.select(range(start, min(start + size, len(data.train))))
            yield collate([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])

    return attach_adapter(
        base,
        config,
        init_method=recipe.lora.init_lora_weights,
        seed=recipe.training.seed,
        gradient_checkpointing=checkpointing,
        # ZeRO-3 gathers into buffers of one type: https://github.com/deepspeedai/DeepSpeed/issues/8072
        autocast_adapter_dtype=recipe.quantization is not None or not is_deepspeed_zero3_enabled(),
        batches=batches,
        base_directory=str(inputs.base_files.directory),
    )


def _callbacks(loaded: LoadedRecipe, metrics: MetricsFile, *, show_progress: bool) -> list[Any]:
    recipe = loaded.recipe
    callbacks: list[Any] = [metrics]
    if show_progress:
        callbacks.append(ProgressBar(metrics))
    if recipe.early_stopping is not None:
        stopping = recipe.early_stopping
        callbacks.append(EarlyStopping(stopping.patience, stopping.min_delta))
    if recipe.adalora is not None:
        callbacks.append(RankAllocation())
    return callbacks


def _held_out_losses(trainer: LoraTrainer, metrics: MetricsFile) -> tuple[float | None, float | None]:
    """Held-out loss in nats per trained token, before the first step and of the adapter that is saved."""
    if trainer.eval_dataset is None:
        return None, None
    before = next(entry["eval_loss"] for entry in metrics.history if "eval_loss" in entry)
    return before, trainer.evaluate()["eval_loss"]


def _refuse_too_long(loaded: LoadedRecipe, steps: int) -> None:
    """A warm-up, an evaluation interval or an AdaLoRA schedule that does not fit into the run. Raises RecipeError."""
    problems = [loaded.problem(broken.key, broken.message) for broken in too_long_for(loaded.recipe, steps)]
    if problems:
        raise RecipeError(problems)


def _say_data(data: PreparedData, say: Say) -> None:
    say(f"data: {data.audit.summary()}")
    for warning in data.audit.warnings:
        say(f"warning: {warning}")


def _say_adapter(table: tuple[AdaptedModule, ...], model: PeftModel, say: Say) -> None:
    trained, total = model.get_nb_trainable_parameters()
    say(f"adapter: {len(table)} modules, {trained:,} trained parameters, {trained / total:.2%} of {total:,}")
    groups: dict[tuple[str, int, float, float], list[int]] = {}
    for module in table:
        key = (module.name.rpartition(".")[2], module.r, module.alpha, module.scale)
        groups.setdefault(key, []).append(module.parameters)
    for (name, rank, alpha, scale), sizes in groups.items():
        say(f"  {name:<16} x{len(sizes):<4} r={rank} alpha={alpha:g} scale={scale:.3g} {sum(sizes):>12,} parameters")


def _say_steps(loaded: LoadedRecipe, trainer: LoraTrainer, steps: int, say: Say) -> None:
    training = loaded.recipe.training
    per_device, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    processes = trainer.accelerator.num_processes
    sequences = per_device * accumulated * processes
    unit = "packed rows" if training.packing else "sequences"
    shares = f"{per_device} per device x {accumulated} accumulated x {processes} process{'es' * (processes > 1)}"
    say(f"{sequences} {unit} per step = {shares}")
    say(f"{steps} steps over {len(trainer.train_dataset):,} {unit}")


def _finish(run: RunDir, trainer: LoraTrainer, facts: dict[str, Any], *, outcome: str) -> None:
    if not trainer.is_world_process_zero():
        return
    adapter = {"adapter": run.adapter_hashes()} if outcome in FINISHED else {}
    run.write_manifest(facts | {"outcome": outcome, "resumes": run.events_of("resumed")} | adapter)
