"""Checkpoints that are committed, and hold all that the rest of the run depends on."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object, reduce
from peft import AdaLoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import DefaultFlowCallback, ExportableState

from lorafit.errors import RunDirError
from lorafit.storage.stage import scratch, stage_beside
from lorafit.training import checkpoints
from lorafit.training.checkpoints import Checkpoint
from lorafit.training.disk import full_disk_is_said
from lorafit.training.processes import DATA_PARALLEL
from lorafit.training.save import WEIGHTS, give_usual_permissions, settle_files
from lorafit.training.sent_checkpoints import seen_here
from lorafit.training.trainer import rank_allocation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointPolicy:
    """Where checkpoints lie, and what each of them says of its run."""

    directory: Path
    keep: int
    started: float
    """When the run began, by the monotonic clock; earlier sessions pushed it back."""
    facts: Mapping[str, Any]
    bytes_of_one: int
    """What one takes, at most."""


def callback_states(state: TrainerState) -> dict[str, Any]:
    """What a checkpoint keeps of each callback, by its class; the library calls it a list, and makes it a mapping."""
    return cast(dict[str, Any], state.stateful_callbacks)


class Committed(Trainer):
    """Saves through the library into a stage, commits it, and takes up a run exactly where it was saved.

    An evaluation that was due at the step of the checkpoint and is not recorded in it is done first: a stop breaks it
    off, and one at the end of an epoch comes after the step's checkpoint.
    """

    model: nn.Module

    policy: CheckpointPolicy
    """Given before training; `facts` are known only when the model and this trainer are built."""

    saved = 0
    """Checkpoints of this session."""

    seconds_saving = 0.0
    """Spent in this session on them, waiting for the other processes included."""

    _stage: Path | None = None

    _stuck: frozenset[Path] = frozenset()
    """Old checkpoints that could not be removed, which was said."""

    _taken_up: Path | None = None
    """The checkpoint that this session goes on from, as this machine sees it."""

    def __init__(self, *, base_name: str | None, **arguments: Any) -> None:
        """`base_name` is what an adapter may say of its base."""
        self._base_name = base_name
        super().__init__(**arguments)
        self.add_callback(_CatchUp(self))

    @property
    def window(self) -> dict[str, Any]:
        """What a trainer sums up for its next line of metrics, besides the loss: a part of each checkpoint."""
        return {}

    @window.setter
    def window(self, window: dict[str, Any]) -> None:
        """Be as it was when it was read; of `window` only what it gave is looked at."""

    def train_by(self, policy: CheckpointPolicy, *, after: Checkpoint | None) -> None:
        """Train from the first step, or from the one after a checkpoint; new checkpoints as `policy` says."""
        self.policy = policy
        if after is None:
            self.train()
            return
        with seen_here(after.path) as self._taken_up:
            self.train(resume_from_checkpoint=str(self._taken_up))

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Every process writes its part into the stage; then the first one commits it."""
        started = time.monotonic()
        step = self.state.global_step
        loss = reduce(self._tr_loss.detach().clone(), reduction="mean").item()
        so_far = {"loss": loss, "since": self._globalstep_last_logged}
        callback_states(self.state)["loss window"] = so_far | self.window
        with self._staged() as stage:
            super()._save_checkpoint(model, trial)
            written = checkpoints.path_of(stage, step)
            if self.args.should_save:
                rank_allocation.save(self.accelerator.unwrap_model(self.model), written)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self._commit(written, step)
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step:
            best = checkpoints.path_of(self.policy.directory, self.state.best_global_step)
            self.state.best_model_checkpoint = str(best)
        self.saved += 1
        self.seconds_saving += time.monotonic() - started

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """The directory that the library writes `checkpoint-N` into; nothing of it is left behind. A full disk is said
        while the stage is still there, and the disk as full as it was."""
        target = checkpoints.path_of(self.policy.directory, self.state.global_step)
        is_first = self.is_world_process_zero()
        with stage_beside(target) if is_first else nullcontext(target) as stage:
            if self.args.world_size > 1:
                stage = Path(broadcast_object_list([str(stage)])[0])
            written = checkpoints.path_of(stage, self.state.global_step)
            unknown = [place for place in (written, *written.parents) if not place.exists()]
            self._stage = stage
            try:
                with full_disk_is_said(stage.parent, writing="a checkpoint", needed=self.policy.bytes_of_one):
                    yield stage
            finally:
                self._stage = None
                if not is_first and stage in unknown:  # on a disk of another machine, where libraries made it
                    for place in unknown:
                        with suppress(OSError):
                            place.rmdir()

    def _save_rng_state(self, output_dir: str) -> None:
        """That of every process, written by the first, whose disk the others may not see."""
        if self.args.world_size == 1:
            super()._save_rng_state(output_dir)
            return
        with scratch() as own:
            super()._save_rng_state(str(own))
            states = gather_object([(file.name, file.read_bytes()) for file in own.iterdir()])
        if self.is_world_process_zero():
            for name, content in states:
                (Path(output_dir) / name).write_bytes(content)

    def _commit(self, written: Path, step: int) -> None:
        # The library notes the best checkpoint by its path, which would be that of the stage, on this machine.
        replace(self.state, best_model_checkpoint=None).save_to_json(str(written / TRAINER_STATE_NAME))
        give_usual_permissions(written)
        contents = {
            "step": step,
            "best_step": self.state.best_global_step,
            "seconds": round(time.monotonic() - self.policy.started, 3),
            "facts": dict(self.policy.facts),
        }
        checkpoints.commit(written, checkpoints.path_of(self.policy.directory, step), contents=contents)
        stuck = checkpoints.rotate(self.policy.directory, keep=self.policy.keep)
        for path in stuck.keys() - self._stuck:
            logger.warning("%s: cannot be removed now (%s); tried again at each checkpoint", path, stuck[path])
        self._stuck |= stuck.keys()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether to save now. The library saves at an evaluation only what is the best; here, also what is due."""
        is_best = super()._determine_best_metric(metrics, trial)
        return is_best or self.control.should_save

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Adapter and tokenizer. The library's own adds a pickle of all arguments, which nothing reads and which can
        hold a token, and the whole embedding where tokens were added, of which their rows are enough."""
        if not self.args.should_save:  # all processes come here, one writes
            return
        assert self.args.output_dir is not None and self.processing_class is not None
        directory = Path(output_dir or self.args.output_dir)
        self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(
            str(directory), state_dict=state_dict, save_embedding_layers=False
        )
        self.processing_class.save_pretrained(str(directory))
        settle_files(directory, base_name=self._base_name)

    def save_now(self) -> None:
        """A checkpoint of the step just done, outside of a step's end."""
        self._save_checkpoint(self.model, None)
        self.control: TrainerControl = self.callback_handler.on_save(self.args, self.state, self.control)

    # Taking up

    def _init_training_state(self, max_steps: int, *rest: Any) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, *rest)
        self.state.compute_steps(self.args, max_steps)  # the recipe's logging_steps, not the checkpoint's
        for callback in self._stateful():  # of those that the checkpoint does not know
            callback_states(self.state).setdefault(type(callback).__name__, callback.state())
        if self.state.best_global_step:
            best = checkpoints.path_of(self.policy.directory, self.state.best_global_step)
            self.state.best_model_checkpoint = str(best)
        if window := callback_states(self.state).get("loss window"):
            self.window = window
        return position

    def _stateful(self) -> list[Any]:
        return [one for one in [*self.callback_handler.callbacks, self.control] if isinstance(one, ExportableState)]

    def _load_callback_state(self) -> None:
        """In place. The library would make new callbacks, where others hold on to these."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                state = callback_states(self.state).get(type(callback).__name__, {})
                for name, value in state.get("attributes", {}).items():
                    setattr(callback, name, value)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The trained tensors. Raises RunDirError when one does not come back as it was saved."""
        if self._holds_adapter_whole():
            self._take_weights(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """The adapter with the lowest held-out loss. Raises RunDirError when its checkpoint was damaged meanwhile."""
        kept = self.state.best_model_checkpoint
        assert kept is not None  # the library asks only then
        with seen_here(Path(kept)) as best:
            try:
                checkpoints.verified(best)
            except checkpoints.Damaged as reason:
                raise RunDirError(f"the best adapter cannot be read: {reason}", where=kept) from None
            if self._holds_adapter_whole():
                self._take_weights(best)
            else:
                self.state.best_model_checkpoint = str(best)
                super()._load_best_model()
                self.state.best_model_checkpoint = kept

    def _holds_adapter_whole(self) -> bool:
        return self.accelerator.distributed_type in DATA_PARALLEL

    def _take_weights(self, checkpoint: Path) -> None:
        """Each trained tensor bit for bit. The library's way widens a bfloat16 adapter to float32."""
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model.peft_config["default"], AdaLoraConfig):
            rank_allocation.load(model, checkpoint)
            return
        saved = load_file(checkpoint / WEIGHTS)
        set_peft_model_state_dict(model, saved)
        now = get_peft_model_state_dict(model, save_embedding_layers=False)
        odd = [name for name, tensor in now.items() if not _is_same(tensor, saved.get(name))]
        if odd:
            message = f"{odd[0]} does not come back as it was saved ({len(odd)} in all)"
            raise RunDirError(message, where=str(checkpoint / WEIGHTS))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last thing to come back before the first step: with it, the loss that was being summed up."""
        if checkpoint is not None:
            with self._rng_state_of_this_process(Path(checkpoint)) as directory:
                super()._load_rng_state(str(directory))
        window = callback_states(self.state)["loss window"]
        self._tr_loss = torch.tensor(window["loss"], device=self.args.device)
        self._globalstep_last_logged = window["since"]

    @contextmanager
    def _rng_state_of_this_process(self, checkpoint: Path) -> Iterator[Path]:
        """A directory with it under the name that the library looks for: of other processes than now, where they were
        more or fewer."""
        world, process = self.args.world_size, self.args.process_index
        own = "rng_state.pth" if world == 1 else f"rng_state_{process}.pth"
        saved = sorted(checkpoint.glob("rng_state*.pth"))
        if (checkpoint / own).is_file() or not saved:
            yield checkpoint
            return
        with scratch() as directory:
            shutil.copyfile(saved[process % len(saved)], directory / own)
            yield directory

    def _run_epoch(self, **named: Any) -> None:  # type: ignore[override]  # the library names all arguments
        """Nothing, when the checkpoint was that of a run which had come to its end."""
        if not self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            super()._run_epoch(**named)

    def evaluate_if_due(self) -> None:
        """Do the evaluation of the step that a resumed run begins with, unless that step's checkpoint records it."""
        if self.state.global_step == 0 or self.eval_dataset is None:
            return
        history = (entry for entry in self.state.log_history if entry["step"] == self.state.global_step)
        if any("eval_loss" in entry for entry in history):
            return
        wanted = DefaultFlowCallback().on_step_end(self.args, self.state, TrainerControl())
        if self.state.epoch == int(self.state.epoch) or wanted.should_training_stop:
            wanted = DefaultFlowCallback().on_epoch_end(self.args, self.state, wanted)
        if wanted.should_evaluate:
            # Else what is saved below would hold the random state of now, and the run take that up.
            self._load_rng_state(None if self._taken_up is None else str(self._taken_up))
            is_best = self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            if is_best and self.args.save_strategy == "best":
                self.save_now()


class _CatchUp(TrainerCallback):
    """At the start of a run that goes on: what its checkpoint came before."""

    def __init__(self, trainer: Committed) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The evaluation that was due."""
        self._trainer.evaluate_if_due()


def _is_same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and one.dtype == other.dtype and torch.equal(one.detach().cpu(), other)
