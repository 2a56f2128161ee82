"""One run, top to bottom: audit the data, load, attach, train, check, save."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lorafit import __version__, launch
from lorafit.builders.adapter import AdaptedModule, adapted_modules, attach_adapter, set_total_steps
from lorafit.builders.base_model import load_base_model
from lorafit.builders.lora_config import lora_config
from lorafit.builders.model_files import BaseModelFiles
from lorafit.builders.sft_config import sft_config
from lorafit.data.prepare import PreparedData
from lorafit.data.render import saved_chat_template
from lorafit.errors import LorafitError, MachineError, RecipeError, StopRequested
from lorafit.preflight import bf16_choice, checkpointing_choice, this_machine
from lorafit.processes import join_processes, refuse_other_distribution
from lorafit.recipe import LoadedRecipe
from lorafit.recipe.advice import advise
from lorafit.recipe.rules.run import too_long_for
from lorafit.report.model_card import model_card
from lorafit.run_dir import RunDir
from lorafit.training.callbacks import CheckpointInterval, MetricsFile, ProgressBar, RankAllocation
from lorafit.training.checks import refuse_wrong_trainable_set, remember, verify_result
from lorafit.training.gather import whole_adapter
from lorafit.training.halving import HalveBatch
from lorafit.training.health.watch import HealthWatch
from lorafit.training.inputs import RunInputs, read_inputs, refuse_before_reading
from lorafit.training.out_of_memory import out_of_memory_is_said, peak_memory_bytes
from lorafit.training.rows import RowFinder
from lorafit.training.save import full_disk_is_said, initial_adapter, write_adapter
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


def train(loaded: LoadedRecipe, *, say: Say, show_progress: bool, cache_dir: Path | None) -> TrainResult:
    """Train one adapter as the recipe says, and leave a run directory; see `run_training`."""
    return run_training(loaded, say=say, show_progress=show_progress, cache_dir=cache_dir).result


def run_training(
    loaded: LoadedRecipe,
    *,
    say: Say,
    show_progress: bool,
    cache_dir: Path | None,
    inputs: RunInputs | None = None,
    base: PreTrainedModel | None = None,
    watchers: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train one adapter as the recipe says, and leave a run directory.

    `say` takes one line for people at a time. Who trains several times on one base hands over what it has read
    (`inputs`) and loaded (`base`, which `Trained.model.unload()` gives back); `watchers` see every step. Raises every
    LorafitError but RecipeError; nothing is created in the run directory before all that can be checked without
    training has passed.
    """
    started = time.monotonic()
    recipe, run = loaded.recipe, RunDir(loaded.output_dir())
    machine = this_machine()
    state = join_processes(loaded, device=machine.device, gpus=machine.gpus)
    refuse_before_reading(loaded, machine)
    with state.main_process_first():  # the others find the rows in the cache
        inputs = inputs or read_inputs(loaded, cache_dir=cache_dir)
    base_files, tokenizer, data = inputs.base_files, inputs.tokenizer, inputs.data
    _say_data(data, say)
    for advice in advise(recipe, train_rows=len(data.train)):
        say(f"advice: {advice}")

    bf16, checkpointing = bf16_choice(recipe.training, machine), checkpointing_choice(recipe.training, machine)
    say(f"bfloat16 autocast {'on' if bf16.value else 'off'}: {bf16.reason}")
    say(f"gradient checkpointing {'on' if checkpointing.value else 'off'}: {checkpointing.reason}")
    # Before the model: a model that will be spread over processes is loaded in parts, which the arguments settle.
    arguments = sft_config(
        recipe,
        output_dir=run.checkpoints,
        run_name=run.path.name,
        bf16=bf16.value,
        gradient_checkpointing=checkpointing.value,
        use_cpu=machine.device == "cpu",
        has_eval_rows=data.eval is not None,
    )
    with out_of_memory_is_said(loaded, doing=lambda: "loading the base model"):
        model = _model_with_adapter(loaded, inputs, base=base, checkpointing=checkpointing.value)
    refuse_wrong_trainable_set(model, bias=recipe.lora.bias)
    table = adapted_modules(model)
    _say_adapter(table, model, say)

    metrics = MetricsFile(run.metrics)
    health = HealthWatch(recipe, run, say=say, rows_of_batch=RowFinder(data))
    halving = HalveBatch(run, say=say) if recipe.health.on_oom == "halve_batch" else None
    watching = [] if halving is None else [halving]
    base_name = None if Path(recipe.model.model_name_or_path).is_absolute() else recipe.model.model_name_or_path
    trainer = LoraTrainer(
        loraplus_lr_ratio=recipe.optimizer.loraplus_lr_ratio,
        health=health,
        halving=halving,
        base_name=base_name,
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        callbacks=[*_callbacks(loaded, metrics, show_progress=show_progress), health, *watching, *watchers],
    )
    trainer.remove_callback(PrinterCallback)
    mixed_precision = "bf16" if bf16.value else "fp16" if recipe.training.fp16 else "no"
    try:
        refuse_other_distribution(loaded, trainer.accelerator, mixed_precision=mixed_precision)
        steps = planned_steps(trainer)
        _refuse_too_long(loaded, steps)
        set_total_steps(model, steps)
    except LorafitError:
        run.remove_if_empty()  # the trainer makes its checkpoint directory when it is built
        raise
    _say_steps(loaded, trainer, steps, say)

    if trainer.is_world_process_zero():
        run.path.mkdir(parents=True, exist_ok=True)
        placed = replace(loaded, recipe=recipe.model_copy(update={"output_dir": None}))
        run.recipe.write_text(placed.yaml(relative_to=run.path), encoding="utf-8")
    facts = _facts(loaded, base_files, data, run, machine=machine.name, bf16=bf16.value, table=table, steps=steps)
    before = remember(model)
    with initial_adapter(model, init_method=recipe.lora.init_lora_weights) as initial:
        try:
            with full_disk_is_said(run.path), out_of_memory_is_said(loaded, doing=trainer.doing):
                trainer.train()
        except KeyboardInterrupt as interrupt:
            done = f"stopped on request after step {trainer.state.global_step} of {steps}"
            _finish(run, trainer, facts, outcome=done)
            raise StopRequested(f"{done}; no adapter was written", where=str(run.path)) from interrupt
        except LorafitError as error:
            _finish(run, trainer, facts, outcome=f"stopped: {error}")
            if not isinstance(error, MachineError):  # memory runs out in one process, the others wait elsewhere
                # All processes stop at one step. One that left now would have the others ended before that is written.
                trainer.accelerator.wait_for_everyone()
            raise
        stopped_early = trainer.control.should_training_stop and recipe.early_stopping is not None
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
            with full_disk_is_said(run.path):
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
        seconds=round(time.monotonic() - started, 2),
        outcome="stopped early" if stopped_early else "finished",
    )
    figures = {key: value for key, value in asdict(result).items() if key not in ("run", "adapter")}
    if halving is not None and halving.parts > 1:
        figures["on_oom"] = halving.described(trainer)
    _finish(run, trainer, facts | figures, outcome=result.outcome)
    return Trained(result, model)


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
    callbacks: list[Any] = [metrics, CheckpointInterval(recipe.checkpoints.every)]
    if show_progress:
        callbacks.append(ProgressBar(metrics))
    if recipe.early_stopping is not None:
        stopping = recipe.early_stopping
        callbacks.append(EarlyStoppingCallback(stopping.patience, stopping.min_delta))
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


def _facts(
    loaded: LoadedRecipe,
    base_files: BaseModelFiles,
    data: PreparedData,
    run: RunDir,
    *,
    machine: str,
    bf16: bool,
    table: tuple[AdaptedModule, ...],
    steps: int,
) -> dict[str, Any]:
    """What the manifest says of a run before it has begun."""
    packages = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "safetensors")
    return {
        "lorafit": __version__,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "world_size": PartialState().num_processes,
        "seed": loaded.recipe.training.seed,
        "bf16": bf16,
        "planned_steps": steps,
        "base": {
            "name": base_files.name if base_files.revision else None,  # a directory is in recipe.yaml, relative
            "commit": base_files.revision,
            "fingerprint": base_files.fingerprint(),
            "tensors": len(base_files.tensors),
        },
        "data": {"fingerprint": data.fingerprint, **data.audit.as_dict(), "files": _relative(data.files, run)},
        "modules": [asdict(module) for module in table],
    }


def _relative(files: tuple[str, ...], run: RunDir) -> list[str]:
    """The data files as seen from the run directory, like every path in it."""
    return [os.path.relpath(file, run.path) if Path(file).is_absolute() else file for file in files]


def _finish(run: RunDir, trainer: LoraTrainer, facts: dict[str, Any], *, outcome: str) -> None:
    if not trainer.is_world_process_zero():
        return
    adapter = {"adapter": run.adapter_hashes()} if run.adapter.is_dir() else {}
    run.write_manifest(facts | {"outcome": outcome} | adapter)
