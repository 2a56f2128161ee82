"""What checkpoints, stops and judges a run is no matter of TRL's, nor of what is trained."""

from __future__ import annotations

import ast
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafit.errors import StopRequested
from lorafit.launching.signals import StopRequest
from lorafit.training import trainer as mixins
from lorafit.training.checkpoints import newest_verified
from lorafit.training.trainer.committed import CheckpointPolicy, Committed
from lorafit.training.trainer.finite_steps import FiniteSteps
from lorafit.training.trainer.peft_steps import PeftSteps
from lorafit.training.trainer.split_on_oom import SplitOnOom
from lorafit.training.trainer.stoppable import Stoppable
from support.tiny import byte_tokenizer


def test_no_mixin_knows_trl_or_a_task() -> None:
    files = sorted(Path(mixins.__path__[0]).glob("*.py"))
    assert len(files) >= 6
    for file in files:
        imports = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        strangers = ("trl", "lorafit.tasks", "lorafit.training.task_trainer")
        assert not [node.module for node in imports if (node.module or "").startswith(strangers)], file.name


class PlainTrainer(Stoppable, FiniteSteps, Committed, SplitOnOom, PeftSteps, Trainer):
    """Transformers' own trainer and its own loss."""

    model: PeftModel


class Health:
    """Finds nothing, and counts what it was asked."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.saves = 0

    def broken_step(self, found: list[tuple[str, dict[str, Any]]], model: torch.nn.Module, *, step: int) -> None:
        self.broken += [what for what, _ in found]

    def may_save(self, model: torch.nn.Module, *, step: int) -> bool:
        self.saves += 1
        return True


class StopsAfter(TrainerCallback):
    def __init__(self, stop: StopRequest, step: int) -> None:
        self._stop, self._step = stop, step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self._step:
            self._stop.heard = signal.SIGTERM


def trainer_in(directory: Path, base: Path, *, stop: StopRequest, health: Health) -> PlainTrainer:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    rows = torch.randint(3, 200, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return PlainTrainer(
        stop=stop,
        health=health,
        base_name=None,
        halving=None,
        loraplus_lr_ratio=4.0,
        model=model,
        args=TrainingArguments(
            output_dir=str(directory),
            max_steps=5,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=2,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=byte_tokenizer(),
    )


def policy_in(directory: Path) -> CheckpointPolicy:
    return CheckpointPolicy(directory, keep=2, started=time.monotonic(), facts={"task": "any"}, bytes_of_one=0)


def trained(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_transformers_own_trainer_stops_commits_and_goes_on_as_if_nothing_had_been(
    tmp_path: Path, tiny_base: Path
) -> None:
    undisturbed = trainer_in(tmp_path / "one", tiny_base, stop=StopRequest(), health=Health())
    undisturbed.train_by(policy_in(tmp_path / "one"), after=None)
    stop, health = StopRequest(), Health()
    stopped = trainer_in(tmp_path / "two", tiny_base, stop=stop, health=health)
    stopped.add_callback(StopsAfter(stop, 3))
    stopped.callback_handler.callbacks.insert(0, stopped.callback_handler.callbacks.pop())  # before the one that asks
    stopped.train_by(policy_in(tmp_path / "two"), after=None)
    with pytest.raises(StopRequested):
        stopped.leave_if_stopping(steps=5, where="two")
    assert (health.saves, health.broken) == (1, [])
    newest = newest_verified(tmp_path / "two").newest
    assert newest is not None and (newest.step, newest.facts) == (3, {"task": "any"})
    second = trainer_in(tmp_path / "two", tiny_base, stop=StopRequest(), health=Health())
    second.train_by(policy_in(tmp_path / "two"), after=newest)
    assert second.state.global_step == 5
    ours, theirs = trained(second.model), trained(undisturbed.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    told = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (second, undisturbed)]
    assert told[0] == told[1]
