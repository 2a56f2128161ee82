"""One rank with one seed: trained to a third, two thirds or the end of its steps, and its losses there."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafit import operating_system
from lorafit.builders.adapter import CHANGES_BASE_WEIGHTS
from lorafit.builders.base_model import load_base_model
from lorafit.builders.experts import used_patterns_are_known
from lorafit.errors import HealthStop, RecipeError
from lorafit.launching.signals import StopRequest
from lorafit.lines import unsaid
from lorafit.recipe import LoadedRecipe
from lorafit.storage.files import write_file
from lorafit.storage.run_dir import RunDir
from lorafit.sweep.search import END, THIRD, TWO_THIRDS
from lorafit.tasks import TASKS
from lorafit.tasks.pages import page
from lorafit.tasks.sequences import SequenceLosses
from lorafit.training.callbacks import MetricsFile
from lorafit.training.inputs import Inputs
from lorafit.training.out_of_memory import peak_memory_bytes
from lorafit.training.progress import SignsOfLife
from lorafit.training.start_point import finished_manifest
from lorafit.training.train import run_training
from lorafit.training.trainer.committed import callback_states

logger = logging.getLogger(__name__)

LEAST_STEPS = 3


@dataclass(frozen=True)
class TrialOutcome:
    """What came of a trial so far."""

    losses: Mapping[int, SequenceLosses]
    """By thirds of the steps; a run that was stopped early has those of its adapter from there on."""
    facts: Mapping[str, Any]


def trial_recipe(
    loaded: LoadedRecipe, *, rank: int, seed: int, learning_rate: float, output_dir: Path | None
) -> LoadedRecipe:
    """The recipe of one trial: the sweep's, with this rank and the alpha that the policy gives it."""
    recipe = loaded.recipe
    lora: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank}
    if recipe.rank_sweep.alpha != "2r":
        lora["lora_alpha"] = recipe.lora.lora_alpha or 2 * recipe.lora.r
    if recipe.rank_sweep.alpha == "rslora":
        lora["use_rslora"] = True
    raw = recipe.model_dump(exclude_unset=True, exclude={"rank_sweep", "output_dir"})
    raw["lora"] = raw.get("lora", {}) | lora
    raw["training"] = raw.get("training", {}) | {"seed": seed, "learning_rate": learning_rate}
    if output_dir is not None:
        raw["output_dir"] = str(output_dir)
        raw["launch"] = {"num_processes": 1}  # other GPUs train other trials
    return replace(loaded, recipe=type(recipe).model_validate(raw))


class Bench:
    """What all trials of a process share: the rows, and the base model, loaded once."""

    def __init__(
        self,
        loaded: LoadedRecipe,
        inputs: Inputs,
        *,
        cache_dir: Path | None,
        new_stop: Callable[[], StopRequest],
    ) -> None:
        """`new_stop` listens for requests to stop one trial: what was heard of one is no matter of the next."""
        self.inputs, self.cache_dir, self.new_stop = inputs, cache_dir, new_stop
        self._recipe = loaded.recipe
        self._base: PreTrainedModel | None = None
        lora = loaded.recipe.lora
        # peft leaves what these train in the base when it takes the adapter off.
        self._is_reused = (
            lora.init_lora_weights not in CHANGES_BASE_WEIGHTS and lora.bias == "none" and not lora.modules_to_save
        )

    def take_base(self) -> PreTrainedModel:
        """The base model without an adapter, as it lies on disk."""
        base, self._base = self._base, None
        if base is None:
            model, device = self._recipe.model, "cuda" if torch.cuda.is_available() else None
            base = load_base_model(
                model,
                self._recipe.quantization,
                dtype=model.dtype,
                device_map=device and {"": f"{device}:0"},
                task=TASKS[self._recipe.task],
            )
        return base

    def give_back(self, base: PreTrainedModel) -> None:
        """For the next trial."""
        self._base = base if self._is_reused else None

    def losses_of(self, model: torch.nn.Module) -> SequenceLosses:
        """On the held-out rows."""
        assert self.inputs.data.eval is not None
        held_out = page(self._recipe.task).held_out
        return held_out(model, self.inputs.data.eval, pad_token_id=self.inputs.tokenizer.pad_token_id)

    @contextmanager
    def adapter_on_base(self, adapter: Path) -> Iterator[PeftModel]:
        """The base with an adapter from disk."""
        with used_patterns_are_known():
            model = PeftModel.from_pretrained(self.take_base(), str(adapter))
        try:
            yield model.eval()
        finally:
            self.give_back(model.unload())


def run_trial(trial: LoadedRecipe, *, until: int, bench: Bench) -> TrialOutcome:
    """Train until so many thirds of the steps, from wherever the run directory stands.

    A run that `health` stops has no losses where it should, and `failed` among its facts.
    """
    run = RunDir(trial.output_dir())
    marks = _Marks(run, until=until, bench=bench)
    if finished_manifest(trial, run) is None and not marks.are_reached():
        _reset_peak_memory()
        base = bench.take_base()
        try:
            with unsaid("lorafit.training"):  # the sweep has lines of its own
                run_training(
                    trial,
                    progress=partial(_SignsOfTrial, rank=trial.recipe.lora.r),
                    cache_dir=bench.cache_dir,
                    inputs=bench.inputs,
                    base=base,
                    watchers=(marks,),
                    begin="restart",
                    stop=bench.new_stop(),
                )
        except _Paused:
            pass
        except HealthStop as stop:
            return TrialOutcome(marks.losses(), {"failed": str(stop), **marks.spent()})
        finally:
            bench.give_back(marks.base() if marks.model is not None else base)
    manifest = finished_manifest(trial, run)
    if manifest is None:
        return TrialOutcome(marks.losses(), marks.facts())
    # Of the adapter as it lies on disk: the same whether this process trained it, or one that was killed.
    with bench.adapter_on_base(run.adapter) as model:
        end = bench.losses_of(model)
    losses = {third: marks.losses().get(third, end) for third in (THIRD, TWO_THIRDS)}
    kept = ("steps", "planned_steps", "tokens", "seconds", "peak_memory_bytes", "outcome")
    return TrialOutcome({**losses, END: end}, {name: manifest[name] for name in kept})


def step_of(third: int, steps: int) -> int:
    """The step after which so many thirds of a run are done."""
    return round(steps * third / 3)


class _SignsOfTrial(SignsOfLife):
    """By the name of its rank, among the lines of the sweep."""

    def __init__(self, metrics: MetricsFile, *, rank: int) -> None:
        super().__init__(metrics)
        self._rank = rank

    def tell(self, line: str) -> None:
        """Say it."""
        logger.info(f"rank {self._rank}: {line}")


class _Paused(Exception):
    """The run has come as far as it was asked to, and left a checkpoint there."""


class _Marks(TrainerCallback):
    """Takes the held-out losses at a third and two thirds, on disk at once, and pauses the run where it is asked to."""

    def __init__(self, run: RunDir, *, until: int, bench: Bench) -> None:
        self._run, self._until, self._bench = run, until, bench
        self._started = time.monotonic()
        self.model: PeftModel | None = None

    def losses(self) -> dict[int, SequenceLosses]:
        """What was taken so far, by any process."""
        return {third: _read(self._file(third)) for third in (THIRD, TWO_THIRDS) if self._file(third).is_file()}

    def are_reached(self) -> bool:
        """Whether the run was paused here before."""
        return self._facts_file().is_file()

    def facts(self) -> dict[str, Any]:
        """Of the paused run."""
        facts: dict[str, Any] = json.loads(self._facts_file().read_text(encoding="utf-8"))
        return facts

    def spent(self) -> dict[str, Any]:
        """What a run that broke had cost until the last line of its metrics."""
        lines = self._run.metrics.read_text(encoding="utf-8").splitlines() if self._run.metrics.is_file() else []
        tokens = max((json.loads(line).get("tokens", 0) for line in lines), default=0)
        return {"tokens": tokens, "seconds": round(time.monotonic() - self._started, 2)}

    def base(self) -> PreTrainedModel:
        """The base model, its adapter taken off."""
        assert self.model is not None
        return self.model.unload()

    def _file(self, third: int) -> Path:
        return self._run.path / f"losses-{third}.json"

    def _facts_file(self) -> Path:
        return self._run.path / f"paused-{self._until}.json"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """A run that was killed after its last checkpoint here is there already."""
        self.model = model
        if state.max_steps < LEAST_STEPS:
            message = (
                f"the run has {state.max_steps} steps; a sweep judges it at a third and two thirds: train 3 or more"
            )
            raise RecipeError(message, where="rank_sweep")
        if self._until < END and state.global_step >= step_of(self._until, state.max_steps):
            self._pause(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Take the losses; ask for the checkpoint that the run goes on from."""
        for third in (THIRD, TWO_THIRDS):
            if state.global_step == step_of(third, state.max_steps):
                _write(self._file(third), self._bench.losses_of(model))
                control.should_save |= third == self._until

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The checkpoint is committed."""
        if self._until < END and state.global_step >= step_of(self._until, state.max_steps):
            self._pause(state)

    def _seconds_before(self) -> float:
        """Until the pause before this one."""
        before = self._run.path / f"paused-{self._until - 1}.json"
        return float(json.loads(before.read_text(encoding="utf-8"))["seconds"]) if before.is_file() else 0.0

    def _pause(self, state: TrainerState) -> None:
        facts = {
            "steps": state.global_step,
            "planned_steps": state.max_steps,
            "tokens": int(callback_states(state)["loss window"]["tokens"]),
            "seconds": round(self._seconds_before() + time.monotonic() - self._started, 2),
            "peak_memory_bytes": peak_memory_bytes(),
            "outcome": "paused",
        }
        write_file(self._facts_file(), json.dumps(facts) + "\n")
        raise _Paused


def _write(path: Path, losses: SequenceLosses) -> None:
    """JSON keeps float64 to the last bit."""
    arrays = {"nll": losses.nll.tolist(), "tokens": losses.tokens.tolist(), "correct": losses.correct.tolist()}
    write_file(path, json.dumps(arrays) + "\n")


def _read(path: Path) -> SequenceLosses:
    arrays = json.loads(path.read_text(encoding="utf-8"))
    return SequenceLosses(
        np.array(arrays["nll"], np.float64), np.array(arrays["tokens"], np.int64), np.array(arrays["correct"], np.int64)
    )


def _reset_peak_memory() -> None:
    """So that the next peak is that of one trial."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    operating_system.forget_peak()
