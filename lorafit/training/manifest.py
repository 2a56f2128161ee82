"""manifest.json: what is recorded of a run from its start, how it stands, and at its end what it came to."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from lorafit import __version__
from lorafit.builders.adapter import adapted_modules
from lorafit.builders.model_files import BaseModelFiles
from lorafit.data.prepare import PreparedData
from lorafit.precision import compute_dtype
from lorafit.preflight import this_machine
from lorafit.recipe import LoadedRecipe
from lorafit.recipe.sections import QuantizationSection
from lorafit.storage.files import write_file
from lorafit.storage.run_dir import RunDir
from lorafit.training.checkpoints import Checkpoint
from lorafit.training.model_card import model_card
from lorafit.training.must_match import ROUNDING
from lorafit.training.out_of_memory import peak_memory_bytes
from lorafit.training.selftest import SelfTest
from lorafit.training.start_point import FINISHED, StartPoint, finished_manifest, restore_run_dir
from lorafit.training.trainer.committed import CheckpointPolicy
from lorafit.training.trainer.run_trainer import RunTrainer

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "safetensors")


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


def finished_result(loaded: LoadedRecipe) -> TrainResult | None:
    """What a run that has come to its end came to; None of any other. Raises RecipeError, see `finished_manifest`."""
    run = RunDir(loaded.output_dir())
    manifest = finished_manifest(loaded, run)
    if manifest is None:
        return None
    figures = {field.name: manifest[field.name] for field in fields(TrainResult) if field.name in manifest}
    return TrainResult(**(figures | {"run": str(run.path), "adapter": str(run.adapter)}))


class Manifest:
    """What is said of one run; the first process writes it."""

    def __init__(
        self,
        loaded: LoadedRecipe,
        trainer: RunTrainer,
        *,
        base_files: BaseModelFiles,
        data: PreparedData,
        start: StartPoint,
    ) -> None:
        self._run, self._trainer, self._start = RunDir(loaded.output_dir()), trainer, start
        self._recipe = loaded.recipe
        self._facts = run_facts(loaded, trainer, base_files=base_files, data=data, after=start.checkpoint)

    def checkpoint_policy(
        self, must_match: Mapping[str, Any], *, started: float, bytes_of_one: int
    ) -> CheckpointPolicy:
        """Where checkpoints go, and what each says of the run: what must match, and what decides its last bits.

        `started` is when this session began, by the monotonic clock.
        """
        earlier = self._start.checkpoint.seconds if self._start.checkpoint else 0.0
        checkpointing = "on" if self._trainer.args.gradient_checkpointing else "off"
        ways = [*self._trainer.engaged.lines, f"gradient checkpointing {checkpointing}"]
        rounding = {"machine": self._facts["machine"], "threads": torch.get_num_threads(), "ways": ways}
        facts = {"started": self._facts["started"], ROUNDING: rounding | self._facts["versions"]}
        return CheckpointPolicy(
            self._run.checkpoints,
            keep=self._recipe.checkpoints.keep,
            started=started - earlier,
            facts={**must_match, **facts},
            bytes_of_one=bytes_of_one,
        )

    def open(
        self,
        written: LoadedRecipe,
        *,
        now: Mapping[str, Any],
        tested: SelfTest | None,
    ) -> None:
        """Make the run directory, or make it again what it was at the checkpoint that the run goes on from.

        `written` is the recipe as the user wrote it, `now` what each checkpoint will say of the run.
        """
        if self._trainer.is_world_process_zero():
            self._run.path.mkdir(parents=True, exist_ok=True)
            restore_run_dir(self._run, self._start, now=now)
            placed = replace(written, recipe=written.recipe.model_copy(update={"output_dir": None}))
            write_file(self._run.recipe, placed.yaml(relative_to=self._run.path))
            if tested is not None:
                self._run.add_event("selftest", tested.line(), step=0, figures=tested.figures())
        self.record(outcome="running")

    def record(self, *, outcome: str) -> None:
        """How the run stands."""
        self._write(self._facts, outcome)

    def finish(self, losses: tuple[float | None, float | None], *, started: float) -> TrainResult:
        """Record what the run came to, with its held-out losses before and after; it began at `started`."""
        trainer = self._trainer
        result = TrainResult(
            run=str(self._run.path),
            adapter=str(self._run.adapter),
            **_reached(trainer),
            tokens_per_second=trainer.metrics.tokens_per_second(),
            eval_loss_before=losses[0],
            eval_loss_after=losses[1],
            peak_memory_bytes=peak_memory_bytes(),
            seconds=round(time.monotonic() - started, 2),
            outcome="stopped early" if trainer.is_stopped_early() else "finished",
        )
        figures = {key: value for key, value in asdict(result).items() if key not in ("run", "adapter")}
        figures |= {"checkpoints_saved": trainer.saved, "seconds_saving": round(trainer.seconds_saving, 3)}
        if split := trainer.described_split():
            figures["on_oom"] = split
        self._write(self._facts | figures, result.outcome)
        return result

    def card(self) -> str:
        """The adapter's."""
        return model_card(
            self._recipe, facts=self._facts | _reached(self._trainer), history=self._trainer.metrics.history
        )

    def _write(self, facts: dict[str, Any], outcome: str) -> None:
        if not self._trainer.is_world_process_zero():
            return
        adapter = {"adapter": self._run.adapter_hashes()} if outcome in FINISHED else {}
        self._run.write_manifest(facts | {"outcome": outcome, "resumes": self._run.events_of("resumed")} | adapter)


def _reached(trainer: RunTrainer) -> dict[str, Any]:
    """How far the run came."""
    state = trainer.state
    is_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return {
        "steps": state.global_step,
        "tokens": trainer.metrics.tokens,
        "epochs": round(state.epoch or 0.0, 4),
        "adapter_step": state.best_global_step if is_best else state.global_step,
    }


def run_facts(
    loaded: LoadedRecipe,
    trainer: RunTrainer,
    *,
    base_files: BaseModelFiles,
    data: PreparedData,
    after: Checkpoint | None,
) -> dict[str, Any]:
    """What the manifest says of a run before its end."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    run = RunDir(loaded.output_dir())
    return {
        "lorafit": __version__,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
        "started": after.facts["started"] if after else now,
        "machine": this_machine().name,
        "world_size": PartialState().num_processes,
        "seed": loaded.recipe.training.seed,
        "bf16": trainer.args.bf16,
        "compute_dtype": _compute_dtype(loaded.recipe.quantization),
        "planned_steps": trainer.steps,
        "base": {
            "name": base_files.name if base_files.revision else None,  # a directory is in recipe.yaml, relative
            "commit": base_files.revision,
            "fingerprint": base_files.fingerprint(),
            "tensors": len(base_files.tensors),
            "rows": base_files.vocab_size if base_files.added is None else base_files.added.rows,
        },
        "added_tokens": {} if base_files.added is None else dict(base_files.added.ids),
        "data": {
            "fingerprint": data.fingerprint,
            **data.audit.as_dict(),
            "files": _relative(data.files, run),
        },
        "modules": [asdict(module) for module in adapted_modules(trainer.model)],
    }


def _compute_dtype(quantization: QuantizationSection | None) -> str | None:
    """The type that 4-bit weights were unpacked to."""
    if quantization is None or not quantization.load_in_4bit:
        return None
    return compute_dtype(quantization.bnb_4bit_compute_dtype)


def _relative(files: tuple[str, ...], run: RunDir) -> list[str]:
    """The data files as seen from the run directory, like every path in it."""
    return [os.path.relpath(file, run.path) if Path(file).is_absolute() else file for file in files]
